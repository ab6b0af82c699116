"""What a sampler tells the user after each of its steps, and what it may be told in return."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

StepCallback = Callable[[int, float, Tensor], Tensor | None]
"""Called after a step with its number, the time reached and the sample; what it returns, if anything, replaces it."""


def after_step(callback: StepCallback | None, step: int, time: float, x: Tensor) -> Tensor:
    """The sample to go on from after a step.

    Raises:
        ValueError: if the callback returns a tensor of another shape.

    Example:
        >>> import torch
        >>> after_step(lambda step, time, x: x.clamp(max=1.0), 0, 0.5, torch.tensor([[3.0, 0.5]]))
        tensor([[1.0000, 0.5000]])
    """
    if callback is None or (replaced := callback(step, time, x)) is None:
        return x
    if replaced.shape != x.shape:
        raise ValueError(f"callback must return None or the shape of x, {tuple(x.shape)}, got {tuple(replaced.shape)}")
    return replaced
