r"""Quantised models whose weights are whole numbers: as small on disk as their bits say, with the same outputs.

While a model trains, its quantised weights are floating-point numbers on a grid, and its file is as large as ever.
`pack_quantized` makes a copy whose convolutions and linear layers hold the codes $q$ themselves, one, two or four in a
byte, and the grid. A layer makes its weight anew at each call,

$$
w = s\,(q - z) ,
$$

so that the file is small and what is computed the same. In ONNX the codes are what is stored, and `DequantizeLinear`
makes weights of them. The inputs of layers stay as they were quantised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.compress.eqnet import ElasticQuantizer
from trimtab.compress.fake_quant.grid import TINY, affine_qparams, quant_range
from trimtab.compress.fake_quant.quantizers import LSQWeight, MinMaxWeight
from trimtab.compress.replacing import with_replaced
from trimtab.ops.arguments import finite_tensor, integer

M = TypeVar("M", bound=nn.Module)
Grid = tuple[Tensor, Tensor | None, Tensor | None]
"""Of a weight: step, zero point and offset, each a single number or one for each row."""

_ELASTIC_TINY = 1e-6  # what EQNet's quantiser adds to a step


class PackedWeight(nn.Module):
    """A weight as whole numbers; calling it gives the weight. All of it are buffers, and nothing of it trains.

    Args:
        codes: whole numbers of the format, of the shape of the weight.
        step: of the grid, positive, of shape () or with one for each row, (rows,).
        bits: of the format, which has a sign; at most 8. A byte holds four codes of 2 bits, two of 3 or 4, or one.
        zero_point: a whole number of the format, of the step's shape; 0 by default.
        offset: what is added in the end, of the step's shape; nothing by default.

    Attributes:
        packed: the codes, uint8; counted from the format's least number on.
        shape: of the weight.

    Raises:
        ValueError: a shape does not fit, or a code or a zero point is none of the format.

    Example:
        >>> weight = PackedWeight(torch.tensor([[-2, 1], [0, 1]]), torch.tensor(0.5), bits=2)
        >>> weight(), weight.packed.numel()
        (tensor([[-1.0000,  0.5000],
                [ 0.0000,  0.5000]]), 1)
    """

    packed: Tensor
    step: Tensor
    zero_point: Tensor
    offset: Tensor | None

    def __init__(
        self,
        codes: Shaped[Tensor, "rows ..."],
        step: Float[Tensor, "..."],
        bits: int,
        *,
        zero_point: Tensor | None = None,
        offset: Float[Tensor, "..."] | None = None,
    ) -> None:
        super().__init__()
        smallest, largest = quant_range(integer("bits", bits, 2, 8))
        codes, step = finite_tensor("codes", codes), finite_tensor("step", step, floating=True)
        zero = torch.zeros_like(step) if zero_point is None else finite_tensor("zero_point", zero_point)
        offset = None if offset is None else finite_tensor("offset", offset, floating=True)
        if not codes.dim() or not codes.numel():
            raise ValueError(f"codes must be of a weight that is not empty, got shape {tuple(codes.shape)}")
        for name, value in (("step", step), ("zero_point", zero), ("offset", step if offset is None else offset)):
            if value.shape not in (torch.Size([]), codes.shape[:1]) or value.shape != step.shape:
                raise ValueError(f"{name} must be one number, or one for each row, got shape {tuple(value.shape)}")
        if not (step > 0).all():
            raise ValueError(f"step must be positive, got {step.min():g}")
        for name, value in (("codes", codes), ("zero_point", zero)):
            if (value != value.round()).any() or value.min() < smallest or value.max() > largest:
                raise ValueError(f"{name} must be whole numbers of {bits} bits, got {value.min()} to {value.max()}")
        self.bits, self.shape = bits, codes.shape
        self.width = next(width for width in (2, 4, 8) if width >= bits)
        self.register_buffer("packed", _packed((codes.long() - smallest).flatten(), self.width))
        self.register_buffer("step", step.detach().clone())
        self.register_buffer("zero_point", (zero.detach() - smallest).to(torch.uint8))
        self.register_buffer("offset", None if offset is None else offset.detach().clone())

    def forward(self) -> Float[Tensor, "rows ..."]:
        weight: Tensor = _Dequantize.apply(self.packed, self.step, self.zero_point, self.shape, self.width)  # type: ignore[no-untyped-call]
        return weight if self.offset is None else weight + _by_row(self.offset, len(self.shape))

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, bits={self.bits}"


class PackedLayer(nn.Module):
    """A convolution or a linear layer whose weight is a `PackedWeight`.

    Args:
        layer: of which all but the weight is taken; it is left as it is.
        weight: takes the place of the layer's.
        input_quantizer: acts on what comes in, if there is one.

    Raises:
        TypeError: `layer` is neither a convolution nor linear.
        ValueError: the weight is of another shape than the layer's.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> small = PackedLayer(layer, PackedWeight(torch.tensor([[-2, 1], [0, 1]]), torch.tensor(0.5), bits=2))
        >>> (small(torch.ones(1, 2)) - layer.bias).round(decimals=4)
        tensor([[-0.5000,  0.5000]], grad_fn=<RoundBackward1>)
    """

    def __init__(self, layer: nn.Module, weight: PackedWeight, input_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            raise TypeError(f"layer must be a convolution or linear, got {type(layer).__name__}")
        if layer.weight.shape != weight.shape:
            raise ValueError(f"weight must be of shape {tuple(layer.weight.shape)}, got {tuple(weight.shape)}")
        self.layer = copy.deepcopy(layer)
        self.layer.register_parameter("weight", None)
        self.weight = weight
        self.input_quantizer = input_quantizer

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        weight = self.weight().to(x.dtype)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        found: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return found


@torch.no_grad()
def pack_quantized(model: M) -> M:
    """A copy of a quantised model whose layers hold their weights as whole numbers, for inference.

    Layers that `prepare_quantized` or `prepare_elastic` gave a quantiser of weights become `PackedLayer`s; whatever
    else there is stays. In eval mode the copy's outputs are the model's.

    Args:
        model: trained under `LSQWeight`, `MinMaxWeight` or EQNet's `ElasticQuantizer`; it is left as it is.

    Raises:
        ValueError: no layer has such a quantiser, one has more than 8 bits, or its weight changes after it.

    Example:
        >>> from trimtab.compress import prepare_quantized
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> trained = prepare_quantized(model, torch.randn(5, 64), bits=4, ends=None)
        >>> small = pack_quantized(trained)
        >>> x = torch.randn(3, 64)
        >>> torch.allclose(small(x), trained(x)), sum(b.nbytes for b in small.buffers()) < 3000
        (True, True)
    """
    changes: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        stack = list(cast(nn.ModuleList, cast(nn.ModuleDict, layer.parametrizations)["weight"]))
        places = [n for n, part in enumerate(stack) if type(part) in _GRIDS and getattr(part, "enabled", True)]
        if not places:
            continue
        if places != [len(stack) - 1]:
            raise ValueError(f"model must quantise the weight of {name} once and last, got others after it")
        changes[name] = _packed_layer(name, layer, stack)
    if not changes:
        raise ValueError("model must have layers with quantised weights, got none")
    return with_replaced(model, changes).eval().requires_grad_(False)


def _packed_layer(name: str, layer: nn.Module, stack: list[nn.Module]) -> PackedLayer:
    weight = cast(Tensor, layer.parametrizations["weight"].original)  # type: ignore[index, union-attr]
    for part in stack[:-1]:
        weight = part(weight)
    quantizer = stack[-1]
    bits = cast(int, quantizer.bits)
    if bits > 8:
        raise ValueError(f"model must have weights of at most 8 bits to be packed, got {bits} in {name}")
    step, zero, offset = _GRIDS[type(quantizer)](quantizer, weight)
    shift, origin = (0.0 if value is None else _by_row(value.float(), weight.dim()) for value in (offset, zero))
    codes = ((quantizer(weight).float() - shift) / _by_row(step.float(), weight.dim())).round() + origin
    if len(cast(nn.ModuleDict, layer.parametrizations)) > 1:
        raise ValueError(f"model must have no parametrization but of weights, got another in {name}")
    # Copies share the class that torch made for the layer; to take the parametrization out would break them all.
    plain = copy.deepcopy(layer)
    plain.__class__ = type(layer).__mro__[1]
    del plain._modules["parametrizations"]
    plain.register_parameter("weight", nn.Parameter(weight))
    inputs = plain._modules.pop("input_quantizer", None)
    if inputs is not None:
        plain._forward_pre_hooks.clear()
    return PackedLayer(plain, PackedWeight(codes, step, bits, zero_point=zero, offset=offset), inputs)


def _lsq_grid(quantizer: nn.Module, weight: Tensor) -> Grid:
    step = cast(Tensor, quantizer.step).to(weight).abs() + TINY
    return step.flatten() if step.dim() else step, None, None


def _min_max_grid(quantizer: nn.Module, weight: Tensor) -> Grid:
    rows = weight.flatten(1) if quantizer.per_channel else weight.flatten()[None]
    low, high = rows.aminmax(dim=1)
    step, zero = affine_qparams(low, high, cast(int, quantizer.bits), symmetric=cast(bool, quantizer.symmetric))
    return (step, zero, None) if quantizer.per_channel else (step[0], zero[0], None)


def _elastic_grid(quantizer: nn.Module, weight: Tensor) -> Grid:
    held = cast(ElasticQuantizer, quantizer)
    place, form = held.choices.index(held.bits), int(not held.symmetric)
    found = (held.channel_step, held.channel_offset) if held.per_channel else (held.step, held.offset)
    step, offset = (part[place, form].to(weight) for part in found)
    return step.abs() + _ELASTIC_TINY, None, None if held.symmetric else offset


_GRIDS: dict[type[nn.Module], Callable[[nn.Module, Tensor], Grid]] = {
    LSQWeight: _lsq_grid,
    MinMaxWeight: _min_max_grid,
    ElasticQuantizer: _elastic_grid,
}


def _by_row(value: Tensor, dimensions: int) -> Tensor:
    """What broadcasts along the rows of a weight."""
    return value.view(-1, *[1] * (dimensions - 1)) if value.dim() else value


def _packed(codes: Int[Tensor, " n"], width: int) -> Tensor:
    """Codes from 0 on in bytes: the first of each byte are the first part of all codes, and so on."""
    parts = 8 // width
    padded = F.pad(codes, (0, -len(codes) % parts)).view(parts, -1)
    shifts = width * torch.arange(parts, device=codes.device)
    return (padded << shifts[:, None]).sum(0).to(torch.uint8)


class _Dequantize(torch.autograd.Function):
    """Packed codes -> the weight; in ONNX a graph of operators that the exporter does not compute beforehand."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, step: Tensor, zero_point: Tensor, shape: torch.Size, width: int) -> Tensor:
        parts = [(packed >> (width * part)) & (2**width - 1) for part in range(8 // width)]
        codes = torch.cat(parts)[: shape.numel()].view(shape)
        zero = _by_row(zero_point.to(step), len(shape))
        return (codes.to(step) - zero) * _by_row(step, len(shape))

    @staticmethod
    def symbolic(g: Any, packed: Any, step: Any, zero_point: Any, shape: torch.Size, width: int) -> Any:
        def constant(value: Tensor) -> Any:
            return g.op("Constant", value_t=value)

        def shift(value: Any, by: int, direction: str) -> Any:
            amount = constant(torch.tensor([by], dtype=torch.uint8))
            return g.op("BitShift", value, amount, direction_s=direction) if by else value

        parts = [shift(shift(packed, 8 - width * (part + 1), "LEFT"), 8 - width, "RIGHT") for part in range(8 // width)]
        codes = g.op("Concat", *parts, axis_i=0) if len(parts) > 1 else parts[0]
        if len(parts) > 1:
            ends = [constant(torch.tensor([at])) for at in (0, shape.numel())]
            codes = g.op("Slice", codes, *ends)
        codes = g.op("Reshape", codes, constant(torch.tensor(list(shape))))
        return g.op("DequantizeLinear", codes, step, zero_point, axis_i=0)
