r"""Contrastive regulariser for imbalanced regression: keeps features of rare labels from collapsing into common ones.

For a regression target with a long tail, whose rare range is predicted badly. Beside the regression loss it pulls
together the features of samples with close labels, and pushes apart those that the network predicts alike although
their labels differ, the harder the farther the labels are apart.

$$
\mathcal{L} = \frac1n \sum_i w_i \mathcal{L}_i, \qquad
\mathcal{L}_i = -\frac{1}{|P_i|} \sum_{j \in P_i} \log
\frac{e^{s_{ij}}}{\sum_{p \in P_i} e^{s_{ip}} + \sum_{q \in N_i} S_{iq}\, e^{s_{iq}}}, \qquad
S_{iq} = w_i\, e^{\epsilon \lVert y_i - y_q \rVert}
$$

with cosines over a temperature $s_{ij} = \cos(z_i, z_j) / \tau$, positives
$P_i = \{ j \neq i : \lVert y_i - y_j \rVert \le \omega \}$ and negatives
$N_i = \{ j : \lVert y_i - y_j \rVert > \omega,\ \lVert \hat y_i - \hat y_j \rVert \le \omega \}$. Anchors that lack
positives or negatives count as zero.

Reference: Keramati, Meng, Evans, "ConR: Contrastive Regularizer for Deep Imbalanced Regression", ICLR 2024,
arXiv 2309.06651.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.losses.checks import Reduction, check_reduction, reduce
from trimtab.ops.arguments import assured, floating_tensor, looked_at, non_negative, one_of, positive, tensor_problem
from trimtab.ops.pairwise import pairwise_cosine

Push = Literal["exp", "linear"]
Denominator = Literal["paper", "source"]


def conr_loss(
    features: Float[Tensor, "batch dim"],
    targets: Float[Tensor, "batch *labels"],
    preds: Float[Tensor, "batch *labels"],
    weights: Float[Tensor, " batch"] | None = None,
    *,
    window: float = 1.0,
    temperature: float = 0.07,
    eps: float = 0.01,
    push: Push = "exp",
    denominator: Denominator = "paper",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The regulariser of a batch, which should hold two augmented views of each sample.

    Args:
        features: from the layer before the regression head; only they get a gradient. Their length does not matter.
        targets: labels, shape `(batch,)` or `(batch, labels)`; distances of several labels are Euclidean.
        preds: predictions, of the shape of `targets`; constants, which only choose the negatives.
        weights: weight of each sample, at least 0, such as its label's inverse frequency; 1 if None. A weight enters
            twice, in front of the sample's term and in the push of its negatives.
        window: the largest distance at which labels, or predictions, count as close, in the labels' unit.
        temperature: of the similarities.
        eps: growth of the push with the distance of the labels; positive where `push` is "linear", else at least 0.
        push: "exp" for $w e^{\epsilon d}$; "linear" for $w \epsilon d$, which the authors use for depth maps.
        denominator: "paper" sums over positives and negatives; "source", as in the authors' code, adds 1 for each
            sample of the batch that is no positive, the anchor itself included.
        reduction: "none", "mean" or "sum" over the batch, anchors without a term included.

    Raises:
        TypeError: if `features` is not floating point.
        ValueError: if shapes do not fit, the batch is empty, a label is not finite, a weight is negative or not
            finite, or an option is out of range.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> targets, preds = torch.tensor([20.0, 20.0, 60.0]), torch.tensor([21.0, 21.0, 21.0])
        >>> conr_loss(features, targets, preds, temperature=1.0, eps=0.0, reduction="none")  # log(1 + exp(-1))
        tensor([0.3133, 0.3133, 0.0000])
    """
    _check_options(window, temperature, eps, push, denominator, reduction)
    features, targets, preds, weights = _checked_batch(features, targets, preds, weights)
    label_gap, pred_gap = _distances(targets), _distances(preds)
    if looked_at(label_gap) and not label_gap.isfinite().all():
        raise ValueError(f"targets must have distances that fit {targets.dtype}, got larger ones")
    near = label_gap <= window
    positive = near & ~torch.eye(len(near), dtype=torch.bool, device=near.device)
    negative = ~near & (pred_gap <= window)
    positives = positive.sum(1)
    counted = (positives > 0) & negative.any(1)

    log_push = eps * label_gap if push == "exp" else (eps * label_gap).log()
    log_strength = torch.where(negative, log_push + weights.log()[:, None], -torch.inf).masked_fill(positive, 0)
    # A row without any term would have no gradient but NaN.
    log_strength = log_strength.masked_fill(~counted[:, None], 0)

    similarity = pairwise_cosine(features) / temperature
    log_sum = (similarity + log_strength).logsumexp(1)
    if denominator == "source":
        log_sum = log_sum.logaddexp((len(near) - positives).to(log_sum.dtype).log())
    attraction = (similarity * (positive / positives.clamp_min(1)[:, None])).sum(1)
    return reduce(torch.where(counted, weights * (log_sum - attraction), 0), reduction)


class ConRLoss(nn.Module):
    """The contrastive regulariser, called as `loss(features, targets, preds, weights=None)`.

    Add it to the regression loss, times a strength of your choice (the authors use 4 for ages beside an L1 loss), on
    batches that hold two augmented views of each sample. Time and memory grow with the square of the batch. See
    `conr_loss` for the arguments.

    Args:
        window: the largest distance at which labels, or predictions, count as close, in the labels' unit: 1 year for
            ages; a target that was divided by something needs a window divided by it too.
        temperature: of the similarities.
        eps: growth of the push with the distance of the labels.
        push: "exp" or "linear".
        denominator: "paper" or "source".
        reduction: "none", "mean" or "sum" over the batch.

    Raises:
        ValueError: if an option is out of range or unknown.

    Example:
        >>> features = torch.randn(8, 16, requires_grad=True)
        >>> head, targets = nn.Linear(16, 1), torch.tensor([20.0, 21.0, 45.0, 70.0]).repeat(2)
        >>> preds = head(features)[:, 0]
        >>> loss = nn.functional.l1_loss(preds, targets) + 4 * ConRLoss(window=1.0)(features, targets, preds)
        >>> loss.backward()
    """

    def __init__(
        self,
        *,
        window: float = 1.0,
        temperature: float = 0.07,
        eps: float = 0.01,
        push: Push = "exp",
        denominator: Denominator = "paper",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_options(window, temperature, eps, push, denominator, reduction)
        self.window = window
        self.temperature = temperature
        self.eps = eps
        self.push: Push = push
        self.denominator: Denominator = denominator
        self.reduction: Reduction = reduction

    def forward(
        self,
        features: Float[Tensor, "batch dim"],
        targets: Float[Tensor, "batch *labels"],
        preds: Float[Tensor, "batch *labels"],
        weights: Float[Tensor, " batch"] | None = None,
    ) -> Tensor:
        """The regulariser of a batch; see `conr_loss`.

        Raises:
            TypeError: if `features` is not floating point.
            ValueError: if shapes do not fit, the batch is empty, a label is not finite, or a weight negative.
        """
        return conr_loss(
            features,
            targets,
            preds,
            weights,
            window=self.window,
            temperature=self.temperature,
            eps=self.eps,
            push=self.push,
            denominator=self.denominator,
            reduction=self.reduction,
        )


def _distances(values: Float[Tensor, "batch *labels"]) -> Float[Tensor, "batch batch"]:
    # Not by a matrix product, whose rounding would move labels across the window's edge.
    rows = values.reshape(len(values), -1)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def _checked_batch(
    features: Tensor, targets: Tensor, preds: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments in one floating-point type of at least 32 bits, all but the features as constants."""
    features = floating_tensor("features", features)
    for name, value in (("targets", targets), ("preds", preds), ("weights", weights)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if problem := tensor_problem(targets=targets, preds=preds, weights=weights):
        raise TypeError(problem)
    if features.ndim != 2:
        raise ValueError(f"features must be (batch, dim), got shape {tuple(features.shape)}")
    batch = len(features)
    if batch == 0:
        raise ValueError("features must hold at least one sample, got an empty batch")
    if targets.ndim not in (1, 2) or len(targets) != batch:
        raise ValueError(f"targets must be ({batch},) or ({batch}, labels), got shape {tuple(targets.shape)}")
    if preds.shape != targets.shape:
        raise ValueError(f"preds must be of shape {tuple(targets.shape)} as targets, got {tuple(preds.shape)}")
    if weights is not None and weights.shape != (batch,):
        raise ValueError(f"weights must be ({batch},), one per sample, got shape {tuple(weights.shape)}")
    assured(targets.isfinite(), "targets must be finite, got NaN or infinity")
    if weights is None:
        weights = features.new_ones(batch)
    else:
        assured((weights >= 0) & weights.isfinite(), "weights must be at least 0 and finite, got others")
    targets, preds, weights = (constant.detach().to(features.dtype) for constant in (targets, preds, weights))
    return features, targets, preds, weights


def _check_options(window: float, temperature: float, eps: float, push: str, denominator: str, reduction: str) -> None:
    positive("window", window)
    positive("temperature", temperature)
    one_of("push", push, get_args(Push))
    (positive if push == "linear" else non_negative)("eps", eps)
    one_of("denominator", denominator, get_args(Denominator))
    check_reduction(reduction)
