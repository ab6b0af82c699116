r"""AdamP and SGDP: Adam and SGD whose updates do not lengthen scale-invariant weights.

A weight followed by a normalisation layer may be scaled without any effect, and momentum scales it up, step by step,
until nothing moves any more. The two rules take the radial part out of the update of every weight that looks scale
invariant. Drop-in for Adam and for SGD with momentum in networks with batch, layer or weight normalisation.

$$
\theta \leftarrow \theta - \eta\, q, \qquad
q = \begin{cases}
    u - (\hat\theta \cdot u)\,\hat\theta & \text{if } |\cos(\theta, \nabla_\theta L)| < \delta / \sqrt{\dim \theta} \\
    u & \text{otherwise}
\end{cases}, \qquad \hat\theta = \theta / \lVert \theta \rVert_2
$$

with $u$ the update of Adam or of SGD with momentum.

Reference: Byeongho Heo, Sanghyuk Chun, Seong Joon Oh, Dongyoon Han, Sangdoo Yun, Gyuwan Kim, Youngjung Uh, Jung-Woo Ha,
"AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", ICLR 2021, arXiv 2006.08217.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.arguments import tensor_problem
from trimtab.optim.rule import Hyper, Params, RuleOptimizer, State, step_counter

_BOUNDS: Mapping[str, tuple[float, float]] = {
    **RuleOptimizer.bounds,
    "delta": (0.0, math.inf),
    "wd_ratio": (0.0, math.inf),
    "dampening": (0.0, 1.0),
}


def radial_coefficient(
    p: Float[Tensor, "channels ..."],
    grad: Float[Tensor, "channels ..."],
    update: Float[Tensor, "channels ..."],
    delta: float | Tensor = 0.1,
    eps: float | Tensor = 1e-8,
) -> tuple[Float[Tensor, "channels ..."], Bool[Tensor, ""]]:
    r"""How much of a weight is in its update, where the weight looks scale invariant (Section 3).

    Each output channel is taken as a vector of its own if all of them are nearly orthogonal to their gradients, that
    is $|\cos| < \delta / \sqrt{n}$ with $n$ entries in a channel; else the whole tensor is, if it is; else nothing.

    Args:
        p: a weight of at least two dimensions, of which the first counts output channels.
        grad: its gradient, which decides.
        update: the update to be projected.
        delta: how nearly orthogonal a gradient must be, at least 0; 0 never projects.
        eps: floor of the norms in the cosine, added to the norm that divides.

    Returns:
        A coefficient a channel, such that `update - coefficient * p` is the projected update, zero if there is nothing
        to take out; and whether there is.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `p` has fewer than two dimensions, the shapes disagree, or `delta` or `eps`, given as a number, is
            out of range.

    Example:
        >>> p, grad = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])
        >>> coefficient, fires = radial_coefficient(p, grad, torch.ones(2, 2))
        >>> torch.ones(2, 2) - coefficient * p  # channel by channel, nothing along p is left
        tensor([[0., 1.],
                [1., 0.]])
    """
    if problem := tensor_problem(p=p, grad=grad, update=update):
        raise TypeError(problem)
    if p.ndim < 2:
        raise ValueError(f"p must have at least two dimensions, got shape {tuple(p.shape)}")
    for name, x in (("grad", grad), ("update", update)):
        if x.shape != p.shape:
            raise ValueError(f"{name} must have shape {tuple(p.shape)} as p, got {tuple(x.shape)}")
    if not isinstance(delta, Tensor) and not 0 <= delta < math.inf:
        raise ValueError(f"delta must be at least 0 and finite, got {delta}")
    if not isinstance(eps, Tensor) and not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    rest = tuple(range(1, p.ndim))
    inner, slope, square, radial = (
        x.sum(rest, keepdim=True) for x in (grad * p, grad.square(), p.square(), update * p)
    )

    def orthogonal(inner: Tensor, slope: Tensor, square: Tensor, size: int) -> Tensor:
        lengths = slope.sqrt().clamp(min=eps) * square.sqrt().clamp(min=eps)
        return (inner.abs() < lengths * (delta / math.sqrt(max(size, 1)))).all()

    by_channel = orthogonal(inner, slope, square, math.prod(p.shape[1:]))
    fires = by_channel | orthogonal(inner.sum(), slope.sum(), square.sum(), p.numel())
    square, radial = (torch.where(by_channel, x, x.sum()) for x in (square, radial))
    return torch.where(fires, radial / (square.sqrt() + eps).square(), 0.0), fires


class AdamP(RuleOptimizer):
    """Adam with decoupled weight decay, whose updates leave the length of scale-invariant weights alone (Algorithm 2).

    Where the projection acts, weight decay acts `wd_ratio` times as strongly. Biases and other vectors get Adam's
    update. As in the authors' release, two views are tested, each output channel and the whole tensor.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, at least 0.
        betas: decay rates of the mean gradient and of the mean square, each in [0, 1).
        eps: added to the root of the second moment and to norms, at least 0.
        weight_decay: strength of the decoupled weight decay, at least 0.
        delta: a weight counts as scale invariant if the cosine between it and its gradient is below `delta` over the
            root of its size; at least 0.
        wd_ratio: weight decay of scale-invariant weights relative to that of others, at least 0.
        nesterov: look one gradient ahead.
        fused: compile the update; see `RuleOptimizer`.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = AdamP([weight], lr=0.1)
        >>> torch.nn.functional.cosine_similarity(weight, torch.tensor([[1.0, 0.0]])).sum().backward()
        >>> optimizer.step()
        >>> weight.norm().item()  # a right-angled step: 5 grows by the hypotenuse alone
        5.001...
    """

    bounds: ClassVar[Mapping[str, tuple[float, float]]] = _BOUNDS

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        fused: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": bool(nesterov),
        }
        super().__init__(params, defaults, fused=fused, maximize=maximize)

    @staticmethod
    def init_state(p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> State:
        return {"step": step_counter(), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @staticmethod
    def coefficients(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        return {
            "nesterov": group["nesterov"],
            "take1": 1 - beta1,
            "take2": 1 - beta2,
            "root": 1 / math.sqrt(1 - beta2**step),
            "eps": group["eps"],
            "delta": group["delta"],
            "step_size": lr / (1 - beta1**step),
            **_decay(group, lr * group["weight_decay"]),
        }

    @staticmethod
    def update(p: Tensor, grad: Tensor, state: State, hyper: Hyper) -> None:
        mean = state["exp_avg"].lerp_(grad, hyper["take1"])
        square = state["exp_avg_sq"].lerp_(grad.square(), hyper["take2"])

        def direction() -> Tensor:
            ahead = mean.lerp(grad, hyper["take1"]) if hyper["nesterov"] else mean
            taken: Tensor = ahead / (square.sqrt() * hyper["root"] + hyper["eps"])
            return taken

        # Asked twice, for a compiler does not keep it in memory then, but works it out where it is used.
        p.mul_(_scale(p, grad, direction(), hyper)).sub_(direction() * hyper["step_size"])


class SGDP(RuleOptimizer):
    """SGD with momentum, whose updates leave the length of scale-invariant weights alone (Algorithm 1).

    As in the authors' release, weight decay is decoupled and divided by `1 - momentum`, which makes it as strong as
    that of `torch.optim.SGD`, and the buffer starts at zero, so that `dampening` counts from the first step on. As in
    the paper, and unlike in that release without `nesterov`, the buffer itself is not projected.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate, at least 0.
        momentum: decay rate of the summed gradient, in [0, 1).
        dampening: share of each gradient that is left out of the sum, in [0, 1).
        weight_decay: strength of the weight decay, at least 0.
        nesterov: look one gradient ahead.
        eps: added to norms, at least 0.
        delta: a weight counts as scale invariant if the cosine between it and its gradient is below `delta` over the
            root of its size; at least 0.
        wd_ratio: weight decay of scale-invariant weights relative to that of others, at least 0.
        fused: compile the update; see `RuleOptimizer`.
        maximize: ascend instead of descend.

    Raises:
        ValueError: a hyper-parameter is out of its range.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0]]))
        >>> optimizer = SGDP([weight], lr=0.1, momentum=0.9)
        >>> for gradient in ([[0.0, 1.0]], [[0.1, 1.0]]):  # both orthogonal to the weight, the momentum is not
        ...     weight.grad = torch.tensor(gradient)
        ...     before = weight.detach().clone()
        ...     optimizer.step()
        >>> abs(((weight - before) * before).sum().item()) < 1e-8
        True
    """

    bounds: ClassVar[Mapping[str, tuple[float, float]]] = _BOUNDS

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        fused: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": bool(nesterov),
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
        }
        super().__init__(params, defaults, fused=fused, maximize=maximize)

    @staticmethod
    def init_state(p: Tensor, grad: Tensor, group: Mapping[str, Any]) -> State:
        return {"momentum_buffer": torch.zeros_like(p)}

    @staticmethod
    def coefficients(group: Mapping[str, Any], step: int) -> dict[str, float | bool]:
        lr, momentum = float(group["lr"]), group["momentum"]
        return {
            "nesterov": group["nesterov"],
            "momentum": momentum,
            "take": 1 - group["dampening"],
            "eps": group["eps"],
            "delta": group["delta"],
            "step_size": lr,
            **_decay(group, lr * group["weight_decay"] / (1 - momentum)),
        }

    @staticmethod
    def update(p: Tensor, grad: Tensor, state: State, hyper: Hyper) -> None:
        buffer = state["momentum_buffer"].mul_(hyper["momentum"]).add_(grad * hyper["take"])

        def direction() -> Tensor:
            return grad + buffer * hyper["momentum"] if hyper["nesterov"] else buffer

        p.mul_(_scale(p, grad, direction(), hyper)).sub_(direction() * hyper["step_size"])


def _decay(group: Mapping[str, Any], decay: float) -> dict[str, float | bool]:
    return {"keep": 1 - decay, "spare": decay * (1 - group["wd_ratio"])}


def _scale(p: Tensor, grad: Tensor, direction: Tensor, hyper: Hyper) -> float | Tensor:
    """What a weight is multiplied by before the update as it stands: weight decay, and its own part in the update."""
    keep: float | Tensor = hyper["keep"]
    if p.ndim < 2:
        return keep
    coefficient, fires = radial_coefficient(p, grad, direction, hyper["delta"], hyper["eps"])
    scale: Tensor = coefficient * hyper["step_size"] + fires.to(p.dtype) * hyper["spare"] + keep
    # A view of itself that only what stands in memory has: a compiler works the scale out once a channel, not an entry,
    # and moves a weight right after its sums, while the weight is still in the cache.
    return scale.as_strided(scale.shape, scale.stride()) if torch.compiler.is_compiling() else scale
