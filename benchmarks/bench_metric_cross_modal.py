"""Image-text losses, forward and backward, beside CLIP's loss as one writes it and as the authors add their term."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import medians
from trimtab.metric import CrossModalAlignmentLoss
from trimtab.studies.tools.peak_memory import peak_memory

OURS, LABELLED = "CrossModalAlignmentLoss", "CrossModalAlignmentLoss with labels"
CLIP, RELEASED = "CLIP's loss by two cross-entropies", "cross-entropies and two more log-sum-exps (the authors' form)"
AIMS = {"ms": 1.05, "MB": 1.05}


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """As open_clip has it, on one process."""
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    truth = torch.arange(len(logits))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def released_loss(images: Tensor, texts: Tensor, scale: Tensor, lam: float = 1e-3) -> Tensor:
    """The two parts of the loss one by one."""
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    truth = torch.arange(len(logits))
    parts = [F.cross_entropy(z, truth) - lam * z.logsumexp(1).mean() for z in (logits, logits.T)]
    return (parts[0] + parts[1]) / 2


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds, then peak megabytes, of forward and backward."""
    batch, dim, repeats = (64, 32, 3) if quick else (512, 512, 15)
    labels = torch.randint(batch // 4, (batch,), generator=torch.Generator().manual_seed(1))
    loss = CrossModalAlignmentLoss()
    losses: dict[str, Callable[..., Tensor]] = {
        OURS: loss,
        LABELLED: lambda images, texts, scale: loss(images, texts, scale, labels),
        CLIP: clip_loss,
        RELEASED: released_loss,
    }
    calls = {name: _forward_backward(function, batch, dim) for name, function in losses.items()}
    seconds = medians(calls, repeats, warmup=1)
    found = {
        "ms": {name: 1e3 * taken for name, taken in seconds.items()},
        "MB": {name: peak_memory(call) / 2**20 for name, call in calls.items()},
    }
    for name, other in ((OURS, CLIP), (OURS, RELEASED), (LABELLED, RELEASED)):
        for unit, aim in AIMS.items():
            ratio = found[unit][name] / found[unit][other]
            yield {
                "what": f"{name}, {'time' if unit == 'ms' else 'memory'}, against {other}",
                "ours": found[unit][name],
                "peer": found[unit][other],
                "ratio": ratio,
                "unit": unit,
                "aim": f"at most {aim:g}",
                "met": ratio <= aim,
                "note": f"batch {batch}, {dim} dimensions",
            }


def _forward_backward(loss: Callable[..., Tensor], batch: int, dim: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(batch, dim, generator=generator, requires_grad=True) for _ in range(2))
    scale = torch.tensor(100.0, requires_grad=True)

    def call() -> None:
        images.grad = texts.grad = scale.grad = None
        loss(images, texts, scale).backward()

    return call
