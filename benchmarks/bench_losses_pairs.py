"""Losses over pairs of samples and over modalities, forward and backward, beside what a user would write or take."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import SupConLoss
from torch import Tensor, nn

from benchmarks.timing import medians
from trimtab.losses import AsymmetricLearning, ConRLoss, SharedHeadFusion
from trimtab.studies.tools.peak_memory import peak_memory

BIN = 5.0


def plain_conr(features: Tensor, targets: Tensor, preds: Tensor) -> Tensor:
    """ConR as its repository has it: exponentials by the batch's square, and a loop that clears the diagonal."""
    unit = F.normalize(features, dim=1)
    label_gap = (targets[:, None] - targets[None]).abs()
    pred_gap = (preds[:, None] - preds[None]).abs().detach()
    positive = label_gap <= 1
    negative = ~positive & (pred_gap <= 1)
    for i in range(len(positive)):
        positive[i][i] = 0
    products = unit @ unit.T / 0.07
    inside, outside = (products * positive).exp(), (products * negative).exp()
    total = inside.sum(1) + ((0.01 * label_gap).exp() * outside * negative).sum(1)
    each = (-(inside / total[:, None]).log() * positive).sum(1) / positive.sum(1)
    return (each * negative.any(1)).mean()


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds and peak megabytes of ConR in a batch of two views, then milliseconds of ARL beside its parts."""
    yield from _conr(*((64, 32, 3) if quick else (512, 128, 25)))
    yield from _arl(*((16, 8, 3) if quick else (64, 512, 25)))


def _conr(batch: int, dim: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, dim, generator=generator, requires_grad=True)
    targets = (torch.rand(batch // 2, generator=generator) * 90).repeat(2)
    preds = targets + 5 * torch.randn(batch, generator=generator)
    classes, ours, contrast = (targets / BIN).long(), ConRLoss(denominator="source"), SupConLoss(temperature=0.07)
    peers: dict[str, Callable[[], Tensor]] = {
        "ConR of its repository": lambda: plain_conr(features, targets, preds),
        "pytorch-metric-learning's SupConLoss on bins": lambda: contrast(features, classes),
    }
    calls = {
        name: _stepped(make, features) for name, make in {"": lambda: ours(features, targets, preds), **peers}.items()
    }
    taken = {"ms": {name: 1e3 * seconds for name, seconds in medians(calls, repeats).items()}}
    taken["MB"] = {name: peak_memory(call) / 2**20 for name, call in calls.items()}
    for unit, found in taken.items():
        for peer in peers:
            ratio = found[""] / found[peer]
            yield {
                "what": f"ConRLoss against {peer}, {'time' if unit == 'ms' else 'memory'}",
                "ours": found[""],
                "peer": found[peer],
                "ratio": ratio,
                "unit": unit,
                "aim": "at most 1",
                "met": ratio <= 1,
                "note": f"batch {batch}, {dim} features",
            }


def _arl(batch: int, width: int, repeats: int) -> Iterator[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoders = nn.ModuleList(nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width)) for _ in "av")
        fusion = SharedHeadFusion(nn.Linear(2 * width, 31), [width, width])
    views = [torch.randn(batch, 784, generator=generator) for _ in range(2)]
    targets = torch.randint(31, (batch,), generator=generator)
    criterion = AsymmetricLearning(warmup_epochs=0)

    def features() -> list[Tensor]:
        return [encoder(view) for encoder, view in zip(encoders, views, strict=True)]

    def arl() -> Tensor:
        logits, alone = fusion(criterion.modulate(features(), fusion))
        value: Tensor = criterion(logits, alone, targets)
        return value

    def with_unimodal_losses() -> Tensor:
        logits, alone = fusion(features())
        return F.cross_entropy(logits, targets) + 4 * sum(F.cross_entropy(part, targets) for part in alone.unbind(1))

    def joint() -> Tensor:
        return F.cross_entropy(fusion.head(torch.cat(features(), 1)), targets)

    def with_second_look() -> Tensor:
        """As the coefficients are those of the very batch whose gradient they scale, the head runs twice."""
        held = features()
        with torch.no_grad():
            fusion(held)
        logits, alone = fusion(held)
        return F.cross_entropy(logits, targets) + 4 * sum(F.cross_entropy(part, targets) for part in alone.unbind(1))

    unimodal = "joint training with unimodal losses"
    aims = {"joint training": 1.3, unimodal: 1.1, f"{unimodal} and the head run twice": 1.1}
    makes = {"": arl, **dict(zip(aims, (joint, with_unimodal_losses, with_second_look), strict=True))}
    parameters = [*encoders.parameters(), *fusion.parameters()]
    seconds = medians({name: _stepped(make, *parameters) for name, make in makes.items()}, repeats)
    for peer, aim in aims.items():
        ratio = seconds[""] / seconds[peer]
        yield {
            "what": f"a step's gradients with ARL against {peer}",
            "ours": 1e3 * seconds[""],
            "peer": 1e3 * seconds[peer],
            "ratio": ratio,
            "unit": "ms",
            "aim": f"at most {aim:g}",
            "met": ratio <= aim,
            "note": f"batch {batch}, two MLP encoders of width {width}",
        }


def _stepped(make: Callable[[], Tensor], *parameters: Tensor) -> Callable[[], None]:
    def call() -> None:
        for parameter in parameters:
            parameter.grad = None
        make().backward()

    return call
