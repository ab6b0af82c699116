"""Face-recognition heads, forward and backward, beside pytorch-metric-learning and a plain normalised cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as peers
from torch import Tensor, nn

from benchmarks.timing import medians
from trimtab.metric import MarginSoftmaxLoss, SFaceLoss, UNPGLoss, pair_scores
from trimtab.studies.tools.peak_memory import peak_memory

AIMS = {"ms": 1.0, "MB": 1.1}
AIM_PLAIN = 1.3
PLAIN = "normalised cross-entropy"
ARCFACE, COSFACE = "pytorch-metric-learning's ArcFaceLoss", "pytorch-metric-learning's CosFaceLoss"
CONCATENATED = "a softmax over the pairs in every row"


class PlainHead(nn.Module):
    """Cross-entropy of scaled cosines, as one writes it by hand."""

    def __init__(self, embedding_size: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, embedding_size))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(64 * F.normalize(embeddings) @ F.normalize(self.weight).T, labels)


class ConcatenatedUNPG(nn.Module):
    """UNPG as its repository has it: the kept pairs are copied into every row of the logits."""

    def __init__(self, head: MarginSoftmaxLoss, whisker: float = 1.5) -> None:
        super().__init__()
        self.head, self.whisker = head, whisker

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        similarity, same = pair_scores(embeddings, labels)
        negative = similarity[~same].sort().values
        first, third = negative[int(0.25 * len(negative))], negative[int(0.75 * len(negative))]
        reach = self.whisker * (third - first)
        kept = negative[(negative >= first - reach) & (negative <= third + reach)]
        pairs = (self.head.scale * kept).expand(len(labels), -1)
        return F.cross_entropy(torch.cat([self.head.logits(embeddings, labels), pairs], dim=1), labels)


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds, then peak megabytes, of forward and backward with 512 dimensions and 10,000 identities."""
    batch, dim, classes, repeats = (64, 32, 200, 3) if quick else (256, 512, 10_000, 9)
    ours: dict[str, nn.Module] = {
        "MarginSoftmaxLoss, ArcFace": MarginSoftmaxLoss(dim, classes),
        "MarginSoftmaxLoss, CosFace": MarginSoftmaxLoss(dim, classes, kind="cosface"),
        "SFaceLoss": SFaceLoss(dim, classes),
        "UNPGLoss of ArcFace": UNPGLoss(MarginSoftmaxLoss(dim, classes)),
    }
    others: dict[str, nn.Module] = {
        PLAIN: PlainHead(dim, classes),
        ARCFACE: peers.ArcFaceLoss(classes, dim),
        COSFACE: peers.CosFaceLoss(classes, dim),
        CONCATENATED: ConcatenatedUNPG(MarginSoftmaxLoss(dim, classes)),
    }
    calls = {name: _forward_backward(loss, batch, dim, classes) for name, loss in {**ours, **others}.items()}
    seconds = medians(calls, repeats, warmup=1)
    found = {"ms": {name: 1e3 * taken for name, taken in seconds.items()}, "MB": {}}
    for name, loss in {**ours, **others}.items():
        loss.zero_grad()  # gradients left from before would count as memory that is given back
        found["MB"][name] = peak_memory(calls[name]) / 2**20
    note = f"batch {batch}, {dim} dimensions, {classes:,} identities"
    for name in ours:
        yield _row(name, PLAIN, found, "ms", AIM_PLAIN, note)
        for unit, aim in AIMS.items():
            yield _row(name, COSFACE if name.endswith("CosFace") else ARCFACE, found, unit, aim, note)
    for unit in AIMS:
        yield _row("UNPGLoss of ArcFace", CONCATENATED, found, unit, 1.0, note)


def _row(
    name: str, other: str, found: dict[str, dict[str, float]], unit: str, aim: float, note: str
) -> dict[str, object]:
    ratio = found[unit][name] / found[unit][other]
    return {
        "what": f"{name}, {'time' if unit == 'ms' else 'memory'}, against {other}",
        "ours": found[unit][name],
        "peer": found[unit][other],
        "ratio": ratio,
        "unit": unit,
        "aim": f"at most {aim:g}",
        "met": ratio <= aim,
        "note": note,
    }


def _forward_backward(loss: nn.Module, batch: int, dim: int, classes: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(batch, dim, generator=generator, requires_grad=True)
    labels = torch.randint(classes, (batch,), generator=generator)

    def call() -> None:
        embeddings.grad = None
        loss.zero_grad()
        loss(embeddings, labels).backward()

    return call
