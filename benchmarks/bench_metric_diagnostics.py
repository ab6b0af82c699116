"""Diagnostics of confidences and similarities beside torchmetrics, on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from benchmarks.timing import medians
from trimtab.losses import expected_calibration_error
from trimtab.metric.verification import auroc

AIM = 1.0


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds, and how far the two values are apart."""
    count, classes, repeats = (1000, 10, 3) if quick else (100_000, 100, 15)
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(count, classes, generator=generator)).softmax(1)
    targets = torch.multinomial(probs, 1, generator=generator)[:, 0]
    same = torch.rand(10 * count, generator=generator) < 0.1
    similarity = torch.randn(10 * count, generator=generator) + same
    pairs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {
        f"expected_calibration_error, {count} x {classes}": (
            lambda: expected_calibration_error(probs, targets),
            lambda: float(multiclass_calibration_error(probs, targets, classes, n_bins=15)),
        ),
        f"auroc, {len(same)} pairs": (
            lambda: auroc(similarity, same),
            # With scores in [0, 1], or it takes them for logits and a sigmoid rounds some of them to ties.
            lambda: float(binary_auroc((similarity - similarity.min()) / (similarity.max() - similarity.min()), same)),
        ),
    }
    for what, (ours, theirs) in pairs.items():
        seconds = medians({"ours": ours, "peer": theirs}, repeats, warmup=1)
        ratio = seconds["ours"] / seconds["peer"]
        yield {
            "what": f"{what}, against torchmetrics",
            "ours": 1e3 * seconds["ours"],
            "peer": 1e3 * seconds["peer"],
            "ratio": ratio,
            "unit": "ms",
            "aim": AIM,
            "met": ratio <= AIM,
            "note": f"values {abs(ours() - theirs()):.1e} apart",
        }
