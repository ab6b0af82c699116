r"""Quantisers that training can pass through: values on a grid, gradients as if they were not.

What the quantisation methods of this area share. Weights are quantised by parametrizations (`LSQWeight`,
`MinMaxWeight`; `torch.nn.utils.parametrize` bakes them in), the inputs of layers by modules (`LSQActivation`,
`MinMaxActivation`), and `prepare_quantized` puts both into a copy of a model.

$$
\hat x = s\, \bigl( \operatorname{clamp}( \lfloor x / s \rceil + z,\; q_{\min},\; q_{\max} ) - z \bigr)
$$

The step $s$ and the zero point $z$ come from the smallest and the largest value (min-max), or the step is learned
(LSQ, with $z = 0$): its gradient, $\lfloor x / s \rceil - x / s$ inside the range and $q_{\min}$ or $q_{\max}$ outside,
is scaled by $1 / \sqrt{n\, q_{\max}}$.

Reference: Steven K. Esser, Jeffrey L. McKinstry, Deepika Bablani, Rathinakumar Appuswamy, Dharmendra S. Modha,
"Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from trimtab.ops.arguments import floating_tensor, in_range, integer

M = TypeVar("M", bound=nn.Module)
MakeQuantizer = Callable[[Tensor, int], nn.Module]
"""Makes a quantiser from a sample of what it is to quantise, and the number of bits."""
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers whose weights and inputs are quantised."""

_TINY = 1e-8


def round_ste(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Rounds to the nearest whole number, halves to the even one; the gradient passes as if it did not.

    Example:
        >>> x = torch.tensor([0.6, 1.5], requires_grad=True)
        >>> round_ste(x).sum().backward()
        >>> round_ste(x).tolist(), x.grad.tolist()
        ([1.0, 2.0], [1.0, 1.0])
    """
    return x + (x.round() - x).detach()


def grad_scale(x: Float[Tensor, "..."], scale: float) -> Float[Tensor, "..."]:
    """The same value, whose gradient is multiplied by `scale`.

    Example:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> grad_scale(x, 0.25).backward()
        >>> x.grad.item()
        0.25
    """
    return x.detach() + scale * (x - x.detach())


def quant_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """The smallest and the largest whole number of a format.

    Args:
        bits: at least 1, or 2 where there is a sign; at most 24, what float32 holds exactly.
        signed: whether there are negative ones.

    Example:
        >>> quant_range(4), quant_range(4, signed=False)
        ((-8, 7), (0, 15))
    """
    integer("bits", bits, 2 if signed else 1, 24)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def affine_qparams(
    low: Float[Tensor, "..."],
    high: Float[Tensor, "..."],
    bits: int,
    *,
    symmetric: bool = False,
    signed: bool = True,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The step and the zero point with which a range just fits a format; zero is always on the grid.

    Args:
        low, high: the smallest and the largest values; the range is widened to hold zero.
        bits: of the format.
        symmetric: the zero point is 0, and the step is the larger one of what both ends need.
        signed: whether the format has negative numbers.

    Returns:
        The step, and the zero point, a whole number in the tensor's own type.

    Raises:
        ValueError: the shapes differ, or `bits` is out of range.

    Example:
        >>> affine_qparams(torch.tensor(-1.0), torch.tensor(2.0), 2)
        (tensor(1.), tensor(-1.))
        >>> affine_qparams(torch.tensor(-1.0), torch.tensor(2.0), 3, symmetric=True)
        (tensor(0.6667), tensor(0.))
    """
    if low.shape != high.shape:
        raise ValueError(f"high must be of shape {tuple(low.shape)} as low, got {tuple(high.shape)}")
    smallest, largest = quant_range(bits, signed)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        step = high / largest if not signed else torch.maximum(-low, high) / largest
        return step.clamp(min=_TINY), torch.zeros_like(step)
    step = ((high - low) / (largest - smallest)).clamp(min=_TINY)
    return step, (smallest - (low / step).round()).clamp(smallest, largest)


def fake_quantize(
    x: Float[Tensor, "..."],
    step: Float[Tensor, "..."],
    zero_point: Float[Tensor, "..."],
    bits: int,
    *,
    signed: bool = True,
    pass_clipped: bool = False,
) -> Float[Tensor, "..."]:
    """Values on the grid of a format, as floating-point numbers; the gradient is 1 inside the range.

    Args:
        x: what is quantised.
        step, zero_point: of the grid; they broadcast against `x`.
        bits: of the format.
        signed: whether the format has negative numbers.
        pass_clipped: the gradient is 1 outside of the range too, where it is 0 otherwise.

    Example:
        >>> fake_quantize(torch.tensor([-1.2, 0.4, 5.0]), torch.tensor(1.0), torch.tensor(-1.0), 2)
        tensor([-1.,  0.,  2.])
    """
    smallest, largest = quant_range(bits, signed)
    if pass_clipped:
        found = ((x / step).round() + zero_point).clamp(smallest, largest)
        return x + ((found - zero_point) * step - x).detach()
    return (round_ste((x / step + zero_point).clamp(smallest, largest)) - zero_point) * step


def lsq_quantize(
    x: Float[Tensor, "..."], step: Float[Tensor, "..."], bits: int, *, signed: bool = True, scale: float = 1.0
) -> Float[Tensor, "..."]:
    """LSQ: values on a grid whose step takes a gradient.

    Args:
        x: what is quantised.
        step: of the grid; its magnitude counts. It broadcasts against `x`.
        bits: of the format.
        signed: whether the format has negative numbers.
        scale: factor of the step's gradient.

    Example:
        >>> step = torch.tensor(1.0, requires_grad=True)
        >>> lsq_quantize(torch.tensor([0.25, 9.0]), step, 3).sum().backward()
        >>> step.grad.item()  # 0 - 0.25 from inside, 3 from beyond the largest number
        2.75
    """
    smallest, largest = quant_range(bits, signed)
    step = grad_scale(step.abs() + _TINY, scale)
    return round_ste((x / step).clamp(smallest, largest)) * step


def _of_channels(x: Tensor) -> tuple[int, ...]:
    """The shape in which one number a row of a weight broadcasts against it."""
    return (x.shape[0],) + (1,) * (x.dim() - 1)


class LSQWeight(nn.Module):
    """A parametrization that quantises a weight with a learned step.

    Args:
        weight: what will be quantised; the step starts at `2 mean|w| / sqrt(qmax)`.
        bits: of the format, which has a sign.
        per_channel: a step for each row of the weight (output channel).

    Attributes:
        step: the parameter, a single number or one a row.

    Raises:
        TypeError: `weight` is not a floating-point tensor.
        ValueError: `bits` is below 2 or above 24.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(64, 8)
        >>> _ = parametrize.register_parametrization(layer, "weight", LSQWeight(layer.weight, 2))
        >>> len(layer.weight.unique()) <= 4
        True
    """

    def __init__(self, weight: Float[Tensor, "out ..."], bits: int, *, per_channel: bool = False) -> None:
        super().__init__()
        _, largest = quant_range(bits)
        sample = floating_tensor("weight", weight).detach()
        mean = sample.abs().flatten(1).mean(1).view(_of_channels(sample)) if per_channel else sample.abs().mean()
        self.bits, self.per_channel = bits, per_channel
        self.step = nn.Parameter((2 * mean / largest**0.5).clamp(min=_TINY))
        self.scale = (sample.numel() / self.step.numel() * largest) ** -0.5

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        return lsq_quantize(weight, self.step.to(weight), self.bits, scale=self.scale)

    def right_inverse(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """A weight that is assigned is kept as it is, in full precision."""
        return weight


class LSQActivation(nn.Module):
    """Quantises the inputs of a layer with a learned step.

    Args:
        sample: of the inputs, a batch; the step starts at `2 mean|x| / sqrt(qmax)`.
        bits: of the format.
        signed: whether the format has negative numbers; whether the sample has, if None.

    Attributes:
        step: the parameter, a single number.
        enabled: whether it quantises; otherwise it gives back its input.

    Example:
        >>> quantizer = LSQActivation(torch.rand(100), 2)
        >>> quantizer.signed, len(quantizer(torch.rand(50)).unique()) <= 4
        (False, True)
    """

    def __init__(self, sample: Float[Tensor, "batch ..."], bits: int, *, signed: bool | None = None) -> None:
        super().__init__()
        sample = floating_tensor("sample", sample).detach()
        if not sample.numel():
            raise ValueError("sample must not be empty, got no values")
        self.bits, self.signed, self.enabled = bits, bool(sample.min() < 0) if signed is None else signed, True
        _, largest = quant_range(bits, self.signed)
        self.step = nn.Parameter((2 * sample.abs().mean() / largest**0.5).clamp(min=_TINY))
        self.scale = (sample[0].numel() * largest) ** -0.5

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if not self.enabled:
            return x
        return lsq_quantize(x, self.step.to(x), self.bits, signed=self.signed, scale=self.scale)


class MinMaxWeight(nn.Module):
    """A parametrization that quantises a weight between its present extremes, by rounding to the nearest.

    Args:
        weight: what will be quantised.
        bits: of the format, which has a sign.
        per_channel: a range for each row of the weight.
        symmetric: ranges are symmetric about zero.
        pass_clipped: see `fake_quantize`.

    Example:
        >>> weight = torch.tensor([[-1.0, 0.2, 2.0]])
        >>> MinMaxWeight(weight, 2)(weight)
        tensor([[-1.,  0.,  2.]])
    """

    def __init__(
        self,
        weight: Float[Tensor, "out ..."],
        bits: int,
        *,
        per_channel: bool = True,
        symmetric: bool = False,
        pass_clipped: bool = False,
    ) -> None:
        super().__init__()
        quant_range(bits)
        floating_tensor("weight", weight)
        self.bits, self.per_channel, self.symmetric, self.pass_clipped = bits, per_channel, symmetric, pass_clipped

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        held = weight.detach()
        if self.per_channel:
            low, high = (end.view(_of_channels(held)) for end in held.flatten(1).aminmax(dim=1))
        else:
            low, high = held.aminmax()
        qparams = affine_qparams(low, high, self.bits, symmetric=self.symmetric)
        return fake_quantize(weight, *qparams, self.bits, pass_clipped=self.pass_clipped)

    def right_inverse(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """A weight that is assigned is kept as it is, in full precision."""
        return weight


class MinMaxActivation(nn.Module):
    """Quantises the inputs of a layer between extremes that it has seen.

    Args:
        sample: of the inputs, a batch, which gives the first extremes.
        bits: of the format.
        momentum: weight of a batch in the moving averages of the extremes, while `observing`.
        pass_clipped: see `fake_quantize`.

    Attributes:
        low, high: the extremes, buffers.
        observing: whether a call moves the extremes.
        enabled: whether it quantises; otherwise it gives back its input.

    Example:
        >>> quantizer = MinMaxActivation(torch.tensor([0.0, 3.0]), 2)
        >>> quantizer(torch.tensor([0.4, 1.2, 7.0]))
        tensor([0., 1., 3.])
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, sample: Float[Tensor, "batch ..."], bits: int, *, momentum: float = 0.1, pass_clipped: bool = False
    ) -> None:
        super().__init__()
        quant_range(bits)
        sample = floating_tensor("sample", sample).detach()
        if not sample.numel():
            raise ValueError("sample must not be empty, got no values")
        self.bits, self.momentum, self.pass_clipped = bits, in_range("momentum", momentum, 0, 1), pass_clipped
        self.observing, self.enabled = False, True
        low, high = sample.aminmax()
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if self.observing:
            low, high = x.detach().aminmax()
            self.low.lerp_(low.to(self.low), self.momentum)
            self.high.lerp_(high.to(self.high), self.momentum)
        if not self.enabled:
            return x
        step, zero_point = (found.to(x) for found in affine_qparams(self.low, self.high, self.bits))
        return fake_quantize(x, step, zero_point, self.bits, pass_clipped=self.pass_clipped)


def _quantize_input(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    quantizer = cast(nn.Module, layer.input_quantizer)
    return (quantizer(arguments[0]), *arguments[1:])


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> the convolutions and linear layers of a model, in order.

    Example:
        >>> list(quantizable_layers(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 1))))
        ['0', '3']
    """
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}


@torch.no_grad()
def prepare_quantized(
    model: M,
    x: Float[Tensor, "batch ..."],
    bits: int | Mapping[str, int],
    *,
    weight: MakeQuantizer | None = LSQWeight,
    inputs: MakeQuantizer | None = LSQActivation,
    ends: int | None = 8,
) -> M:
    """A copy of a model whose convolutions and linear layers quantise their weights and their inputs.

    A layer's weight is under a parametrization; the module `input_quantizer` of the layer acts before it. The copy is
    calibrated by one batch, and trains as any model does.

    Args:
        model: it is left as it is.
        x: a batch, on which the quantisers of inputs start.
        bits: of all layers, or of each by its name; layers without a name in it stay as they are.
        weight: makes the parametrization from a weight and a number of bits; None leaves weights alone.
        inputs: makes the quantiser of inputs from a batch of them; None leaves inputs alone.
        ends: bits of the first and of the last layer where these are more; None makes no exception. Bits that are
            given by name are taken as they are.

    Raises:
        ValueError: a layer is unknown, is quantised already or is not reached, or there is no layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> small = prepare_quantized(model, torch.rand(5, 1, 8, 8), bits=2, ends=None)
        >>> [len(small[i].weight.unique()) <= 4 for i in (0, 3)]
        [True, True]
    """
    copied = copy.deepcopy(model)
    layers = quantizable_layers(copied)
    if isinstance(bits, Mapping):
        if unknown := [name for name in bits if name not in layers]:
            raise ValueError(f"bits must name layers among {', '.join(layers)}, got {', '.join(unknown)}")
        chosen = dict(bits)
    else:
        chosen = dict.fromkeys(layers, integer("bits", bits, 1, 24))
        if ends is not None and layers:
            chosen.update({name: max(bits, ends) for name in (next(iter(layers)), list(layers)[-1])})
    if not chosen:
        raise ValueError("model must have convolutions or linear layers, got none to quantise")
    if any(parametrize.is_parametrized(layers[name]) or hasattr(layers[name], "input_quantizer") for name in chosen):
        raise ValueError("model must not be quantised or parametrized already, got one that is")
    seen = _inputs_of(copied, {name: layers[name] for name in chosen}, x)
    for name, width in chosen.items():
        layer = layers[name]
        if weight is not None:
            made = weight(cast(Tensor, layer.weight), width).to(cast(Tensor, layer.weight).device)
            parametrize.register_parametrization(layer, "weight", made)
        if inputs is not None:
            layer.register_module("input_quantizer", inputs(seen[name], width).to(seen[name].device))
            layer.register_forward_pre_hook(_quantize_input)
    return copied


def _inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], x: Tensor) -> dict[str, Tensor]:
    """What each layer is given for a batch, in eval mode."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[name] = arguments[0]

        return keep

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if missed := [name for name in layers if name not in seen]:
        raise ValueError(f"model must use all of its layers for x, got none of {', '.join(missed)} reached")
    return seen


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[Float[Tensor, "batch ..."]]) -> None:
    """Batch normalisation's running statistics anew, as plain means over some batches; needed after every change of
    the weights or of their quantisers. Modes are left as they were, and so are models without such statistics.

    Args:
        model: what was changed.
        batches: inputs, at least one batch.

    Raises:
        ValueError: there is no batch.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> recalibrate_bn(model, [torch.tensor([[1.0], [3.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([2.]), tensor([2.]))
    """
    given = list(batches)
    if not given:
        raise ValueError("batches must hold at least one batch, got none")
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    modes, momenta = {module: module.training for module in model.modules()}, [layer.momentum for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
        for x in given:
            model(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
