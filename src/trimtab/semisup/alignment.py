r"""Distribution alignment: corrects predictions on unlabelled data so that their mean is the classes' true frequency.

A network that learns from its own predictions soon prefers some classes. Alignment divides each prediction by what the
network predicts on average, multiplies by what it should predict, and renormalises:

$$
\tilde p_c \propto p_c \, \frac{\pi_c}{\bar p_c},
$$

with $\pi$ the frequency of the classes (uniform unless given) and $\bar p$ a running mean: an exponential one, that of
the batches before this (SimMatchV2), or the mean of the last few batches, this one included (CoMatch, ShrinkMatch).

Reference: David Berthelot, Nicholas Carlini, Ekin D. Cubuk, Alex Kurakin, Kihyuk Sohn, Han Zhang and Colin Raffel,
"ReMixMatch: Semi-Supervised Learning with Distribution Alignment and Augmentation Anchoring", ICLR 2020, arXiv
1911.09785.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import floating_tensor, in_range, integer, looked_at
from trimtab.ops.whole_state import WholeState


def align_distribution(
    probs: Float[Tensor, "batch classes"],
    marginal: Float[Tensor, " classes"],
    target: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "batch classes"]:
    """Predictions of which the mean is moved from `marginal` to `target`.

    Args:
        probs: predictions, each with sum 1.
        marginal: what is predicted on average, above 0.
        target: frequency of the classes; None for equal ones.

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit, or `marginal` is not above 0 everywhere.

    Example:
        >>> align_distribution(torch.tensor([[0.5, 0.5]]), torch.tensor([0.8, 0.2]))
        tensor([[0.2000, 0.8000]])
    """
    probs = _predictions(probs)
    for name, value in (("marginal", marginal), ("target", target)):
        if value is not None and value.shape != probs.shape[1:]:
            raise ValueError(f"{name} must be one number per class ({probs.shape[1]}), got shape {tuple(value.shape)}")
    if not isinstance(marginal, Tensor) or not marginal.is_floating_point():
        raise TypeError(f"marginal must be a floating-point tensor, got {type(marginal).__name__}")
    if looked_at(marginal) and (marginal <= 0).any():
        raise ValueError("marginal must be above 0, got others")
    odds = probs / marginal.to(probs) if target is None else probs * (target / marginal).to(probs)
    return odds / odds.sum(1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)


class DistributionAlignment(WholeState, nn.Module):
    """Aligns predictions by an exponential mean of the batches before; in training mode it then takes in this one.

    What it gives is a constant for the gradient. With `torch.distributed` initialised, a batch is that of all ranks. A
    batch whose mean is not finite is not taken in. In eval mode the mean stays as it is.

    Args:
        num_classes: number of classes.
        momentum: share of the mean that stays, in [0, 1].
        target: frequency of the classes, positive; None for equal ones.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> align = DistributionAlignment(2)
        >>> align(torch.tensor([[0.9, 0.1]]))  # at first every class is predicted equally often
        tensor([[0.9000, 0.1000]])
        >>> align.marginal
        tensor([0.5400, 0.4600])
    """

    marginal: Tensor
    target: Tensor

    def __init__(self, num_classes: int, *, momentum: float = 0.9, target: Sequence[float] | None = None) -> None:
        super().__init__()
        integer("num_classes", num_classes, 2)
        self.momentum = in_range("momentum", momentum, 0, 1)
        self.register_buffer("target", _frequencies(target, num_classes))
        self.register_buffer("marginal", torch.full((num_classes,), 1 / num_classes))

    @torch.no_grad()
    def forward(self, probs: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """The aligned predictions.

        Raises:
            TypeError: if `probs` is not floating point.
            ValueError: if it is not `(batch, num_classes)`, or empty.
        """
        probs = _predictions(probs, len(self.target))
        aligned = align_distribution(probs, self.marginal, self.target)
        if self.training:
            mean = _mean_of_all(probs).to(self.marginal)
            moved = self.marginal.lerp(mean, 1 - self.momentum)
            self.marginal.copy_(torch.where(mean.isfinite().all(), moved, self.marginal))
        return aligned


class QueueDistributionAlignment(WholeState, nn.Module):
    """Aligns predictions by the mean of the last few batches, the present one included.

    Otherwise as `DistributionAlignment`; in eval mode the present batch is not taken in, and before the first batch
    nothing is changed.

    Args:
        num_classes: number of classes.
        length: how many batches are remembered.
        target: frequency of the classes, positive; None for equal ones.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> align = QueueDistributionAlignment(2)
        >>> align(torch.tensor([[0.9, 0.1], [0.7, 0.3]])).mean(0).round(decimals=2)
        tensor([0.5300, 0.4700])
    """

    queue: Tensor
    seen: Tensor
    target: Tensor

    def __init__(self, num_classes: int, *, length: int = 32, target: Sequence[float] | None = None) -> None:
        super().__init__()
        integer("num_classes", num_classes, 2)
        self.register_buffer("target", _frequencies(target, num_classes))
        self.register_buffer("queue", torch.zeros(integer("length", length), num_classes))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, probs: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """The aligned predictions.

        Raises:
            TypeError: if `probs` is not floating point.
            ValueError: if it is not `(batch, num_classes)`, or empty.
        """
        probs = _predictions(probs, len(self.target))
        length = len(self.queue)
        if self.training:
            mean = _mean_of_all(probs).to(self.queue)
            taken = mean.isfinite().all()
            at = (self.seen % length).view(1)
            self.queue.index_copy_(0, at, torch.where(taken, mean, self.queue.index_select(0, at)[0])[None])
            self.seen.add_(taken.long())
        filled = self.seen.clamp_max(length)
        mean = self.queue.sum(0) / filled.clamp_min(1)
        # A class that was never predicted, not even by a rounding error, is left where it is.
        marginal = torch.where((filled > 0) & (mean > 0), mean, self.target)
        return align_distribution(probs, marginal, self.target)


def _predictions(probs: Tensor, num_classes: int | None = None) -> Tensor:
    probs = floating_tensor("probs", probs)
    if probs.ndim != 2 or len(probs) == 0 or num_classes not in (None, probs.shape[1]):
        wanted = f"(batch, {num_classes or 'classes'}) with at least one sample"
        raise ValueError(f"probs must be {wanted}, got shape {tuple(probs.shape)}")
    return probs


def _frequencies(target: Sequence[float] | None, num_classes: int) -> Tensor:
    if target is None:
        return torch.full((num_classes,), 1 / num_classes)
    found = torch.as_tensor(target, dtype=torch.float32)
    if found.shape != (num_classes,) or not bool((found > 0).all()) or not bool(found.isfinite().all()):
        raise ValueError(f"target must be {num_classes} positive numbers, got {target}")
    return found / found.sum()


def _mean_of_all(probs: Tensor) -> Tensor:
    """The mean over the batches of all ranks, of any sizes."""
    total = torch.cat([probs.sum(0), probs.new_tensor([float(len(probs))])])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total[:-1] / total[-1]
