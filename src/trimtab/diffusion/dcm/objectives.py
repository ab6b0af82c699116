"""The pieces of the losses, as plain functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from trimtab.diffusion.schedules import per_sample
from trimtab.ops.arguments import integer, looked_at, positive, real_problem, same_shape

Velocity = Callable[..., Tensor]
"""A network called `(x, t, cond)` with times in [0, 1], 1 is noise; it predicts noise minus data."""


def shifted_levels(steps: int = 50, shift: float = 17.0) -> Float64[Tensor, " steps+1"]:
    """Noise levels from 0 to 1 that lie the more densely at high noise, the larger the shift: k u / (1 + (k - 1) u).

    Example:
        >>> shifted_levels(4, shift=3.0)
        tensor([0.0000, 0.5000, 0.7500, 0.9000, 1.0000], dtype=torch.float64)
    """
    positive("shift", shift)
    u = torch.arange(integer("steps", steps) + 1, dtype=torch.float64) / steps
    return shift * u / (1 + (shift - 1) * u)


def phase_jump(
    x: Float[Tensor, "batch ..."], velocity: Float[Tensor, "batch ..."], level: Tensor, end: Tensor | float
) -> Float[Tensor, "batch ..."]:
    """Where a straight path leads, from a noise level to the end of a phase: x + (end - level) velocity.

    Args:
        x: states at `level`.
        velocity: of the path, noise minus data.
        level: noise levels, one per sample.
        end: where the jump ends, one number or one per sample.

    Raises:
        TypeError: an argument is a NumPy array or complex.
        ValueError: `end` is not finite.

    Example:
        >>> data, noise = torch.tensor([[2.0]]), torch.tensor([[-1.0]])
        >>> x = 0.8 * noise + 0.2 * data
        >>> phase_jump(x, noise - data, torch.tensor([0.8]), 0.0)
        tensor([[2.]])
    """
    if problem := real_problem(x=x, velocity=velocity, level=level, end=end):
        raise TypeError(problem)
    if not isinstance(end, Tensor) and not math.isfinite(end):
        raise ValueError(f"end must be finite, got {end}")
    return x + per_sample(end - level, x) * velocity


def consistency_pair(
    student: Velocity,
    target: Velocity,
    teacher: Velocity,
    x0: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    index: Int[Tensor, " batch"],
    levels: Float[Tensor, " steps+1"],
    end: float,
    cond: Any = None,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
    """What should be one: the student's jump to the end of its phase, and the target's from one step of the teacher on.

    Args:
        student: the network in training.
        target: its moving average, or itself; without gradient.
        teacher: the flow model, guided or not; without gradient.
        x0: clean samples.
        noise: standard normal, of the shape of `x0`.
        index: place of each sample's level among `levels`, at least 1.
        levels: rising noise levels.
        end: the phase's end, at most the level below.
        cond: the condition.

    Returns:
        The estimate, and the target, which is without gradient.

    Raises:
        TypeError: `index` is no tensor of integers.
        ValueError: `noise` has not the shape of `x0`, or `index` is not one per sample, of a level that has one below.
    """
    same_shape("noise", noise, "x0", x0)
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    if index.is_floating_point():
        raise TypeError(f"index must be integers, got {index.dtype}")
    if index.shape != x0.shape[:1]:
        raise ValueError(f"index must have shape ({len(x0)},), one per sample, got {tuple(index.shape)}")
    if looked_at(index) and not bool(((index >= 1) & (index < len(levels))).all()):
        raise ValueError(f"index must be in [1, {len(levels)}), got from {int(index.min())} to {int(index.max())}")
    level, below = levels[index].to(x0), levels[index - 1].to(x0)
    x = per_sample(level, x0) * noise + per_sample(1 - level, x0) * x0
    estimate = phase_jump(x, student(x, level, cond), level, end)
    with torch.no_grad():
        lower = phase_jump(x, teacher(x, level, cond), level, below)
        wanted = phase_jump(lower, target(lower, below, cond), below, end)
    return estimate, wanted


def huber(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """The mean over all numbers of sqrt((a - b)^2 + c^2) - c."""
    square = (a - b).square()
    mean: Tensor = (square / ((square + c**2).sqrt() + c)).mean()
    return mean


def temporal_coherence_loss(pred: Tensor, target: Tensor, lag: int = 3, dim: int = 2) -> Tensor:
    """The squared error of differences between frames `lag` apart, a mean over all numbers.

    What both have in common in every frame, and an offset that is the same in all, costs nothing.

    Args:
        pred, target: videos of one shape.
        lag: distance in frames; the authors' 3 are latent frames.
        dim: the dimension of the frames; 2 in `(batch, channels, frames, height, width)`.

    Raises:
        TypeError: `pred` or `target` is a NumPy array or complex, or `lag` or `dim` no integer.
        ValueError: shapes differ, or there are no frames `lag` apart.

    Example:
        >>> still = torch.zeros(1, 1, 4, 2, 2)
        >>> temporal_coherence_loss(still + 5, still)
        tensor(0.)
    """
    if problem := real_problem(pred=pred, target=target):
        raise TypeError(problem)
    same_shape("pred", pred, "target", target)
    integer("lag", lag)
    if not isinstance(dim, int | Integral):
        raise TypeError(f"dim must be an integer, got {dim}")
    if pred.ndim <= dim or (frames := pred.shape[dim]) <= lag:
        raise ValueError(f"pred must have more than {lag} frames in dimension {dim}, got shape {tuple(pred.shape)}")

    def change(video: Tensor) -> Tensor:
        return video.narrow(dim, lag, frames - lag) - video.narrow(dim, 0, frames - lag)

    return torch.nn.functional.mse_loss(change(pred), change(target))


def renoise(
    y: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."], level: Float[Tensor, " batch"], end: float
) -> Float[Tensor, "batch ..."]:
    """A sample at the end of a phase with the noise of a higher level: ((1 - a) y + (a - e) noise) / (1 - e).

    Raises:
        TypeError: a tensor is complex, or a NumPy array.
        ValueError: `end` is outside [0, 1).

    Example:
        >>> y, noise = torch.ones(2, 1), torch.zeros(2, 1)
        >>> renoise(y, noise, torch.tensor([0.2, 0.6]), end=0.2)
        tensor([[1.0000],
                [0.5000]])
    """
    if problem := real_problem(y=y, noise=noise, level=level):
        raise TypeError(problem)
    if not 0 <= end < 1:
        raise ValueError(f"end must be in [0, 1), got {end}")
    a = per_sample(level, y)
    return ((1 - a) * y + (a - end) * noise) / (1 - end)
