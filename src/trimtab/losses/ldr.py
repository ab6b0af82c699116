r"""Label-distributionally robust losses: cross-entropy under the worst weighting of the labels, with a KL penalty.

The strength of the penalty is the softmax's temperature. LDR-KL interpolates between the Crammer-Singer hinge
(`lam` to 0), cross-entropy (`lam` = 1 without margin) and a linear, symmetric loss (`lam` to infinity); ALDR-KL finds
a temperature for each sample. They suit noisy labels where the right temperature is not known.

$$
d_k = f_k - f_y + c\,[k \neq y], \qquad
\mathcal{L}_\lambda = \max_{p \in \Delta} \sum_k p_k d_k - \lambda\, \mathrm{KL}(p \,\|\, \tfrac1K)
= \lambda \log \frac{1}{K} \sum_k e^{d_k / \lambda}
$$

$$
\mathcal{L}_\mathrm{ALDR} = \max_{\lambda_i}\; \mathcal{L}_{\lambda_i}
- \frac{\alpha \log K}{2 \lambda_0} (\lambda_i - \lambda_0)^2, \qquad
\lambda_i \leftarrow \lambda_0 - \frac{\lambda_0}{\alpha \log K}\,
\mathrm{KL}\bigl(\mathrm{softmax}(f / \lambda_i) \,\|\, \tfrac1K\bigr)
$$

with one step of the fixed-point iteration per visit of a sample. A sample of which the network is unsure keeps the
large temperature $\lambda_0$, at which a wrong label pulls little.

Reference: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification: Consistency,
Robustness and Adaptivity", ICML 2023, arXiv 2112.14869.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.losses.checks import Reduction, check_reduction, checked_logits, reduce
from trimtab.ops.arguments import integer, non_negative, number, one_of, positive, real_problem, tensor_problem
from trimtab.ops.sample_memory import Repeats, SampleMemory
from trimtab.ops.whole_state import WholeState

Normalisation = Literal["softplus", "l1"]


def ldr_kl(
    scores: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    *,
    lam: float | Float[Tensor, " batch"] = 1.0,
    margin: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""LDR-KL, $\lambda \log \frac1K \sum_k \exp(d_k / \lambda)$, computed as a cross-entropy.

    Args:
        scores: scores of the classes, as they are.
        targets: labels, int64.
        lam: temperature, positive; one number, or one per sample, whose values are not looked at.
        margin: by how much the label's score must exceed the others, `c`, at least 0.
        reduction: "none", "mean" or "sum" over the batch.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes do not fit, the batch is empty, or `lam`, `margin` or `reduction` is out of range.

    Example:
        >>> import torch
        >>> ldr_kl(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1]), margin=0.0)  # cross-entropy - log(3)
        tensor(0.3090)
    """
    if problem := real_problem(scores=scores):
        raise TypeError(problem)
    scores = checked_logits(scores, targets)
    _check_temperature(lam, targets)
    non_negative("margin", margin)
    temperature = lam[:, None] if isinstance(lam, Tensor) else lam
    handicap = (-margin / temperature) * scores.new_ones(len(targets), 1)
    handicapped = (scores / temperature).scatter_add_(1, targets[:, None], handicap)
    fit = F.cross_entropy(handicapped, targets, reduction="none")
    return reduce(lam * (fit - math.log(scores.shape[1])), reduction)


def aldr_temperature(
    scores: Float[Tensor, "batch classes"], lam: Float[Tensor, " batch"], *, lam_0: float = 10.0, alpha: float = 2.0
) -> Float[Tensor, " batch"]:
    r"""One step of the temperatures' fixed-point iteration, without gradient.

    The predictions are those of the scores alone; the label and its margin do not enter.

    Args:
        scores: scores of the classes.
        lam: present temperatures, positive. One of zero, as in a memory that was never filled, counts as the least
            that its type can divide by, so that the result is finite.
        lam_0: largest temperature, positive.
        alpha: strength of the penalty on leaving `lam_0`, above 1.

    Returns:
        New temperatures, in $[\lambda_0 (1 - 1/\alpha), \lambda_0]$.

    Raises:
        TypeError: if `scores` or `lam` is not floating point.
        ValueError: if the shapes do not fit, or `lam_0` or `alpha` is out of range.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.0, 0.0], [1e4, 0.0]])
        >>> aldr_temperature(scores, torch.ones(2))
        tensor([10.,  5.])
    """
    if problem := tensor_problem(scores=scores):
        raise TypeError(problem)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores must be (batch, classes) with two classes at least, got shape {tuple(scores.shape)}")
    _check_temperature(lam, scores[:, 0])
    positive("lam_0", lam_0)
    _check_alpha(alpha)
    # Less their largest, which softmax does not see, so that no quotient is plus infinity.
    centred = scores.detach() - scores.detach().amax(1, keepdim=True)
    finest = torch.finfo(centred.dtype)
    log_probs = (centred / lam[:, None].clamp(min=finest.tiny)).clamp(min=finest.min / 4).log_softmax(1)
    log_k = math.log(scores.shape[1])
    divergence = log_k + (log_probs.exp() * log_probs).sum(1)
    # Rounding may take the divergence a little outside [0, log K].
    return lam_0 - lam_0 / (alpha * log_k) * divergence.clamp(0, log_k)


def normalised_scores(
    scores: Float[Tensor, "batch classes"], normalize: Normalisation | None
) -> Float[Tensor, "batch classes"]:
    """Scores on a common scale, without which a temperature would mean little.

    Args:
        scores: scores of the classes.
        normalize: "softplus" divides `softplus(scores)` by its mean over the classes, "l1" the scores by their mean
            absolute value; None leaves them as they are.
    """
    if normalize is None:
        return scores
    scores = F.softplus(scores) if normalize == "softplus" else scores
    size = scores if normalize == "softplus" else scores.abs()
    # A product, for the gradient of a quotient costs three more passes over the scores.
    return scores * size.mean(1, keepdim=True).clamp_min(1e-6).reciprocal()


class LDRKL(nn.Module):
    """The LDR-KL loss with one temperature for all samples.

    Args:
        lam: temperature, positive; the authors choose among 0.1, 1 and 10.
        margin: by how much the label's score must exceed the others.
        normalize: how scores are brought to a common scale, see `normalised_scores`.
        reduction: "none", "mean" or "sum" over the batch.

    Raises:
        ValueError: if `lam` is not positive, `margin` is negative, or `normalize` or `reduction` is unknown.

    Example:
        >>> import torch
        >>> loss = LDRKL(lam=1.0, margin=0.0, normalize=None)
        >>> loss(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor(0.)
    """

    def __init__(
        self,
        *,
        lam: float = 1.0,
        margin: float = 0.1,
        normalize: Normalisation | None = "softplus",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.lam = positive("lam", lam)
        self.margin = non_negative("margin", margin)
        self.normalize: Normalisation | None = one_of("normalize", normalize, (*get_args(Normalisation), None))
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"]) -> Tensor:
        """The loss of a batch.

        Raises:
            TypeError: if `logits` is not floating point or `targets` not int64.
            ValueError: if shapes do not fit or the batch is empty.
        """
        scores = normalised_scores(checked_logits(logits, targets), self.normalize)
        return ldr_kl(scores, targets, lam=self.lam, margin=self.margin, reduction=self.reduction)


class ALDRKL(WholeState, nn.Module):
    """The adaptive LDR-KL loss, with a temperature per sample, called as `loss(logits, targets, index)`.

    A sample's temperature is updated before it is used, once per visit, and only in training mode.

    Args:
        num_samples: size of the training set.
        num_classes: number of classes.
        lam: largest temperature and starting value, positive; the authors choose among 0.1, 1 and 10.
        alpha: strength of the penalty on leaving it, above 1: temperatures stay in `[lam (1 - 1/alpha), lam]`.
        margin: by how much the label's score must exceed the others.
        normalize: how scores are brought to a common scale, see `normalised_scores`.
        reduction: "none", "mean" or "sum" over the batch.
        repeats: what to do with a sample that comes more than once in a batch, see `SampleMemory`: "refuse", or "mean"
            for samplers with replacement and padded distributed batches.

    Attributes:
        memory: the temperatures, `memory.rows` of shape `(num_samples,)`; it takes only finite ones.

    Raises:
        ValueError: if a size or `lam` is not positive, there are fewer than two classes, `alpha` is not above 1,
            `margin` is negative, a number is not finite, or `normalize`, `reduction` or `repeats` is unknown.

    Example:
        >>> import torch
        >>> loss = ALDRKL(num_samples=100, num_classes=2)
        >>> value = loss(torch.tensor([[3.0, -1.0]]), torch.tensor([0]), index=torch.tensor([42]))
        >>> loss.memory.rows[42] < 10
        tensor(True)
    """

    def __init__(
        self,
        num_samples: int,
        num_classes: int,
        *,
        lam: float = 10.0,
        alpha: float = 2.0,
        margin: float = 0.1,
        normalize: Normalisation | None = "l1",
        reduction: Reduction = "mean",
        repeats: Repeats = "refuse",
    ) -> None:
        super().__init__()
        self.lam = positive("lam", lam)
        self.margin = non_negative("margin", margin)
        self.normalize: Normalisation | None = one_of("normalize", normalize, (*get_args(Normalisation), None))
        check_reduction(reduction)
        self.num_classes = integer("num_classes", num_classes, 2)
        _check_alpha(alpha)
        self.alpha = float(alpha)
        self.memory = SampleMemory(num_samples, init=self.lam, repeats=repeats)
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Float[Tensor, "batch classes"], targets: Int[Tensor, " batch"], index: Int[Tensor, " batch"]
    ) -> Tensor:
        """The loss of a batch; in training mode the samples' temperatures move.

        Args:
            logits: scores of the classes.
            targets: labels.
            index: the samples' positions in the training set.

        Raises:
            TypeError: if a dtype is wrong (`logits` floating point, `targets` and `index` int64).
            ValueError: if shapes do not fit, the batch is empty, a label or an index is out of range, or an index is
                repeated where that is refused.
        """
        logits = checked_logits(logits, targets, index=index, num_classes=self.num_classes)
        scores = normalised_scores(logits, self.normalize)
        temperatures = self.memory.update(
            index, lambda lam: aldr_temperature(scores, lam, lam_0=self.lam, alpha=self.alpha)
        )
        penalty = self.alpha * math.log(self.num_classes) / (2 * self.lam) * (temperatures - self.lam).square()
        fit = ldr_kl(scores, targets, lam=temperatures, margin=self.margin, reduction="none")
        return reduce(fit - penalty, self.reduction)


def _check_temperature(lam: float | Tensor, rows: Tensor) -> None:
    if not isinstance(lam, Tensor):
        positive("lam", lam)
    elif not lam.is_floating_point():
        raise TypeError(f"lam must be floating point, got {lam.dtype}")
    elif lam.shape != rows.shape:
        raise ValueError(f"lam must be a number or one per sample, {tuple(rows.shape)}, got shape {tuple(lam.shape)}")


def _check_alpha(alpha: float) -> None:
    if not number("alpha", alpha) > 1:
        raise ValueError(f"alpha must be above 1, or temperatures could reach zero, got {alpha}")
