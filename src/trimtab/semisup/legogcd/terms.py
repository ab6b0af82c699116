"""The terms of the loss that compare views, and the one that presses confident predictions of known classes."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.ops.arguments import (
    floating_tensor,
    in_range,
    integer,
    non_negative,
    number,
    positive,
)
from trimtab.ops.whole_state import WholeState


def dual_view_kl(
    first: Float[Tensor, "batch classes"],
    second: Float[Tensor, "batch classes"],
    temperature: float = 0.1,
    *,
    softened: bool = False,
) -> Tensor:
    """Kullback-Leibler divergence of two views' predictions, with gradients through both; the batch's mean.

    Args:
        first, second: cosines with the classes.
        temperature: divides them.
        softened: logarithms of a softmax of the predictions instead, as released; bounded then.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit, or `temperature` is not positive.

    Example:
        >>> same = torch.tensor([[0.3, 0.1]])
        >>> dual_view_kl(same, same).item()
        0.0
    """
    first, second = _scores("first", first), _scores("second", second)
    if first.shape != second.shape:
        raise ValueError(f"second must be of shape {tuple(first.shape)} as first, got shape {tuple(second.shape)}")
    log_p, log_q = ((scores / positive("temperature", temperature)).log_softmax(1) for scores in (first, second))
    p = log_p.exp()
    if softened:
        log_p, log_q = p.log_softmax(1), log_q.exp().log_softmax(1)
    return (p * (log_p - log_q)).sum(1).mean()


def self_distillation(
    first: Float[Tensor, "batch classes"],
    second: Float[Tensor, "batch classes"],
    teacher_temperature: float | Tensor = 0.04,
    temperature: float = 0.1,
) -> Tensor:
    """Cross-entropy of each view with the other one's sharper prediction, a constant; the mean of both directions.

    Args:
        first, second: cosines with the classes.
        teacher_temperature: of the prediction that is the target; a tensor where it changes in compiled code.
        temperature: of the one that learns.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit, or a temperature is not positive.

    Example:
        >>> round(self_distillation(torch.zeros(1, 2), torch.zeros(1, 2)).item(), 4)  # log(2)
        0.6931
    """
    first, second = _scores("first", first), _scores("second", second)
    if first.shape != second.shape:
        raise ValueError(f"second must be of shape {tuple(first.shape)} as first, got shape {tuple(second.shape)}")
    if not isinstance(teacher_temperature, Tensor):
        positive("teacher_temperature", teacher_temperature)
    positive("temperature", temperature)
    total = first.new_zeros(())
    for taught, teacher in ((first, second), (second, first)):
        target = (teacher.detach() / teacher_temperature).softmax(1)
        total = total - (target * (taught / temperature).log_softmax(1)).sum(1).mean() / 2
    return total


class LocalEntropyRegularization(WholeState, nn.Module):
    """Presses the confident predictions of known classes, among unlabelled samples, to be more so.

    The running mean of the predictions, which is a margin, is read before it takes the batch in; in eval mode it stays.

    Args:
        num_known: classes that are labelled; they come first.
        num_classes: all classes.
        threshold: least probability, at temperature 0.1, of a prediction that counts; above 1 none does.
        margin: weight of the logarithm of the running mean.
        temperature: of the entropy.
        momentum: share of the running mean that stays, in [0, 1].

    Attributes:
        mean: running mean of the predictions at temperature 1, (num_classes,).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> ler = LocalEntropyRegularization(num_known=1, num_classes=2)
        >>> sure_and_known, labelled = torch.tensor([[0.9, 0.1]]), torch.tensor([False])
        >>> ler(sure_and_known, labelled).item() > ler(sure_and_known.flip(1), labelled).item()
        True
    """

    mean: Tensor

    def __init__(
        self,
        num_known: int,
        num_classes: int,
        *,
        threshold: float = 0.7,
        margin: float = 0.4,
        temperature: float = 0.05,
        momentum: float = 0.999,
    ) -> None:
        super().__init__()
        self.num_classes = integer("num_classes", num_classes, 2)
        self.num_known = integer("num_known", num_known, 1, num_classes)
        self.threshold = non_negative("threshold", threshold)
        self.margin = number("margin", margin)
        self.temperature = positive("temperature", temperature)
        self.momentum = in_range("momentum", momentum, 0, 1)
        self.register_buffer("mean", torch.full((num_classes,), 1 / num_classes))

    def forward(self, logits: Float[Tensor, "views classes"], labelled: Bool[Tensor, " views"]) -> Tensor:
        """The loss, a mean over all views, whether they count or not.

        Args:
            logits: cosines with the classes.
            labelled: which views are of labelled samples.

        Raises:
            TypeError: if `logits` is not floating point, or `labelled` not boolean.
            ValueError: if shapes do not fit.
        """
        logits = _scores("logits", logits, self.num_classes)
        check_mask("labelled", labelled, len(logits))
        with torch.no_grad():
            sure, guess = (logits / 0.1).softmax(1).max(1)
            counts = (sure >= self.threshold) & (guess < self.num_known) & ~labelled
        scaled = logits / self.temperature
        log_mean = self.mean.clamp_min(torch.finfo(self.mean.dtype).tiny).log().to(scaled)
        entropy = -(scaled.softmax(1) * (scaled + self.margin * log_mean).log_softmax(1)).sum(1)
        if self.training:
            with torch.no_grad():
                now = logits.softmax(1).mean(0).to(self.mean)
                self.mean.copy_(torch.where(now.isfinite().all(), self.mean.lerp(now, 1 - self.momentum), self.mean))
        return (entropy * counts).mean()


def _scores(name: str, value: Tensor, classes: int | None = None) -> Tensor:
    value = floating_tensor(name, value)
    if value.ndim != 2 or len(value) == 0 or classes not in (None, value.shape[1]):
        wanted = f"(batch, {classes or 'classes'}) with at least one sample"
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")
    return value


def check_mask(name: str, value: Tensor, length: int) -> None:
    """Refuses what is no mask of so many samples.

    Raises:
        TypeError: it is not boolean.
        ValueError: it is of another shape.
    """
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        raise TypeError(f"{name} must be a boolean tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != (length,):
        raise ValueError(f"{name} must be ({length},), got shape {tuple(value.shape)}")
