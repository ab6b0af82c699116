"""Quantised copies of whole models, and their batch normalisation's statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from trimtab.compress.fake_quant.quantizers import LSQActivation, LSQWeight
from trimtab.ops.arguments import integer, tensor_problem

M = TypeVar("M", bound=nn.Module)
MakeQuantizer = Callable[[Tensor, int], nn.Module]
"""Makes a quantiser from a sample of what it is to quantise, and the number of bits."""
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""The layers whose weights and inputs are quantised."""


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
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
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
