r"""What a model costs: parameters, multiply-adds, bit operations, the size of its weights, and the time of a pass.

Counted by watching one forward pass, per sample. For a layer of $n$ weights with $b_w$ bits, of which $n_0$ are not
zero, whose inputs have $b_x$ bits and which makes $m$ multiply-adds with all of its weights,

$$
\text{operations} = m\,\tfrac{n_0}{n}\, b_w b_x , \qquad
\text{size} = \min\bigl( n\, b_w,\; n_0\, b_w + n \bigr)
$$

the latter with one bit a weight that says which are there. Biases, norms and the quantisers' steps are left out of it.
Weights that are used more than once, by a layer that is called again or by layers that are tied, have their size once.
Time is not counted but measured, by `measured_latency`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.compress.packed import PackedLayer
from trimtab.ops.arguments import integer, tensor_problem

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs.

    Attributes:
        name: in the model.
        weights: how many it has.
        nonzero: how many of them are not zero.
        weight_bits, input_bits: of a weight, and of a number that comes in.
        dense_multiply_adds: per sample, as if no weight were zero.
        shared: whether these weights were counted before, in an earlier call or with the layer that they are tied to.
    """

    name: str
    weights: int
    nonzero: int
    weight_bits: int
    input_bits: int
    dense_multiply_adds: float
    shared: bool = False

    @property
    def multiply_adds(self) -> float:
        """With weights that are not zero, per sample."""
        return self.dense_multiply_adds * self.nonzero / self.weights if self.weights else self.dense_multiply_adds

    @property
    def operations(self) -> float:
        """Multiply-adds times the bits of both factors, per sample."""
        return self.multiply_adds * self.weight_bits * self.input_bits

    @property
    def size(self) -> float:
        """Bits of the weights, dense or with a mask, whichever is less."""
        return float(min(self.weights * self.weight_bits, self.nonzero * self.weight_bits + self.weights))


@dataclass(frozen=True)
class ModelCost:
    """What a model costs.

    Attributes:
        layers: what each of its layers costs, in the order in which they act.
        parameters: of the whole model, as they are trained.
    """

    layers: tuple[LayerCost, ...]
    parameters: int

    @property
    def multiply_adds(self) -> float:
        """With weights that are not zero, per sample."""
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def dense_multiply_adds(self) -> float:
        """As if no weight were zero, per sample."""
        return sum(layer.dense_multiply_adds for layer in self.layers)

    @property
    def operations(self) -> float:
        """Bit operations per sample."""
        return sum(layer.operations for layer in self.layers)

    @property
    def size(self) -> float:
        """Bits of all weights of convolutions, linear layers and attention, shared ones once."""
        return sum(layer.size for layer in self.layers if not layer.shared)


@torch.no_grad()
def model_cost(model: nn.Module, x: Float[Tensor, "batch ..."]) -> ModelCost:
    """The cost of a forward pass, per sample.

    Seen are convolutions, linear layers, `nn.MultiheadAttention` and `PackedLayer`; products that a model makes by
    functions are not. A module with a method `multiply_adds(input, output) -> float` (of the whole batch) is asked
    itself, and nothing in it is counted beside. A layer's bits are those of a parametrization of its weight that has
    `bits`, and of its `input_quantizer`; otherwise those of the numbers' type. Model and input may be on the device
    "meta", where no weight counts as zero.

    Args:
        model: it is put into eval mode for the pass, and then back.
        x: a batch.

    Raises:
        ValueError: the batch is empty.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2))
        >>> cost = model_cost(model, torch.zeros(1, 1, 8, 8))
        >>> cost.multiply_adds, cost.size  # 36 weights at 36 places, and 288
        (1584.0, 10368.0)
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if not len(x):
        raise ValueError("x must be at least one sample, got an empty batch")
    found: list[LayerCost] = []
    inside: set[nn.Module] = set()
    handles = []

    known: set[int] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def count(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            named = {key: named[key] for key in ("query", "key") if key in named} | named
            held, given = id(_source(layer)), (*arguments, *named.values())
            found.append(replace(_cost_of(name, layer, given, output, len(x)), shared=held in known))
            known.add(held)

        return count

    for name, layer in model.named_modules():
        counted = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.MultiheadAttention, PackedLayer)
        own = callable(getattr(layer, "multiply_adds", None))
        if layer not in inside and (own or isinstance(layer, counted)):
            inside.update(layer.modules())
            handles.append(layer.register_forward_hook(watch(name), with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return ModelCost(tuple(found), sum(p.numel() for p in model.parameters()))


@torch.no_grad()
def measured_latency(
    model: nn.Module, *others: nn.Module, x: Float[Tensor, "batch ..."], repeats: int = 10, warmup: int = 2
) -> tuple[float, ...]:
    """Milliseconds of a forward pass of a batch, of each of some models: the median over repetitions.

    Models take turns, so that whatever else the machine does slows all of them alike: of models that are to be
    compared, time all in one call. What is measured is the time of a clock, on the device of the batch, with as many
    threads as torch has. Simulated quantisation takes longer than none, and masks save nothing: what is packed, thinner
    or factorised does.

    Args:
        model, others: each is put into eval mode for its passes, and then back.
        x: a batch, of inputs that all of them take.
        repeats: passes of each that are timed.
        warmup: passes of each before.

    Raises:
        TypeError: `x` is no tensor.
        ValueError: the batch is empty, or `repeats` or `warmup` is out of range.

    Example:
        >>> whole, thin = (nn.Sequential(nn.Linear(256, n), nn.ReLU(), nn.Linear(n, 256)) for n in (2048, 8))
        >>> slow, fast = measured_latency(whole, thin, x=torch.randn(64, 256))
        >>> fast < slow
        True
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if not len(x):
        raise ValueError("x must be at least one sample, got an empty batch")
    integer("repeats", repeats)
    integer("warmup", warmup, 0)
    models = (model, *others)
    modes = {module: module.training for held in models for module in held.modules()}
    taken: list[list[float]] = [[] for _ in models]
    try:
        for turn in range(warmup + repeats):
            for held, times in zip(models, taken, strict=True):
                held.eval()
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                started = time.perf_counter()
                held(x)
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                if turn >= warmup:
                    times.append(time.perf_counter() - started)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return tuple(1e3 * statistics.median(times) for times in taken)


def _cost_of(name: str, layer: nn.Module, arguments: tuple[Any, ...], output: Any, batch: int) -> LayerCost:
    given = cast(Tensor, arguments[0])
    input_bits = int(getattr(getattr(layer, "input_quantizer", None), "bits", 8 * given.element_size()))
    if isinstance(layer, nn.MultiheadAttention):
        separate = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)  # of keys and values of other widths
        weights = [p for p in (layer.in_proj_weight, *separate, layer.out_proj.weight) if p is not None]
        query, key = (shape[-2] if layer.batch_first else shape[0] for shape in (given.shape, arguments[1].shape))
        width = layer.embed_dim
        projected = 2.0 * width * query + (layer.kdim + layer.vdim) * key
        macs = width * projected + 2.0 * query * key * width
        return LayerCost(name, *_counted(weights), 8 * weights[0].element_size(), input_bits, macs)
    if isinstance(layer, PackedLayer):
        packed = layer.weight()
        macs = output.numel() * packed[0].numel() / batch
        return LayerCost(name, *_counted([packed]), layer.weight.bits, input_bits, float(macs))
    own = getattr(layer, "multiply_adds", None)
    if callable(own):
        weights = [p for n, p in layer.named_parameters() if p.dim() > 1]
        total = int(sum(p.numel() for p in weights))
        bits = 8 * (weights[0].element_size() if weights else 4)
        return LayerCost(name, total, total, bits, input_bits, float(own(given, output)) / batch)
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.Linear):
        macs = output.numel() * layer.in_features / batch
    elif isinstance(layer, CONVOLUTIONS):
        macs = output.numel() * weight[0].numel() / batch
    else:
        macs = given.numel() * weight[0].numel() / batch
    return LayerCost(name, *_counted([weight]), _weight_bits(layer, weight), input_bits, float(macs))


def _source(layer: nn.Module) -> object:
    """What tells weights that are shared from others: the parameter itself, under a parametrization too."""
    if parametrize.is_parametrized(layer, "weight"):
        held = cast(Any, layer.parametrizations)["weight"]
        return held.original if hasattr(held, "original") else held
    weight = getattr(layer, "weight", None)
    return layer if weight is None else weight


def _counted(weights: list[Tensor]) -> tuple[int, int]:
    """How many there are, and how many are not zero."""
    total = sum(w.numel() for w in weights)
    return total, total if weights[0].is_meta else int(sum(w.count_nonzero() for w in weights))


def _weight_bits(layer: nn.Module, weight: Tensor) -> int:
    if parametrize.is_parametrized(layer, "weight"):
        for step in reversed(list(cast(Any, layer.parametrizations)["weight"])):
            if hasattr(step, "bits"):
                return int(step.bits)
    return 8 * weight.element_size()
