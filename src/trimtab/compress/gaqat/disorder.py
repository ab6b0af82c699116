"""How often the signs of gradients change over a window of training steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, real_problem, tensor_problem
from trimtab.ops.states import fits


def gradient_disorder(gradients: Float[Tensor, "steps n"]) -> Float[Tensor, " n"]:
    """Share of successive steps at which a gradient's sign changes; a zero leaves the sign as it was.

    Args:
        gradients: of each step, at least two, in order.

    Raises:
        ValueError: there are fewer than two steps.

    Example:
        >>> gradient_disorder(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0]]))
        tensor([0.5000, 1.0000])
    """
    if problem := tensor_problem(gradients=gradients):
        raise TypeError(problem)
    if gradients.dim() != 2 or len(gradients) < 2:
        raise ValueError(f"gradients must be of at least two steps, got shape {tuple(gradients.shape)}")
    disorder = GradientDisorder(gradients.shape[1], len(gradients)).to(gradients.device)
    for gradient in gradients:
        disorder.update(gradient)
    return disorder.value()


class GradientDisorder(nn.Module):
    """Counts the changes of sign of some gradients over a window, see `gradient_disorder`; its state are buffers.

    Args:
        count: how many gradients there are, each a number.
        window: number of steps, at least 2.

    Attributes:
        steps: how many of the present window are done.

    Example:
        >>> disorder = GradientDisorder(1, window=3)
        >>> for gradient in (2.0, -1.0, -3.0):
        ...     disorder.update(torch.tensor([gradient]))
        >>> disorder.full, disorder.value()
        (True, tensor([0.5000]))
    """

    sign: Tensor
    flips: Tensor
    done: Tensor

    def __init__(self, count: int, window: int) -> None:
        super().__init__()
        self.window = integer("window", window, 2)
        self.register_buffer("sign", torch.zeros(integer("count", count)))
        self.register_buffer("flips", torch.zeros(count))
        self.register_buffer("done", torch.tensor(0))
        self.steps = 0

    def update(self, gradients: Float[Tensor, " count"]) -> None:
        """Takes the gradients of one step.

        Raises:
            ValueError: they are of another number.
        """
        if problem := real_problem(gradients=gradients):
            raise TypeError(problem)
        if gradients.shape != self.sign.shape:
            raise ValueError(f"gradients must have shape {tuple(self.sign.shape)}, got {tuple(gradients.shape)}")
        new = gradients.detach().sign().to(self.sign)
        if self.steps:  # across the border of two windows no change is counted
            self.flips += (new * self.sign < 0).to(self.flips)
            self.sign.copy_(torch.where(new == 0, self.sign, new))
        else:
            self.sign.copy_(new)
        self.steps += 1
        self.done.fill_(self.steps)

    @property
    def full(self) -> bool:
        """Whether the window is complete."""
        return self.steps >= self.window

    def value(self) -> Float[Tensor, " count"]:
        """The disorder of the steps so far.

        Raises:
            ValueError: there were fewer than two.
        """
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2 before there is a disorder, got {self.steps}")
        return self.flips / (self.steps - 1)

    def reset(self) -> None:
        """Begins a new window."""
        self.flips.zero_()
        self.sign.zero_()
        self.done.zero_()
        self.steps = 0

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: the state is of another number of gradients.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of as many gradients, got other names or shapes")
        found = super().load_state_dict(state_dict, strict, assign)
        self.steps = int(self.done)
        return found
