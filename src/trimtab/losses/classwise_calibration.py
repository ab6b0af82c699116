r"""Calibration error of every class's probability, not of the predicted class alone.

$$
\mathrm{CECE} = \frac1K \sum_{k} \sum_{b} \frac{|B_{bk}|}{n}
\Bigl| \tfrac{1}{|B_{bk}|} \textstyle\sum_{i \in B_{bk}} \mathbb{1}[y_i = k] - p_{ik} \Bigr| ,
$$

with the samples in bins of equal width by their probability of class `k`.

Reference: Kull, Perello-Nieto, Kängsepp, Silva Filho, Song, Flach, "Beyond temperature scaling: Obtaining
well-calibrated multiclass probabilities with Dirichlet calibration", NeurIPS 2019, arXiv 1910.12656.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def classwise_calibration_error(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], bins: int = 15
) -> float:
    """Mean over classes of the gap between a class's probability and its frequency, over bins of that probability.

    Args:
        probs: predicted probabilities, rows that sum to one.
        targets: true labels.
        bins: number of bins on [0, 1], of equal width.

    Returns:
        The error, in [0, 1].

    Raises:
        ValueError: if shapes disagree, there is no sample, a label is out of range, `probs` are no probabilities, or
            `bins` is not positive.

    Example:
        >>> probs = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
        >>> round(classwise_calibration_error(probs, torch.tensor([0, 1])), 6)
        0.3
    """
    if bins < 1:
        raise ValueError(f"bins: {bins}; it must be at least 1")
    if probs.ndim != 2 or targets.shape != probs.shape[:1] or not probs.numel():
        raise ValueError(
            f"probs, targets: shapes {tuple(probs.shape)} and {tuple(targets.shape)}; "
            "they must be (batch, classes) and (batch,), and not empty"
        )
    samples, classes = probs.shape
    if not bool(((targets >= 0) & (targets < classes)).all()):
        raise ValueError(f"targets: labels must be in [0, {classes})")
    probs = probs.detach().double()
    if not bool(((probs >= 0).all(1) & ((probs.sum(1) - 1).abs() < 1e-2)).all()):
        raise ValueError("probs: rows must be non-negative and sum to one; pass softmax(logits), not logits")
    gap = F.one_hot(targets.long(), classes) - probs
    bin_of = ((probs * bins).ceil().long() - 1).clamp(0, bins - 1)
    total = torch.zeros(bins, classes, dtype=torch.float64, device=probs.device).scatter_add_(0, bin_of, gap)
    return float(total.abs().sum() / (samples * classes))
