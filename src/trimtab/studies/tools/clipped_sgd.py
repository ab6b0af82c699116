"""SGD with clipped gradients, for losses whose gradient has no bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class ClippedSGD(torch.optim.SGD):
    """SGD on gradients whose common norm is cut to `max_norm`.

    Args:
        params: parameters.
        lr: learning rate.
        max_norm: largest norm of all gradients together.
        momentum: momentum.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.05, max_norm: float = 1.0, momentum: float = 0.9
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        self.max_norm = max_norm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clips, then steps."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.max_norm)
        super().step()
        return value
