r"""Weight compander: weights are a bounded curve of the trained numbers, steep at zero and flat at the bound.

No weight can grow beyond the bound, and weights near zero move faster than the numbers they are made of. A small
regulariser for networks that overfit, beside weight decay and dropout.

$$
w = \psi(v) = a \arctan\frac{v}{b}, \qquad |w| < \frac{\pi}{2} a, \qquad
\psi'(v) = \frac{a / b}{1 + (v / b)^2}
$$

The curve and the default bound and slope are our reading of the paper's abstract, not its own formula: the abstract
asks for a bounded elementwise function that expands near zero and whose hyper-parameters can be learned.

Reference: Rinor Cakaj, Jens Mehnert, Bin Yang, "Weight Compander: A Simple Weight Reparameterization for
Regularization", IJCNN 2023, arXiv 2306.16993.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.ops.arguments import looked_at, non_negative, one_of, positive, real_problem, tensor_problem

_WITHIN = 0.999  # of the bound: beyond it the latent weight, a tangent, is too large to train


def compand(
    latent: Float[Tensor, "..."], a: float | Float[Tensor, ""], b: float | Float[Tensor, ""]
) -> Float[Tensor, "..."]:
    """The weights: a arctan(latent / b).

    Args:
        latent: the trained numbers.
        a: 2/pi of the bound; positive.
        b: the slope at zero is a/b; positive.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `a` or `b`, given as a number, is not positive and finite.

    Example:
        >>> compand(torch.tensor([0.0, 1.0, -1e9]), a=1.0, b=1.0)
        tensor([ 0.0000,  0.7854, -1.5708])
    """
    if problem := tensor_problem(latent=latent):
        raise TypeError(problem)
    _check_curve(a, b)
    return a * (latent / b).atan()


def inverse_compand(
    weight: Float[Tensor, "..."], a: float | Float[Tensor, ""], b: float | Float[Tensor, ""]
) -> Float[Tensor, "..."]:
    """The latent weights, the inverse of `compand`: b tan(weight / a), for weights within the bound.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `a` or `b`, given as a number, is not positive and finite or, on the CPU, a weight is not within
            such a bound.

    Example:
        >>> inverse_compand(compand(torch.tensor([0.5]), a=1.0, b=2.0), a=1.0, b=2.0)
        tensor([0.5000])
    """
    if problem := tensor_problem(weight=weight):
        raise TypeError(problem)
    _check_curve(a, b)
    if not isinstance(a, Tensor) and looked_at(weight) and not (weight.abs() < a * math.pi / 2).all():
        raise ValueError(f"weight must be within the bound {a * math.pi / 2:g}, got {float(weight.abs().max()):g}")
    return b * (weight / a).tan()


def _check_curve(a: float | Tensor, b: float | Tensor) -> None:
    # Tensors are a module's own, exponentials of what is trained; looking at them would make an accelerator wait.
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            positive(name, value)


class WeightCompander(nn.Module):
    """`compand` as a parametrization for `torch.nn.utils.parametrize`.

    Weights that are assigned are taken back through the inverse, so that registering it leaves a network as it is.
    Half-precision weights are companded in float32.

    Args:
        a: 2/pi of the bound; positive.
        b: the slope at zero is a/b; positive.
        learnable: train a and b, through their logarithms, without weight decay on them (`compander_param_groups`).

    Raises:
        ValueError: `a` or `b` is not positive and finite.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> before = layer.weight.detach().clone()
        >>> layer = parametrize.register_parametrization(layer, "weight", WeightCompander(a=0.5, b=0.4))
        >>> torch.allclose(layer.weight, before)
        True
    """

    def __init__(self, a: float, b: float, *, learnable: bool = False) -> None:
        super().__init__()
        for name, value in (("a", a), ("b", b)):
            log = torch.tensor(math.log(positive(name, value)))
            if learnable:
                self.register_parameter(f"log_{name}", nn.Parameter(log))
            else:
                self.register_buffer(f"log_{name}", log)

    log_a: Tensor
    log_b: Tensor

    @property
    def a(self) -> Float[Tensor, ""]:
        """2/pi of the bound."""
        return self.log_a.exp()

    @property
    def b(self) -> Float[Tensor, ""]:
        """The slope at zero is a/b."""
        return self.log_b.exp()

    def forward(self, latent: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The weights."""
        return compand(_at_least_single(latent), self.a, self.b).to(latent.dtype)

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The latent weights.

        Raises:
            ValueError: a weight is not finite, or not within 0.999 of the bound.
        """
        if problem := real_problem(weight=weight):
            raise TypeError(problem)
        largest, bound = weight.abs().max().item(), self.a.item() * math.pi / 2
        if not largest <= _WITHIN * bound:
            raise ValueError(f"weight must be within {_WITHIN} of the bound {bound:g}, got {largest:g}")
        return inverse_compand(_at_least_single(weight), self.a, self.b).to(weight.dtype)

    def extra_repr(self) -> str:
        learnable = isinstance(self.log_a, nn.Parameter)
        return f"a={self.a.item():.4g}, b={self.b.item():.4g}, learnable={learnable}"


def _at_least_single(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


def apply_weight_compander(
    module: nn.Module,
    a: float | None = None,
    b: float | None = None,
    *,
    slope: float = 1.5,
    bound: float = 4.0,
    learnable: bool = False,
    init: Literal["inverse", "identity"] = "inverse",
    types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
) -> nn.Module:
    """Make the weights of all layers of some types companded ones, in place; biases stay as they are.

    With `learnable`, make the optimizer afterwards, from `compander_param_groups`.

    Args:
        module: the network, or a layer.
        a: 2/pi of the bound of all layers; by default `bound` standard deviations of the layer's weights, and at
            least a little more than the largest of them.
        b: by default what makes the slope.
        slope: slope at zero, a/b; above 1 expands small weights.
        bound: in standard deviations of the layer's weights.
        learnable: train a and b of every layer.
        init: "inverse" leaves the network's output as it is; "identity" takes the present weights as latent ones,
            so that the network starts with companded weights.
        types: classes of the layers.

    Returns:
        The same module.

    Raises:
        ValueError: a number is not positive, there is no such layer, a layer's weight is parametrized already, shared
            with another module, constant, or beyond the bound that `a` sets; nothing is changed.

    Example:
        >>> net = apply_weight_compander(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
        >>> [name for name, _ in net.named_parameters()]
        ['0.bias', '0.parametrizations.weight.original', '2.bias', '2.parametrizations.weight.original']
    """
    for name, value in (("a", a), ("b", b), ("slope", slope), ("bound", bound)):
        if value is not None:
            positive(name, value)
    one_of("init", init, ("inverse", "identity"))
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, types)}
    if not layers:
        raise ValueError(
            f"module must have a layer of the types {', '.join(kind.__name__ for kind in types)}, got none"
        )
    holders = Counter(id(p) for part in module.modules() for p in part._parameters.values())
    planned = []
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"module must have free weights, got that of layer {name!r}, which is parametrized already"
            )
        weight = cast(Tensor, layer.weight).detach()
        if holders[id(layer.weight)] > 1:
            raise ValueError(f"module must not share weights, got that of layer {name!r} in another module as well")
        compander = _fitted(name, weight, a, b, slope, bound, learnable)
        if init == "inverse":
            try:
                compander.right_inverse(weight)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from error
        planned.append((layer, weight.clone(), compander.to(weight.device)))
    for layer, weight, compander in planned:
        if init == "inverse":
            parametrize.register_parametrization(layer, "weight", compander)
        else:
            with torch.no_grad():
                cast(Tensor, layer.weight).zero_()  # within any bound, as registering asks for
                parametrize.register_parametrization(layer, "weight", compander)
                cast(Any, layer).parametrizations.weight.original.copy_(weight)
    return module


def _fitted(
    name: str, weight: Tensor, a: float | None, b: float | None, slope: float, bound: float, learnable: bool
) -> WeightCompander:
    if a is None:
        deviation, largest = float(weight.std()), weight.abs().max().item()
        a = max(bound * deviation, largest / 0.99) * 2 / math.pi
        if not 0 < deviation < math.inf:
            raise ValueError(
                f"a must be given where a weight has no deviation to set it by, got None for layer {name!r}"
            )
    return WeightCompander(a, a / slope if b is None else b, learnable=learnable)


def remove_weight_compander(module: nn.Module) -> nn.Module:
    """Make all companded weights plain ones again, in place, with the values they have.

    Raises:
        ValueError: no weight is companded, or one has other parametrizations as well; nothing is changed.

    Example:
        >>> net = remove_weight_compander(apply_weight_compander(nn.Sequential(nn.Linear(8, 3))))
        >>> list(net.state_dict())
        ['0.bias', '0.weight']
    """
    found = {}
    for name, layer in module.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            kinds = [type(part) for part in cast(Any, layer).parametrizations.weight]
            if WeightCompander in kinds and len(kinds) > 1:
                raise ValueError(f"module must have no parametrizations beside, got layer {name!r} with more of them")
            if WeightCompander in kinds:
                found[name] = layer
    if not found:
        raise ValueError("module must have a companded weight, got none")
    for layer in found.values():
        # torch takes the weight's property off the layer's class, which a deep copy of the layer has as well.
        own = type(layer)
        layer.__class__ = type(own.__name__, own.__bases__, dict(vars(own)))
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return module


def compander_param_groups(
    module: nn.Module, *, weight_decay: float = 0.0, lr: float | None = None
) -> list[dict[str, Any]]:
    """Two groups for an optimizer: the curves' own parameters, never decayed, and all the others.

    Weight decay on the curves would draw a and b to 1, whatever the layer's scale; on the latent weights it acts as
    the regulariser it is.

    Args:
        module: a network with companded weights.
        weight_decay: of all other parameters; at least 0.
        lr: learning rate of the curves, by default the optimizer's; a curve moves all weights of its layer at once, and
            can diverge at a rate that suits the weights: a tenth of it is a safe start.

    Returns:
        The other parameters first; no second group where the curves are fixed.

    Raises:
        ValueError: `weight_decay` is negative.

    Example:
        >>> net = apply_weight_compander(nn.Linear(8, 3), learnable=True)
        >>> [(len(group["params"]), group["weight_decay"]) for group in compander_param_groups(net, weight_decay=5e-4)]
        [(2, 0.0005), (2, 0.0)]
    """
    weight_decay = non_negative("weight_decay", weight_decay)
    companders = (part for part in module.modules() if isinstance(part, WeightCompander))
    curves = [p for compander in companders for p in compander.parameters()]
    own = {id(p) for p in curves}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in module.parameters() if id(p) not in own], "weight_decay": weight_decay}
    ]
    if curves:
        groups.append({"params": curves, "weight_decay": 0.0} | ({} if lr is None else {"lr": lr}))
    return groups
