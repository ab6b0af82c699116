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

from trimtab.ops.arguments import integer, labels, tensor


def expected_calibration_error(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by how many samples a bin holds.

    Args:
        probs: predicted probabilities, rows that sum to one; a tensor or an array.
        targets: true labels, in [0, classes).
        bins: number of bins on (0, 1], open on the left.

    Returns:
        The error, in [0, 1].

    Raises:
        TypeError: if `probs` is not floating point or `targets` not of integer type.
        ValueError: if shapes disagree, there is no sample, a label is out of range, `probs` are no probabilities, or
            `bins` is not positive.

    Example:
        >>> probs = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
        >>> round(expected_calibration_error(probs, torch.tensor([0, 1])), 6)
        0.3
    """
    bins = integer("bins", bins)
    confidence, correct = _confidence_and_correct(probs, targets)
    bin_of = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add_(0, bin_of, correct - confidence)
    return float(gap.abs().sum() / len(confidence))


def adaptive_calibration_error(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], bins: int = 15
) -> float:
    """Mean gap between confidence and accuracy over bins that hold equally many samples, in order of confidence.

    Where most confidences are near one, as after training, equal widths put nearly all samples into one bin. Samples of
    equal confidence count with their mean gap, so that which of them falls into which bin does not matter.

    Args:
        probs: predicted probabilities, rows that sum to one; a tensor or an array.
        targets: true labels, in [0, classes).
        bins: number of bins; sizes differ by at most one sample, and bins beyond the number of samples stay empty.

    Returns:
        The error, in [0, 1].

    Raises:
        TypeError: if `probs` is not floating point or `targets` not of integer type.
        ValueError: if shapes disagree, there is no sample, a label is out of range, `probs` are no probabilities, or
            `bins` is not positive.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
        >>> round(adaptive_calibration_error(probs, torch.tensor([0, 0, 1, 0]), bins=2), 6)  # gaps 0.15 and -0.15
        0.15
    """
    bins = integer("bins", bins)
    confidence, correct = _confidence_and_correct(probs, targets)
    confidence, order = confidence.sort()
    tie = torch.cat([confidence.new_zeros(1), (confidence.diff() != 0).double()]).cumsum(0).long()
    mean_gap = (torch.bincount(tie, correct[order] - confidence) / torch.bincount(tie))[tie]
    return float(sum(gap.sum().abs() for gap in mean_gap.tensor_split(bins)) / len(confidence))


def area_under_risk_coverage(probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> float:
    """Error rate among the `i` most confident samples, averaged over `i = 1 .. batch` (AURC, smaller is better).

    Samples of equal confidence count with their mean error, which is the expectation over their order.

    Args:
        probs: predicted probabilities, rows that sum to one; a tensor or an array.
        targets: true labels, in [0, classes).

    Returns:
        The area, in [0, 1].

    Raises:
        TypeError: if `probs` is not floating point or `targets` not of integer type.
        ValueError: if shapes disagree, there is no sample, a label is out of range, or `probs` are no probabilities.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
        >>> area_under_risk_coverage(probs, torch.tensor([0, 1]))  # risks 0 and 1/2
        0.25
    """
    confidence, correct = _confidence_and_correct(probs, targets)
    confidence, order = confidence.sort(descending=True)
    tie = torch.cat([confidence.new_zeros(1), (confidence.diff() != 0).double()]).cumsum(0).long()
    mean_error = (torch.bincount(tie, 1 - correct[order]) / torch.bincount(tie))[tie]
    coverage = torch.arange(1, len(confidence) + 1, device=confidence.device)
    return float((mean_error.cumsum(0) / coverage).mean())


def checked_probabilities(
    probs: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]
) -> tuple[Float[Tensor, "batch classes"], Int[Tensor, " batch"]]:
    """Probabilities, in float32 at least, and labels, once they are known to be such and to belong together.

    Raises:
        TypeError: if `probs` is not floating point or `targets` not of integer type.
        ValueError: if shapes disagree, there is no sample, a label is out of range, or `probs` are no probabilities.
    """
    probs = tensor("probs", probs, ndim=2, floating=True).detach()
    if probs.numel() == 0:
        raise ValueError("probs must hold at least one sample, got an empty batch")
    targets = labels("targets", targets, probs.shape[1], len(probs)).to(probs.device)
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    # NaN, negative values and unnormalised rows are refused: logits handed over by mistake show here.
    if not bool((probs.amin() >= 0) & ((probs.sum(1) - 1).abs() < 1e-2).all()):
        raise ValueError("probs must be softmax(logits), rows that are non-negative and sum to one, got others")
    return probs, targets


def _confidence_and_correct(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    probs, targets = checked_probabilities(probs, targets)
    confidence, predicted = probs.max(dim=1)
    return confidence.double(), (predicted == targets).double()
