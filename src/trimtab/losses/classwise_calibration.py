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

from trimtab.losses.calibration import checked_probabilities
from trimtab.ops.arguments import integer


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
        TypeError: if `probs` is not floating point or `targets` not of integer type.
        ValueError: if shapes disagree, there is no sample, a label is out of range, `probs` are no probabilities, or
            `bins` is not positive.

    Example:
        >>> probs = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
        >>> round(classwise_calibration_error(probs, torch.tensor([0, 1])), 6)
        0.3
    """
    bins = integer("bins", bins)
    probs, targets = checked_probabilities(probs, targets)
    samples, classes = probs.shape
    probs = probs.double()
    gap = F.one_hot(targets, classes) - probs
    bin_of = ((probs * bins).ceil().long() - 1).clamp(0, bins - 1)
    total = torch.zeros(bins, classes, dtype=torch.float64, device=probs.device).scatter_add_(0, bin_of, gap)
    return float(total.abs().sum() / (samples * classes))
