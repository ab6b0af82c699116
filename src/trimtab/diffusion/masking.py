r"""Schedules of masked diffusion: the probability that a token is not yet masked at time t, from 1 at 0 to 0 at 1.

Each states `alpha(t)`, its inverse `t_of_alpha`, and the rate $-\alpha'(t) / (1 - \alpha(t))$ at which masks appear
relative to how many there are, which is the weight of the training loss in time form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.ops.arguments import positive, real_problem


class MaskingSchedule(ABC):
    """What every schedule offers."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The probability that a token is not masked at time t."""

    @abstractmethod
    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        """The time at which it is this."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """The weight of the loss at time t, minus the slope of alpha over 1 - alpha."""


@dataclass(frozen=True)
class PolynomialMasking(MaskingSchedule):
    r"""$\alpha(t) = 1 - t^k$; the power 1 is the linear schedule.

    Example:
        >>> PolynomialMasking().alpha(torch.tensor([0.0, 0.25, 1.0])).tolist()
        [1.0, 0.75, 0.0]
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        positive("power", self.power)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) ** (1 / self.power)

    def rate(self, t: Tensor) -> Tensor:
        return self.power / t


@dataclass(frozen=True)
class CosineMasking(MaskingSchedule):
    r"""$\alpha(t) = 1 - \cos\bigl(\tfrac{\pi}{2}(1 - t)\bigr)$.

    Example:
        >>> schedule = CosineMasking()
        >>> t = torch.tensor(0.3, dtype=torch.float64)
        >>> round(schedule.t_of_alpha(schedule.alpha(t)).item(), 6)
        0.3
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        if problem := real_problem(alpha=alpha):
            raise TypeError(problem)
        return 1 - 2 / math.pi * torch.acos(1 - alpha)

    def rate(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))
