r"""AdaBelief: Adam whose second moment measures how far gradients stray from their own running mean.

A drop-in for Adam: steps are long where gradients agree with their prediction, short where they surprise.

$$
m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad
s_t = \beta_2 s_{t-1} + (1-\beta_2)(g_t - m_t)^2 + \epsilon, \qquad
\theta_t = \theta_{t-1} - \alpha\,\frac{m_t / (1-\beta_1^t)}{\sqrt{s_t / (1-\beta_2^t)} + \epsilon}
$$

Reference: Juntang Zhuang, Tommy Tang, Yifan Ding, Sekhar Tatikonda, Nicha Dvornek, Xenophon Papademetris,
James S. Duncan, "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients", NeurIPS 2020,
arXiv 2010.07468.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.optim.rule import Hyper, Params, RuleOptimizer, State, step_counter


class AdaBelief(RuleOptimizer):
    r"""AdaBelief (Algorithm 2), with the rectified warm-up of the authors' release.

    With `rectify`, the variance of the adaptive rate is corrected as in RAdam: while too few gradients were seen
    ($\rho_t < 5$) the step is that of SGD with momentum, and later it is scaled by the rectification term, with
    the second moment taken as it is. As in the release, the running maximum of `amsgrad` then goes unused.

    The authors take `eps=1e-8, rectify=False` with coupled decay 5e-4 for CNNs on CIFAR, and `eps=1e-16` with
    decoupled decay 1e-2 for transformers and ImageNet.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, at least 0.
        betas: decay rates of the mean and of the squared surprise, each in [0, 1).
        eps: added to the second moment, where it accumulates, and to its root; at least 0.
        weight_decay: strength of the weight decay, at least 0.
        amsgrad: divide by the largest second moment so far.
        decoupled_weight_decay: shrink the weights themselves (AdamW) rather than add to the gradient.
        fixed_decay: shrink by `weight_decay` at each step, whatever the learning rate; only where decoupled.
        rectify: correct the variance of the first steps.
        degenerate_to_sgd: take SGD steps while the correction is undefined; otherwise none are taken.
        fused: compile the update; see `RuleOptimizer`.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = AdaBelief([weight], lr=0.01, rectify=False)
        >>> (weight**2).sum().backward()
        >>> optimizer.step()
        >>> round(3.0 - weight.item(), 5)  # the first step is lr / beta1
        0.01111
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        amsgrad: bool = False,
        decoupled_weight_decay: bool = True,
        fixed_decay: bool = False,
        rectify: bool = True,
        degenerate_to_sgd: bool = True,
        fused: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
            "fixed_decay": fixed_decay,
            "rectify": rectify,
            "degenerate_to_sgd": degenerate_to_sgd,
        }
        super().__init__(params, defaults, fused=fused, maximize=maximize)

    @staticmethod
    def init_state(p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> State:
        state = {"step": step_counter(), "exp_avg": torch.zeros_like(p), "exp_avg_var": torch.zeros_like(p)}
        if group["amsgrad"] and not group["rectify"]:
            state["max_exp_avg_var"] = torch.zeros_like(p)
        return state

    @staticmethod
    def coefficients(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        lr, eps, decay, (beta1, beta2) = float(group["lr"]), group["eps"], group["weight_decay"], group["betas"]
        decoupled, seen = group["decoupled_weight_decay"], 1 - beta2**step
        # The update is step_size * m / (root * sqrt(s) + offset) in every phase.
        step_size, root, offset = lr / (1 - beta1**step), 1 / math.sqrt(seen), eps
        if group["rectify"]:
            longest = 2 / (1 - beta2) - 1
            length = longest - 2 * step * beta2**step / seen
            if length >= 5:
                root = 1.0
                step_size *= math.sqrt(
                    seen * (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
                )
            else:
                root, offset = 0.0, 1.0
                step_size *= group["degenerate_to_sgd"]
        return {
            "keep": 1 - decay * (1.0 if group["fixed_decay"] else lr) if decoupled else 1.0,
            "coupled": 0.0 if decoupled else decay,
            "couples": bool(not decoupled and decay),
            "take1": 1 - beta1,
            "take2": 1 - beta2,
            "eps": eps,
            "step_size": step_size,
            "root": root,
            "offset": offset,
        }

    @staticmethod
    def update(p: Tensor, grad: Tensor, state: State, hyper: Hyper) -> None:
        mean, var = state["exp_avg"], state["exp_avg_var"]
        p.mul_(hyper["keep"])
        if hyper["couples"]:
            grad = grad + p * hyper["coupled"]
        mean.lerp_(grad, hyper["take1"])
        var.lerp_((grad - mean).square(), hyper["take2"]).add_(hyper["eps"])
        if "max_exp_avg_var" in state:
            var = state["max_exp_avg_var"].copy_(torch.maximum(state["max_exp_avg_var"], var))
        p.sub_(mean / (var.sqrt() * hyper["root"] + hyper["offset"]) * hyper["step_size"])
