"""Elastic models and their sub-networks: numbers of bits for every layer, and a form for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.eqnet.quantizer import ElasticQuantizer
from trimtab.compress.fake_quant import LSQActivation, LSQWeight, prepare_quantized, quantizable_layers
from trimtab.ops.arguments import tensor_problem

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class ElasticConfig:
    """A sub-network.

    Attributes:
        weight_bits, input_bits: of each elastic layer, in order.
        per_channel: whether weights have a step for each output channel.
        weight_symmetric, input_symmetric: whether zero lies on the grid's middle.
    """

    weight_bits: tuple[int, ...]
    input_bits: tuple[int, ...]
    per_channel: bool = True
    weight_symmetric: bool = True
    input_symmetric: bool = True

    @property
    def mean_bits(self) -> float:
        """Over weights and inputs of all layers."""
        return sum(self.weight_bits + self.input_bits) / (2 * len(self.weight_bits))


def prepare_elastic(model: M, x: Float[Tensor, "batch ..."], bits: Sequence[int] = range(2, 9), *, ends: int = 8) -> M:
    """A copy of a model whose inner layers quantise elastically, and whose first and last layer by LSQ.

    Args:
        model: it is left as it is; at least three convolutions or linear layers.
        x: a batch, on which the quantisers of inputs start.
        bits: the numbers of bits that there are.
        ends: bits of the first and of the last layer.

    Raises:
        ValueError: there are too few layers, or `prepare_quantized` refuses the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> elastic = prepare_elastic(model, torch.randn(16, 4), bits=(2, 4, 8))
        >>> list(elastic_layers(elastic))
        ['2']
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if isinstance(ends, float):
        raise TypeError(f"ends must be an integer, got float {ends!r}")
    names = list(quantizable_layers(model))
    if len(names) < 3:
        raise ValueError(f"model must have at least three convolutions or linear layers, got {len(names)}")
    widths = tuple(bits)
    inner = prepare_quantized(
        model,
        x,
        dict.fromkeys(names[1:-1], max(widths, default=2)),
        weight=lambda held, width: ElasticQuantizer(held, widths),
        inputs=lambda held, width: ElasticQuantizer(held, widths, inputs=True),
    )
    ends_of = {names[0]: ends, names[-1]: ends}
    return prepare_quantized(inner, x, ends_of, weight=partial(LSQWeight, per_channel=True), inputs=LSQActivation)


def elastic_layers(model: nn.Module) -> dict[str, tuple[ElasticQuantizer, ElasticQuantizer]]:
    """Name -> the quantisers of the weight and of the inputs of each elastic layer, in order."""
    found = {}
    for name, layer in quantizable_layers(model).items():
        held = getattr(layer, "parametrizations", {})
        steps = [step for step in held["weight"] if isinstance(step, ElasticQuantizer)] if "weight" in held else []
        if steps:
            found[name] = steps[0], cast(ElasticQuantizer, layer.input_quantizer)
    return found


def elastic_weights(model: nn.Module) -> list[Tensor]:
    """The weights of elastic layers in full precision."""
    layers = dict(model.named_modules())
    return [cast(Any, layers[name]).parametrizations.weight.original for name in elastic_layers(model)]


def uniform_config(model: nn.Module, bits: int, **form: bool) -> ElasticConfig:
    """The sub-network with the same number of bits everywhere.

    Args:
        model: of `prepare_elastic`.
        bits: of all weights and inputs.
        form: the other attributes of `ElasticConfig`.
    """
    count = len(elastic_layers(model))
    return ElasticConfig((bits,) * count, (bits,) * count, **form)


def sample_config(model: nn.Module, *, generator: torch.Generator | None = None) -> ElasticConfig:
    """A sub-network of random bits and a random form.

    Args:
        model: of `prepare_elastic`.
        generator: for all that is drawn.
    """
    pairs = elastic_layers(model).values()

    def drawn(quantizer: ElasticQuantizer) -> int:
        return quantizer.choices[int(torch.randint(len(quantizer.choices), (), generator=generator))]

    bits = [(drawn(weight), drawn(inputs)) for weight, inputs in pairs]
    return ElasticConfig(tuple(w for w, _ in bits), tuple(i for _, i in bits), *draw_form(generator))


def draw_form(generator: torch.Generator | None = None) -> tuple[bool, bool, bool]:
    """Per channel or not, and whether weights and inputs are symmetric, at random."""
    drawn = torch.randint(2, (3,), generator=generator).tolist()
    return bool(drawn[0]), bool(drawn[1]), bool(drawn[2])


def set_config(model: nn.Module, config: ElasticConfig) -> None:
    """Make a model one of its sub-networks; no parameter changes. Batch normalisation needs `recalibrate_bn` then.

    Raises:
        ValueError: the configuration is of another number of layers, or has bits that a layer has not.
    """
    pairs = list(elastic_layers(model).values())
    if not len(pairs) == len(config.weight_bits) == len(config.input_bits):
        raise ValueError(f"config must be of {len(pairs)} layers, got {len(config.weight_bits)}")
    for (weight, inputs), w, i in zip(pairs, config.weight_bits, config.input_bits, strict=True):
        if w not in weight.choices or i not in inputs.choices:
            raise ValueError(f"config must have bits of {', '.join(map(str, weight.choices))}, got {w} and {i}")
    for (weight, inputs), w, i in zip(pairs, config.weight_bits, config.input_bits, strict=True):
        weight.configure(w, per_channel=config.per_channel, symmetric=config.weight_symmetric)
        inputs.configure(i, symmetric=config.input_symmetric)
