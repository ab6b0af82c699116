r"""Diagnostics of predicted probabilities: is the confidence right, and does it rank errors last?

`expected_calibration_error` compares confidence with accuracy in bins of equal width,

$$
\mathrm{ECE} = \sum_{b} \frac{|B_b|}{n} \bigl| \mathrm{acc}(B_b) - \mathrm{conf}(B_b) \bigr| ,
$$

`adaptive_calibration_error` in bins that hold equally many samples, and `area_under_risk_coverage` (AURC) is the error
rate among the most confident `i` samples, averaged over `i`.

References: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599;
Nixon, Dusenberry, Zhang, Jerfel, Tran, "Measuring Calibration in Deep Learning", CVPR Workshops 2019, arXiv 1904.01685;
Geifman, Uziel, El-Yaniv, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers", ICLR 2019,
arXiv 1805.08206.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def expected_calibration_error(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by how many samples a bin holds.

    Args:
        probs: predicted probabilities, rows that sum to one.
        targets: true labels.
        bins: number of bins on (0, 1], open on the left.

    Returns:
        The error, in [0, 1].

    Raises:
        TypeError: if `probs` is not floating point or `targets` not of integer type.
        ValueError: if shapes disagree, there is no sample, `probs` are no probabilities, or `bins` is not positive.

    Example:
        >>> probs = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
        >>> round(expected_calibration_error(probs, torch.tensor([0, 1])), 6)
        0.3
    """
    if bins < 1:
        raise ValueError(f"bins: {bins}; it must be at least 1")
    confidence, correct = _confidence_and_correct(probs, targets)
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=probs.device).index_add_(0, bin_of, correct - confidence)
    return float(gap.abs().sum() / len(targets))


def adaptive_calibration_error(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over bins that hold equally many samples, in order of confidence.

    Where most confidences are near one, as after training, equal widths put nearly all samples into one bin.

    Args:
        probs: predicted probabilities, rows that sum to one.
        targets: true labels.
        bins: number of bins; sizes differ by at most one sample, and bins beyond the number of samples stay empty.

    Returns:
        The error, in [0, 1].

    Raises:
        TypeError: if `probs` is not floating point or `targets` not of integer type.
        ValueError: if shapes disagree, there is no sample, `probs` are no probabilities, or `bins` is not positive.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
        >>> round(adaptive_calibration_error(probs, torch.tensor([0, 0, 1, 0]), bins=2), 6)  # gaps 0.15 and -0.15
        0.15
    """
    if bins < 1:
        raise ValueError(f"bins: {bins}; it must be at least 1")
    confidence, correct = _confidence_and_correct(probs, targets)
    order = confidence.argsort()
    gaps = (correct - confidence)[order].tensor_split(bins)
    return float(sum(gap.sum().abs() for gap in gaps) / len(targets))


def area_under_risk_coverage(probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> float:
    """Error rate among the `i` most confident samples, averaged over `i = 1 .. batch` (AURC, smaller is better).

    Samples of equal confidence count with their mean error, which is the expectation over their order.

    Args:
        probs: predicted probabilities, rows that sum to one.
        targets: true labels.

    Returns:
        The area, in [0, 1].

    Raises:
        TypeError: if `probs` is not floating point or `targets` not of integer type.
        ValueError: if shapes disagree, there is no sample, or `probs` are no probabilities.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> area_under_risk_coverage(probs, torch.tensor([0, 1]))  # risks 0 and 1/2
        0.25
    """
    confidence, correct = _confidence_and_correct(probs, targets)
    confidence, order = confidence.sort(descending=True)
    tie = torch.cat([confidence.new_zeros(1), (confidence.diff() != 0).double()]).cumsum(0).long()
    mean_error = (torch.bincount(tie, 1 - correct[order]) / torch.bincount(tie))[tie]
    coverage = torch.arange(1, len(targets) + 1, device=probs.device)
    return float((mean_error.cumsum(0) / coverage).mean())


def _confidence_and_correct(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if not probs.is_floating_point():
        raise TypeError(f"probs: dtype {probs.dtype}; it must be a floating-point type")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets: dtype {targets.dtype}; it must be an integer type")
    if probs.ndim != 2 or targets.shape != probs.shape[:1]:
        raise ValueError(
            f"probs, targets: shapes {tuple(probs.shape)} and {tuple(targets.shape)}; "
            "they must be (batch, classes) and (batch,)"
        )
    if probs.numel() == 0:
        raise ValueError("probs: the batch is empty; the diagnostic needs at least one sample")
    probs = probs.detach().double()
    # One comparison refuses NaN, negative values and unnormalised rows: logits handed over by mistake show here.
    if not bool(((probs >= 0).all(1) & ((probs.sum(1) - 1).abs() < 1e-2)).all()):
        raise ValueError("probs: rows must be non-negative and sum to one; pass softmax(logits), not logits")
    confidence, predicted = probs.max(dim=1)
    return confidence, (predicted == targets).double()
