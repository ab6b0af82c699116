"""Metric losses, forward and backward, beside pytorch-metric-learning, and the memory that they take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pytorch_metric_learning.losses import ThresholdConsistentMarginLoss as PeerTCM
from torch import Tensor, nn

from benchmarks.timing import medians
from trimtab.metric import ThresholdConsistentMarginLoss

AIM = 0.5


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of forward and backward at batch 1024, 512 dimensions and 64 classes, then peak memory."""
    batch, dim, repeats = (64, 32, 15) if quick else (1024, 512, 2)
    sides = {"ours": ThresholdConsistentMarginLoss(), "peer": PeerTCM()}
    for loss in sides.values():  # a small call warms up; at the full size the peer takes many seconds
        _forward_backward(loss, 16, dim)()
    seconds = medians({name: _forward_backward(loss, batch, dim) for name, loss in sides.items()}, repeats, warmup=0)
    yield _row("ThresholdConsistentMarginLoss, time", {side: 1e3 * s for side, s in seconds.items()}, "ms", batch, dim)
    if not quick:
        memory = {side: _peak_megabytes(side, batch, dim) for side in sides}
        yield _row("ThresholdConsistentMarginLoss, memory above the embeddings'", memory, "MB", batch, dim)


def _row(what: str, values: dict[str, float], unit: str, batch: int, dim: int) -> dict[str, object]:
    ratio = values["ours"] / values["peer"]
    return {
        "what": f"{what}, against pytorch-metric-learning",
        "ours": values["ours"],
        "peer": values["peer"],
        "ratio": ratio,
        "unit": unit,
        "aim": f"at most {AIM:g}",
        "met": ratio <= AIM,
        "note": f"batch {batch}, {dim} dimensions",
    }


def _batch(batch: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(batch) % min(64, batch // 4)
    centres = torch.randn(64, dim, generator=generator)
    return (centres[labels] + torch.randn(batch, dim, generator=generator)).requires_grad_(), labels


def _forward_backward(loss: nn.Module, batch: int, dim: int) -> Callable[[], None]:
    embeddings, labels = _batch(batch, dim)

    def call() -> None:
        embeddings.grad = None
        loss(embeddings, labels).backward()

    return call


def _peak_megabytes(side: str, batch: int, dim: int) -> float:
    """Growth of the resident set's high-water mark over one call, in a process of its own."""
    code = f"from benchmarks.bench_metric import print_growth; print_growth({side!r}, {batch}, {dim})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_growth(side: str, batch: int, dim: int) -> None:
    """One call at a small batch to load what there is to load, then one at the full batch."""
    loss = {"ours": ThresholdConsistentMarginLoss, "peer": PeerTCM}[side]()
    _forward_backward(loss, 16, dim)()
    call = _forward_backward(loss, batch, dim)
    before = _high_water()
    call()
    print(_high_water() - before)


def _high_water() -> float:
    """Peak resident megabytes of this process alone; `getrusage` would hand down the parent's."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status["VmHWM"].split()[0]) / 1024
