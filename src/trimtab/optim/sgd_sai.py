r"""SGD-SaI: SGD with momentum and one constant learning-rate multiplier per tensor, measured at its first gradient.

For transformers, where plain SGD lags behind Adam, at half of AdamW's optimizer memory.

$$
G_i = \frac{\lVert g_i^{(1)} \rVert_2}{\operatorname{std}(g_i^{(1)}) + \epsilon}, \qquad
m_t = \mu m_{t-1} + (1-\mu) g_t, \qquad
\theta_t = (1 - \alpha\lambda)\,\theta_{t-1} - \alpha\, G_i\, m_t
$$

Reference: Minghao Xu, Lichuan Xiang, Xu Cai, Hongkai Wen, "No More Adam: Learning Rate Scaling at Initialization
is All You Need", 2024, arXiv 2412.11768.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import tensor_problem
from trimtab.optim.rule import Hyper, Params, RuleOptimizer, State


def gradient_snr(grad: Float[Tensor, "..."], eps: float = 1e-8, scalar_gsnr: float = 1.0) -> Float[Tensor, ""]:
    """Signal-to-noise ratio of one tensor's gradient: its norm over the standard deviation of its entries.

    Args:
        grad: a gradient of any shape.
        eps: added to the standard deviation.
        scalar_gsnr: the ratio where the entries do not vary (a single entry, or all equal), and none is defined.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `eps` or `scalar_gsnr` is negative or not finite.

    Example:
        >>> round(gradient_snr(torch.tensor([3.0, 4.0, 0.0, 0.0])).item(), 4)
        2.4254
    """
    if problem := tensor_problem(grad=grad):
        raise TypeError(problem)
    if not all(isinstance(value, Tensor) or 0 <= value < math.inf for value in (eps, scalar_gsnr)):
        raise ValueError(f"eps and scalar_gsnr must be at least 0 and finite, got {eps} and {scalar_gsnr}")
    fallback = torch.as_tensor(scalar_gsnr, dtype=grad.dtype, device=grad.device)
    if grad.numel() < 2:
        return fallback
    deviation = grad.std()
    return torch.where(deviation > 0, grad.norm() / (deviation + eps), fallback)


class SGDSaI(RuleOptimizer):
    """SGD with learning rates scaled at initialisation (Algorithm 1).

    The ratio of a tensor is measured once, at the first gradient the optimizer sees of it (after unscaling and
    averaging over ranks, if any), and is part of the state. State: one buffer per parameter and one number per tensor.

    Two departures from the authors' release: a tensor with a single entry or a constant gradient has no deviation,
    and takes `scalar_gsnr` instead of a ratio of 1/eps; a tensor whose gradient comes later is measured then. Later
    versions of the release divide all ratios by the largest one, which the paper does not: it rescales `lr`.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, at least 0.
        momentum: decay rate of the mean gradient, in [0, 1); the mean starts at the first gradient.
        eps: added to the standard deviation, at least 0.
        weight_decay: strength of the decoupled weight decay, at least 0.
        scalar_gsnr: ratio of a tensor that has no deviation, at least 0.
        fused: compile the update; see `RuleOptimizer`.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = SGDSaI([("weight", weight)], lr=0.1)
        >>> weight.grad = torch.tensor([3.0, 4.0, 0.0, 0.0])
        >>> optimizer.step()
        >>> {name: round(ratio, 4) for name, ratio in optimizer.gsnr().items()}
        {'weight': 2.4254}
    """

    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {**RuleOptimizer.bounds, "scalar_gsnr": (0.0, math.inf)}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        scalar_gsnr: float = 1.0,
        fused: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "eps": eps,
            "weight_decay": weight_decay,
            "scalar_gsnr": scalar_gsnr,
        }
        super().__init__(params, defaults, fused=fused, maximize=maximize)

    @staticmethod
    def init_state(p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> State:
        return {"momentum_buffer": grad.clone(), "gsnr": gradient_snr(grad, group["eps"], group["scalar_gsnr"])}

    @staticmethod
    def coefficients(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        lr = float(group["lr"])
        return {"lr": lr, "keep": 1 - lr * group["weight_decay"], "take": 1 - group["momentum"]}

    @staticmethod
    def update(p: Tensor, grad: Tensor, state: State, hyper: Hyper) -> None:
        mean = state["momentum_buffer"].lerp_(grad, hyper["take"])
        p.mul_(hyper["keep"]).sub_(mean * (state["gsnr"] * hyper["lr"]))

    def gsnr(self) -> dict[str | int, float]:
        """The ratios measured so far, by parameter name where the optimizer was given names, else by position."""
        ratios: dict[str | int, float] = {}
        position = 0
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if "gsnr" in self.state.get(p, {}):
                    ratios[group["param_names"][i] if "param_names" in group else position] = float(
                        self.state[p]["gsnr"]
                    )
                position += 1
        return ratios
