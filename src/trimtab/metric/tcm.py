r"""Threshold-consistent margins: a regulariser that makes one similarity threshold suit all classes, and its measure.

Add `ThresholdConsistentMarginLoss` to any metric loss when matches will be declared by one fixed threshold on classes
not seen in training. Only hard pairs are pulled or pushed, towards absolute cosines $m_+$ and $m_-$:

$$
L = \lambda_+ \frac{\sum_{P} (m_+ - S_{ij}) \, [S_{ij} \le m_+]}{\sum_{P} [S_{ij} \le m_+]}
+ \lambda_- \frac{\sum_{N} (S_{ij} - m_-) \, [S_{ij} \ge m_-]}{\sum_{N} [S_{ij} \ge m_-]}
$$

over the positive pairs P and the negative pairs N of a batch, S the cosine similarity; a part without hard pairs is
zero. `opis` (operating-point-inconsistency score) is the variance, over classes, of the utility of a distance
threshold, averaged over thresholds that a system would use:

$$
\mathrm{OPIS} = \frac{1}{C} \sum_{i=1}^{C} \frac{1}{d_{\max} - d_{\min}} \int_{d_{\min}}^{d_{\max}}
\bigl( U_i(d) - \bar U(d) \bigr)^2 \mathrm{d}d , \qquad
U_i = \frac{2 \, \phi_i \psi_i}{\phi_i + \psi_i}
$$

with $\psi_i(d)$ the share of the pairs within class i at distance d or less and $\phi_i(d)$ the share of the pairs
of class i with another class beyond d.

Reference: Qin Zhang, Linghan Xu, Qingming Tang, Jun Fang, Ying Nian Wu, Joe Tighe, Yifan Xing, "Threshold-Consistent
Margin Loss for Open-World Deep Metric Learning", ICLR 2024, arXiv 2307.04047.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.metric.pairs import checked_points, compared, pair_masks
from trimtab.ops.arguments import finite_tensor, in_range, integer, non_negative
from trimtab.ops.pairwise import pairwise_cosine


def threshold_consistent_margin(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    margin_pos: float = 0.9,
    margin_neg: float = 0.5,
    weight_pos: float = 1.0,
    weight_neg: float = 1.0,
    *,
    indices_tuple: tuple[Tensor, ...] | None = None,
    ref_emb: Float[Tensor, "refs dim"] | None = None,
    ref_labels: Int[Tensor, " refs"] | None = None,
) -> Float[Tensor, ""]:
    """The loss of a batch (equation in the module's docstring); arguments as in `ThresholdConsistentMarginLoss`.

    Raises:
        TypeError: if `embeddings` is not floating point or `labels` not of integer type.
        ValueError: if shapes disagree, the batch is empty, or a margin or a weight is out of its range.

    Example:
        >>> threshold_consistent_margin(torch.ones(4, 2), torch.tensor([0, 0, 1, 1]))  # cosine 1 for all pairs
        tensor(0.5000)
    """
    if not (-1 <= margin_pos <= 1 and -1 <= margin_neg <= 1):
        raise ValueError(f"margin_pos and margin_neg must be in [-1, 1], got {margin_pos} and {margin_neg}")
    if not (0 <= weight_pos < math.inf and 0 <= weight_neg < math.inf):
        raise ValueError(f"weight_pos and weight_neg must be at least 0 and finite, got {weight_pos} and {weight_neg}")
    similarity, (positive, negative) = compared(embeddings, labels, indices_tuple, ref_emb, ref_labels)
    return weight_pos * _mean_violation(margin_pos - similarity, positive) + weight_neg * _mean_violation(
        similarity - margin_neg, negative
    )


class ThresholdConsistentMarginLoss(nn.Module):
    """The regulariser as a module: `loss = base(embeddings, labels) + tcm(embeddings, labels)`.

    Args:
        margin_pos: cosine above which a positive pair is left alone, in [-1, 1].
        margin_neg: cosine below which a negative pair is left alone, in [-1, 1] and at most `margin_pos`.
        weight_pos: weight of the positive pairs, at least 0.
        weight_neg: weight of the negative pairs, at least 0.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> tcm = ThresholdConsistentMarginLoss()
        >>> embeddings = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]], requires_grad=True)
        >>> tcm(embeddings, torch.tensor([0, 0, 1])).item()
        0.0
    """

    def __init__(
        self,
        margin_pos: float = 0.9,
        margin_neg: float = 0.5,
        weight_pos: float = 1.0,
        weight_neg: float = 1.0,
    ) -> None:
        super().__init__()
        self.margin_pos = in_range("margin_pos", margin_pos, -1, 1)
        self.margin_neg = in_range("margin_neg", margin_neg, -1, 1)
        if margin_neg > margin_pos:
            raise ValueError(f"margin_neg must be at most margin_pos={margin_pos}, got {margin_neg}")
        self.weight_pos = non_negative("weight_pos", weight_pos)
        self.weight_neg = non_negative("weight_neg", weight_neg)

    def forward(
        self,
        embeddings: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Float[Tensor, "refs dim"] | None = None,
        ref_labels: Int[Tensor, " refs"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            embeddings: one row per sample, of any length; they are normalised here.
            labels: classes.
            indices_tuple, ref_emb, ref_labels: what the miners, CrossBatchMemory and trainers of
                pytorch-metric-learning pass: the pairs that count, and other samples to compare the batch with.
        """
        return threshold_consistent_margin(
            embeddings,
            labels,
            self.margin_pos,
            self.margin_neg,
            self.weight_pos,
            self.weight_neg,
            indices_tuple=indices_tuple,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
        )

    def extra_repr(self) -> str:
        return f"margin_pos={self.margin_pos:g}, margin_neg={self.margin_neg:g}"


def _mean_violation(violation: Tensor, pairs: Tensor) -> Tensor:
    hard = pairs & (violation >= 0)
    return torch.where(hard, violation, 0.0).sum() / hard.sum().clamp(min=1)


@dataclass(frozen=True)
class UtilityCurves:
    """How well each class is told from the others, over distance thresholds.

    Attributes:
        thresholds: distances between normalised embeddings, in [0, 2].
        classes: labels of the rows; classes with fewer than two samples have none.
        sensitivity: share of the pairs within the class at the threshold's distance or less, `(classes, thresholds)`.
        specificity: share of the pairs with other classes beyond it, `(classes, thresholds)`.
    """

    thresholds: Float[Tensor, " thresholds"]
    classes: Int[Tensor, " classes"]
    sensitivity: Float[Tensor, "classes thresholds"]
    specificity: Float[Tensor, "classes thresholds"]

    @property
    def utility(self) -> Float[Tensor, "classes thresholds"]:
        """Harmonic mean of sensitivity and specificity; zero where both are."""
        total = self.sensitivity + self.specificity
        return 2 * self.sensitivity * self.specificity / torch.where(total == 0, 1.0, total)


def utility_curves(
    embeddings: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    thresholds: Float[Tensor, " thresholds"] | None = None,
    *,
    far: tuple[float, float] = (1e-2, 1e-1),
    num_thresholds: int = 101,
) -> UtilityCurves:
    """Sensitivity and specificity of every class over distance thresholds. Memory is quadratic in `n`.

    Args:
        embeddings: one row per sample, of any length; they are normalised here.
        labels: classes.
        thresholds: ascending distances; by default `num_thresholds` between those where the share of all negative
            pairs accepted (false accept rate) reaches the two values of `far`.
        far: smallest and largest false accept rate, in (0, 1].
        num_thresholds: number of thresholds, at least 2.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes disagree, a value is not finite, an argument is out of range, there is only one class,
            or no class has two samples.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> utility_curves(points, torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 1.0])).utility
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """
    embeddings, labels = checked_points(embeddings, labels)
    if not 0 < far[0] <= far[1] <= 1:
        raise ValueError(f"far must be two rates in (0, 1], the smaller first, got {far}")
    integer("num_thresholds", num_thresholds, 2)
    if thresholds is not None and not isinstance(thresholds, Tensor):
        raise TypeError(f"thresholds must be a tensor, got {type(thresholds).__name__}")
    if thresholds is not None and len(finite_tensor("thresholds", thresholds, ndim=1)) == 0:
        raise ValueError("thresholds must hold at least one distance, got none")
    if thresholds is not None and bool((thresholds.diff() < 0).any()):
        raise ValueError("thresholds must be in ascending order, got others")
    classes, class_of, size = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2 or int(size.max()) < 2:
        raise ValueError("labels must be of two classes, one of them with two samples, got fewer")
    distance = (2 - 2 * pairwise_cosine(embeddings)).clamp(min=0).sqrt()
    positive, negative = pair_masks(labels)
    if thresholds is None:
        accepted = distance[negative]
        low, high = (accepted.kthvalue(math.ceil(rate * len(accepted))).values.item() for rate in far)
        thresholds = torch.linspace(low, high, num_thresholds, dtype=distance.dtype, device=distance.device)
    # Bucket b holds the distances between threshold b - 1 (excluded) and threshold b (included).
    bucket = torch.bucketize(distance, thresholds.to(distance))
    cell = class_of[:, None] * (len(thresholds) + 1) + bucket
    num_cells = len(classes) * (len(thresholds) + 1)
    within, across = (
        cell[mask].bincount(minlength=num_cells).view(len(classes), -1).double() for mask in (positive, negative)
    )
    accepted_within, accepted_across = (
        count.cumsum(1)[:, :-1] / count.sum(1, keepdim=True).clamp(min=1) for count in (within, across)
    )
    paired = size > 1
    return UtilityCurves(thresholds, classes[paired], accepted_within[paired], 1 - accepted_across[paired])


def utility_variance(utility: Float[Tensor, "classes thresholds"], worst: float | None = None) -> float:
    """Squared deviation of the classes' utility from their mean, averaged over classes and thresholds.

    Args:
        utility: values over equally spaced thresholds; the average is the trapezoid rule's.
        worst: share of the classes, those of lowest mean utility, that the average is restricted to, in (0, 1]; the
            mean that they deviate from stays that of all classes (our reading of epsilon-OPIS, see `opis`). None takes
            all classes.

    Raises:
        ValueError: if `utility` is no matrix with two columns or `worst` is out of range.

    Example:
        >>> utility_variance(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        0.25
    """
    utility = finite_tensor("utility", utility)
    if utility.ndim != 2 or utility.shape[0] == 0 or utility.shape[1] < 2:
        raise ValueError(f"utility must be (classes, two thresholds or more), got shape {tuple(utility.shape)}")
    if worst is not None:
        in_range("worst", worst, 0, 1, "right")
    utility = utility.double()
    deviation = (utility - utility.mean(0)).square()
    per_class = torch.trapezoid(deviation, dim=1) / (utility.shape[1] - 1)
    if worst is not None:
        mean_utility = torch.trapezoid(utility, dim=1)
        per_class = per_class[mean_utility.argsort()[: math.ceil(worst * len(per_class))]]
    return float(per_class.mean())


def opis(
    embeddings: Float[Tensor, "n dim"],
    labels: Int[Tensor, " n"],
    *,
    far: tuple[float, float] = (1e-2, 1e-1),
    num_thresholds: int = 101,
    worst: float | None = None,
) -> float:
    """Operating-point-inconsistency score (equation in the module's docstring); smaller is better.

    Args:
        embeddings: one row per sample, of any length; they are normalised here.
        labels: classes. Those with a single sample count as the others' negatives and have no utility of their own.
        far: false accept rates, over all negative pairs, that bound the thresholds. The default suits retrieval; face
            verification looks at smaller ones.
        num_thresholds: number of thresholds, at least 2.
        worst: restricts the score to this share of the classes, those of lowest utility. This is our reading of the
            paper's epsilon-OPIS, whose definition we had in no text: compare such scores with each other alone.

    Returns:
        The score, in [0, 1/4] where `worst` is None.

    Raises:
        TypeError, ValueError: as `utility_curves` and `utility_variance`.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> points = torch.randn(60, 4, generator=generator)
        >>> 0 < opis(points, torch.arange(60) % 3) < 0.25
        True
    """
    curves = utility_curves(embeddings, labels, far=far, num_thresholds=num_thresholds)
    return utility_variance(curves.utility, worst)
