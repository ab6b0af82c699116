r"""Interval arithmetic through a network: what its outputs can be where its inputs lie in a box.

A layer $Wx + b$ takes the box of centre $c$ and radius $r$ to the box of centre $Wc + b$ and radius $|W| r$; a monotone
activation takes its two ends. Layer by layer this bounds the network from both sides, never too narrowly, often far too
widely (interval bound propagation, IBP). `propagate` walks any network that `torch.fx` can trace: sequences, residual
sums, flattenings. All of it is differentiable, so that bounds can be trained.

Reference: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli, "On the Effectiveness of Interval
Bound Propagation for Training Verifiably Robust Models", 2018, arXiv 1810.12715.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, fx, nn

from trimtab.ops.arguments import floating_tensor, integer, looked_at, non_negative, out_of_reach
from trimtab.ops.interval_graphs import VIEW_NAMES, interval_graph

Map = Callable[[Tensor], Tensor]

_LEAST_THRESHOLD = 15.0  # of Softplus, whose jump there is then below the rounding of single precision


@dataclass(frozen=True)
class Interval:
    """A box: all tensors between two others, elementwise.

    Attributes:
        lower, upper: its ends, of equal shape.

    Example:
        >>> box = Interval(torch.tensor([-1.0]), torch.tensor([3.0]))
        >>> box.centre, box.radius
        (tensor([1.]), tensor([2.]))
    """

    lower: Float[Tensor, "batch ..."]
    upper: Float[Tensor, "batch ..."]

    @property
    def centre(self) -> Tensor:
        """The middle of the box."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half of its width."""
        return (self.upper - self.lower) / 2

    def affine(self, move: Map, widen: Map) -> Interval:
        """Through an affine map, given for centres and, with absolute weights and no bias, for radii."""
        centre, radius = move(self.centre), widen(self.radius)
        return Interval(centre - radius, centre + radius)

    def monotone(self, f: Map, slope: Map | None = None) -> Interval:
        """Through a function that never falls."""
        return Interval(f(self.lower), f(self.upper))

    def rearrange(self, f: Map) -> Interval:
        """Through a change of shape, or of places."""
        return Interval(f(self.lower), f(self.upper))

    def join(self, f: Callable[[list[Tensor]], Tensor], *others: Interval) -> Interval:
        """Put together with others by a function of a list of tensors that never falls in any."""
        parts = (self, *others)
        return Interval(f([part.lower for part in parts]), f([part.upper for part in parts]))


@dataclass(frozen=True)
class Linearised:
    """A point and the radius of a box around it, walked through the network's linearisation at that point.

    Attributes:
        centre: the point, as the network sees it.
        radius: half of the box's width, where every activation is taken for its tangent.
        activations: False leaves all activations out, which makes the network one linear map.
    """

    centre: Float[Tensor, "batch ..."]
    radius: Float[Tensor, "batch ..."]
    activations: bool = True

    def affine(self, move: Map, widen: Map) -> Linearised:
        """Through an affine map; see `Interval.affine`."""
        return replace(self, centre=move(self.centre), radius=widen(self.radius))

    def monotone(self, f: Map, slope: Map | None = None) -> Linearised:
        """Through the tangent of an activation, given its slope at the centre."""
        if not self.activations:
            return self
        if slope is None:
            raise NotImplementedError("the linearisation knows ReLU and LeakyReLU, got another activation")
        steepness = slope(self.centre.detach())
        # Not f(centre): its gradient at a kink would be another than the slope that the radius is given.
        return replace(self, centre=self.centre * steepness, radius=self.radius * steepness)

    def rearrange(self, f: Map) -> Linearised:
        """Through a change of shape, or of places."""
        return replace(self, centre=f(self.centre), radius=f(self.radius))

    def join(self, f: Callable[[list[Tensor]], Tensor], *others: Linearised) -> Linearised:
        """Put together with others, by a sum or a concatenation."""
        parts = (self, *others)
        return replace(self, centre=f([part.centre for part in parts]), radius=f([part.radius for part in parts]))


Region = TypeVar("Region", Interval, Linearised)


def box_around(x: Float[Tensor, "batch ..."], eps: float, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Interval:
    """All inputs that differ from `x` by at most `eps` in every element.

    Args:
        x: inputs.
        eps: radius, at least 0.
        bounds: smallest and largest value an input may take; None for any.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `eps` is negative, `bounds` not in order, or `x` farther than `eps` outside of them.

    Example:
        >>> box = box_around(torch.tensor([[0.25, 0.9375]]), 0.125)
        >>> box.lower, box.upper
        (tensor([[0.1250, 0.8125]]), tensor([[0.3750, 1.0000]]))
    """
    non_negative("eps", eps)
    x = floating_tensor("x", x)
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be two numbers, the smaller first, got {bounds}")
    if out_of_reach(x, eps, bounds):
        raise ValueError(f"x must be within bounds {bounds}, got values from {x.min():g} to {x.max():g}")
    lower, upper = x - eps, x + eps
    return Interval(lower, upper) if bounds is None else Interval(lower.clamp(*bounds), upper.clamp(*bounds))


def margin_rows(targets: Int[Tensor, " batch"], num_classes: int) -> Float[Tensor, "batch others classes"]:
    """For each sample the matrix that takes logits to the target's margins over the other classes.

    Args:
        targets: labels in [0, num_classes).
        num_classes: number of classes.

    Returns:
        Rows `e_target - e_k` for all other classes k, in order.

    Raises:
        TypeError: `targets` is not int64, or `num_classes` no integer.
        ValueError: `targets` is no vector, `num_classes` below 2 or, on the CPU, a label out of range.

    Example:
        >>> margin_rows(torch.tensor([1]), 3)
        tensor([[[-1.,  1.,  0.],
                 [ 0.,  1., -1.]]])
    """
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        raise TypeError(f"targets must be an int64 tensor (class indices), got {type(targets).__name__}")
    if targets.ndim != 1 or integer("num_classes", num_classes, 2) < 2:
        raise ValueError(f"targets must be (batch,), got shape {tuple(targets.shape)}")
    if looked_at(targets) and not ((targets >= 0) & (targets < num_classes)).all():
        raise ValueError(f"targets must be in [0, {num_classes}), got {targets}")
    classes = torch.arange(num_classes, device=targets.device)
    others = classes.expand(len(targets), -1)[classes != targets[:, None]].view(len(targets), num_classes - 1)
    return F.one_hot(targets, num_classes)[:, None].float() - F.one_hot(others, num_classes).float()


def propagate(module: nn.Module, region: Region, spec: Float[Tensor, "*batch rows outputs"] | None = None) -> Region:
    """What a network makes of a box, layer by layer.

    Known are linear and convolution layers, batch normalisation and dropout in eval mode, average and max pooling,
    monotone activations, flattening and reshaping, sums, differences, concatenation and products with numbers.

    What is changed in place, and used again later, is refused. Bounds are those of exact arithmetic; rounding may move
    them by a few units in the last place. Autocast is switched off within: half precision would move them much further.

    Args:
        module: the network, traceable by `torch.fx`.
        region: an `Interval` of inputs, or a point with a radius to be `Linearised`.
        spec: a matrix applied to the outputs, one for all or one a sample, such as `margin_rows`. Where the network
            ends in a linear layer the two are multiplied first, which is tighter than bounding one after the other.

    Returns:
        A region of outputs, of the kind that came.

    Raises:
        NotImplementedError: the network has a layer or a function of another kind, or changes in place what it uses
            again; the message names it.
        ValueError: batch normalisation or dropout is in training mode, an activation's constants make it fall
            somewhere, or `spec` does not fit.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight, -1.0)
        >>> out = propagate(net, Interval(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]])))
        >>> out.lower.item(), out.upper.item()
        (-3.0, 0.0)
    """
    with torch.autocast(next(iter(vars(region).values())).device.type, enabled=False):
        if type(module) in _LAYERS and not isinstance(module, nn.Sequential):
            return _last(module, region, spec)
        graph = interval_graph(module)
        walk = _Walk(module, garbage_collect_values=True, graph=graph)
        walk.spec = spec
        walk.final = next(node for node in graph.nodes if node.op == "output").args[0]
        out: Region = walk.run(region)
        return out if walk.spec is None else _specified(out, walk.spec)


def _specified(region: Region, spec: Tensor) -> Region:
    return region.affine(lambda c: _rows_times(spec, c), lambda r: _rows_times(spec.abs(), r))


def _rows_times(spec: Tensor, x: Tensor) -> Tensor:
    """Matrix times vector for each sample."""
    product: Tensor = (spec.to(x.dtype) @ x[..., None])[..., 0]
    return product


def _last(module: nn.Module, region: Region, spec: Tensor | None) -> Region:
    """Through a network's last layer and the matrix behind it."""
    if spec is not None and isinstance(module, nn.Linear):
        merged = spec.to(module.weight.dtype) @ module.weight
        offset = 0.0 if module.bias is None else spec.to(module.weight.dtype) @ module.bias
        return region.affine(lambda c: _rows_times(merged, c) + offset, lambda r: _rows_times(merged.abs(), r))
    out: Region = _LAYERS[type(module)](module, region)
    return out if spec is None else _specified(out, spec)


def _linear(layer: nn.Linear, region: Region) -> Region:
    return region.affine(layer, lambda r: F.linear(r, layer.weight.abs()))


def _convolution(layer: Any, region: Region) -> Region:
    # The layer's own padding: what it pads with zeros, or mirrors, has the radius of what is there.
    def widen(radius: Tensor) -> Tensor:
        widened: Tensor = layer._conv_forward(radius, layer.weight.abs(), None)
        return widened

    return region.affine(layer, widen)


def _batch_norm(layer: Any, region: Region) -> Region:
    if layer.training or layer.running_var is None:
        raise ValueError("batch normalisation must be in eval mode, with running statistics, got a layer without")
    scale = (layer.running_var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight.abs()

    def widen(radius: Tensor) -> Tensor:
        widened: Tensor = radius * scale.view(1, -1, *[1] * (radius.ndim - 2))
        return widened

    return region.affine(layer, widen)


def _dropout(layer: Any, region: Region) -> Region:
    if layer.training:
        raise ValueError("dropout must be in eval mode, got a layer in training mode")
    return region


def _average(layer: nn.Module, region: Region) -> Region:
    return region.affine(layer, lambda radius: layer(radius).abs())


def _elu(layer: Any, region: Region) -> Region:
    if layer.alpha < 0:
        raise ValueError(f"alpha must be at least 0 for an activation that never falls, got {layer.alpha}")
    return region.monotone(layer)


def _softplus(layer: Any, region: Region) -> Region:
    # Beyond the threshold it is the identity, down to which it jumps by log(1 + exp(-threshold)) / beta.
    if layer.threshold < _LEAST_THRESHOLD:
        wanted = f"at least {_LEAST_THRESHOLD:g} for an activation that never falls"
        raise ValueError(f"threshold must be {wanted}, got {layer.threshold}")
    return region.monotone(layer)


def _activation(layer: nn.Module, region: Region) -> Region:
    return region.monotone(layer)


def _maximum(layer: nn.Module, region: Region) -> Region:
    if isinstance(region, Linearised):
        raise NotImplementedError(f"the linearisation has no rule for the layer {type(layer).__name__}")
    return region.monotone(layer)


def _relu(layer: nn.Module, region: Region) -> Region:
    return region.monotone(F.relu, lambda v: (v >= 0).to(v.dtype))


def _leaky(layer: Any, region: Region) -> Region:
    slope = float(layer.negative_slope)
    if slope < 0:
        raise ValueError(f"negative_slope must be at least 0 for an activation that never falls, got {slope}")
    return region.monotone(
        lambda v: F.leaky_relu(v, slope), lambda v: torch.where(v >= 0, torch.ones_like(v), torch.full_like(v, slope))
    )


def _rearranged(layer: nn.Module, region: Region) -> Region:
    return region.rearrange(layer)


_LAYERS: dict[type[nn.Module], Callable[[Any, Any], Any]] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), _average),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d), _maximum),
    **dict.fromkeys((nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.ReLU6), _activation),
    nn.Softplus: _softplus,
    nn.ELU: _elu,
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky,
    **dict.fromkeys((nn.Identity, nn.Flatten, nn.Unflatten), _rearranged),
}


_ARITHMETIC = ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "neg")


class _Walk(fx.Interpreter):
    """Runs a network's graph on regions instead of tensors."""

    spec: Tensor | None = None
    final: Any = None

    def run_node(self, n: fx.Node) -> Any:
        if n is self.final and n.op == "call_module" and self.spec is not None:
            args, _ = self.fetch_args_kwargs_from_env(n)
            layer = self.fetch_attr(str(n.target))
            if isinstance(layer, nn.Linear) and len(args) == 1:
                spec, self.spec = self.spec, None
                return _last(layer, args[0], spec)
        return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        rule = _LAYERS.get(type(layer))
        if rule is None:
            raise NotImplementedError(f"interval bounds have no rule for the layer {type(layer).__name__} ({target})")
        return rule(layer, args[0])

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _function(target, getattr(target, "__name__", str(target)), args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _function(None, target, args, kwargs)


def _function(target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    regions = [a for a in args if isinstance(a, Interval | Linearised)]
    if regions and kwargs and name in _ARITHMETIC:
        raise NotImplementedError(f"interval bounds have no rule for the function {name} with {', '.join(kwargs)}")
    if name in ("size", "dim") and regions:
        return getattr(next(iter(vars(regions[0]).values())), name)(*args[1:], **kwargs)
    if name == "getattr" and regions and args[1] == "shape":
        return next(iter(vars(regions[0]).values())).shape
    listed = args[0] if args and isinstance(args[0], list | tuple) else ()
    if any(isinstance(part, Interval | Linearised) for part in listed):
        if name in ("cat", "stack", "concat") and all(isinstance(part, Interval | Linearised) for part in listed):
            first, *others = listed
            return first.join(lambda parts: target(parts, *args[1:], **kwargs), *others)
        raise NotImplementedError(f"interval bounds have no rule for the function {name}")
    if not regions:
        return target(*args, **kwargs) if target is not None else getattr(args[0], name)(*args[1:], **kwargs)
    if len(regions) == 2 and name in ("add", "iadd", "sub", "isub"):
        left: Any = regions[0]
        right: Any = regions[1]
        other = right.affine(torch.neg, lambda r: r) if name in ("sub", "isub") else right
        return left.join(lambda parts: parts[0] + parts[1], other)
    if len(regions) == 1 and name in _ARITHMETIC:
        f = {"neg": operator.neg}.get(name) or getattr(operator, name.removeprefix("i"))
        place = next(k for k, a in enumerate(args) if a is regions[0])
        if not (name in ("truediv", "itruediv") and place):  # a number over a box is no affine map

            def move(v: Tensor) -> Tensor:
                moved: Tensor = f(*(v if k == place else a for k, a in enumerate(args)))
                return moved

            # What an affine map of one element at a time does to a radius: its distance from the image of zero.
            return regions[0].affine(move, lambda r: (move(r) - move(torch.zeros_like(r))).abs())
    if len(regions) == 1 and args[0] is regions[0]:
        if name in ("relu", "relu_"):
            return _relu(nn.Identity(), regions[0])
        if name in VIEW_NAMES:
            rest = args[1:]
            call = (lambda v: target(v, *rest, **kwargs)) if target else (lambda v: getattr(v, name)(*rest, **kwargs))
            return regions[0].rearrange(call)
        if name in ("sigmoid", "tanh", "max_pool2d"):
            call = (lambda v: target(v, *args[1:], **kwargs)) if target else (lambda v: getattr(v, name)())
            return regions[0].monotone(call)
        if name in ("avg_pool2d", "adaptive_avg_pool2d", "mean", "sum"):
            rest = args[1:]
            call = (lambda v: target(v, *rest, **kwargs)) if target else (lambda v: getattr(v, name)(*rest, **kwargs))
            return regions[0].affine(call, call)
    raise NotImplementedError(f"interval bounds have no rule for the function {name}")
