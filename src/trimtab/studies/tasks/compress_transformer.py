"""Making a trained language model smaller: what is lost at equal size, at once and after a little more training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.compress.cost import model_cost
from trimtab.compress.fake_quant import MinMaxWeight, affine_qparams, fake_quantize
from trimtab.compress.fwsvd import compress_linear
from trimtab.compress.transformer import Transformer
from trimtab.data.text import TextData, python_sources
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.training import Training, Workbench, fit, predict

Windows = tuple[Tensor, Tensor]
"""Windows of the text, and the same windows one character on."""
Objective = Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]
"""Of the small model, the trained one, characters, and those that follow: what further training minimises."""

_BITS = 16
"""Of a number that is not quantised: trained models are handed on in half precision."""


@dataclass(frozen=True)
class Commission:
    """What a contestant is given.

    Attributes:
        model: trained, in eval mode, and the contestant's own copy.
        windows: what it was trained on.
        share: how much of the matrices of its blocks may remain, in bits.
        trial: source of random draws, and of the setting.
    """

    model: Transformer
    windows: Windows
    share: float
    trial: Trial

    def calibration(self, count: int) -> Windows:
        """The first training windows."""
        return self.windows[0][:count], self.windows[1][:count]

    def train(self, model: nn.Module, objective: Objective, steps: int, stream: int = 3) -> None:
        """Trains a model in place, for a contestant that needs to before it hands it over."""
        x, y = self.windows
        generator = self.trial.generator(stream)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(steps):
            index = torch.randint(len(x), (32,), generator=generator).to(x.device)
            descent_step(optimizer, objective(model, self.model, x[index], y[index]))


@dataclass(frozen=True, kw_only=True)
class Shrinking(Entrant):
    """What a contestant brings.

    Attributes:
        compress: makes a smaller model; its blocks must be in `layers`, as the trained one's.
        objective: what the further training minimises; None is the cross-entropy.
    """

    compress: Callable[[Commission], nn.Module]
    objective: Objective | None = None


@dataclass(frozen=True)
class CompressTransformer(Task[Shrinking]):
    """A character-level transformer on the sources of Python's standard library, whose blocks must shrink.

    The model has four blocks of width 48, trained once for each seed. Everybody hands over a smaller one of at most
    the same size, which is tested, trained on for one epoch over the same 4,000 windows, and tested again. The size is
    that of the matrices in the blocks, in bits: numbers have 16, or what they are quantised to, and where weights are
    left out a bit a weight says which. Embedding, positions, norms, biases and head are not counted. Everybody chooses
    among four learning rates by the loss on held-out windows of the modules that are trained on; the largest was added
    when all had chosen the largest of three. Methods that distil a transformer meet here too: a student is what they
    hand over.

    Attributes:
        share: of the matrices' size that may remain.
        context: characters that the model sees.
    """

    share: float = 0.25
    context: int = 32

    name: ClassVar[str] = "compress-transformer"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_loss": Metric("test loss after further training (nats per character)", best="min"),
        "one_shot_loss": Metric("test loss at once (nats per character)", best="min"),
        "size": Metric("size of the matrices (%)", best="min", percent=True),
        "multiply_adds": Metric("multiply-adds of a window", best="min"),
        "weight_error": Metric("squared error of the weights (%)", best="min", percent=True),
    }
    accepts: ClassVar[type[Shrinking]] = Shrinking
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (3e-4, 1e-3, 3e-3, 1e-2)}
    cost: ClassVar[float] = 3.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"to a quarter": to_a_quarter, "to a half": to_a_half}

    @classmethod
    def references(cls) -> Mapping[str, Shrinking]:
        return {
            "plain SVD": Shrinking(compress=plain_svd),
            "activation-weighted SVD": Shrinking(compress=activation_weighted_svd),
            "magnitude pruning": Shrinking(compress=magnitude_pruning),
            "round to nearest": Shrinking(compress=round_to_nearest),
            "GPTQ": Shrinking(compress=gptq),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return ("python_sources",)

    def run(self, trial: Trial, entrant: Shrinking) -> Result:
        text, train, base = trained_transformer(trial, self.context)
        smaller = entrant.compress(Commission(copy.deepcopy(base), train, self.share, trial)).eval()
        size = matrix_bits(smaller, train[0][:1]) / matrix_bits(base, train[0][:1])
        if size > self.share + 1e-9:
            raise ValueError(f"compress must leave at most {self.share:g} of the bits, got {size:g}")
        objective = entrant.objective or cross_entropy

        def tuned() -> None:
            epochs = trial.pick(smoke=1, laptop=1, paper=5)
            tune(smaller.train(), partial(objective, smaller, base), train, epochs, trial)

        if trial.searching:
            held_out = windows_of(text.train, trial.pick(smoke=16, laptop=500, paper=5_000), self.context, trial, 1)
            tuned()
            return Result(score=-loss_on(smaller, held_out))
        test = windows_of(text.test, trial.pick(smoke=16, laptop=1_000, paper=5_000), self.context, trial, 2)
        found = {
            "one_shot_loss": loss_on(smaller, test),
            "size": size,
            "multiply_adds": model_cost(smaller, train[0][:1]).multiply_adds,
            **_weight_error(base, smaller),
        }
        tuned()
        return Result({"test_loss": loss_on(smaller, test), **found})


def trained_transformer(trial: Trial, context: int = 32) -> tuple[TextData, Windows, Transformer]:
    """The text, the windows of it that are trained on, and the model that is to shrink, in eval mode."""
    text = python_sources()
    train = windows_of(text.train, trial.pick(smoke=64, laptop=4_000, paper=40_000), context, trial)
    epochs, depth = trial.pick(smoke=2, laptop=3, paper=20), trial.pick(smoke=2, laptop=4, paper=4)

    def network() -> Transformer:
        return Transformer(len(text.characters), context, depth)

    def build() -> dict[str, Tensor]:
        model = trial.seeded(network).to(trial.device)
        quiet = replace(trial, setting={"lr": 3e-3}, report=lambda fraction: None)
        tune(model, partial(cross_entropy, model, model), train, epochs, quiet)
        return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

    model = trial.seeded(network).to(trial.device)
    key = f"compress-transformer {text.source} {len(train[0])} windows of {context} {epochs} epochs seed {trial.seed}"
    model.load_state_dict(trial.cached(build, key=key))
    return text, train, model.eval()


def tune(
    model: nn.Module, objective: Callable[[Tensor, Tensor], Tensor], train: Windows, epochs: int, trial: Trial
) -> None:
    """Trains a model in place on an objective of characters and those that follow, at the setting's rate."""
    made = _Tuning(model, objective, float(trial.setting["lr"]))
    entrant = Training(rule=lambda bench: made)
    bench = Workbench(entrant, lambda: model, train, train, num_classes=1, epochs=epochs, trial=trial, batch_size=32)
    fit(bench, made)


class _Tuning:
    """AdamW on an objective of characters and those that follow."""

    def __init__(self, model: nn.Module, objective: Callable[[Tensor, Tensor], Tensor], lr: float) -> None:
        self.model, self.objective = model, objective
        self.optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)]

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return descent_step(self.optimizers[0], self.objective(x, y))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x)
        return scores


def cross_entropy(model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What language models are trained on; the teacher is not asked."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def window_losses(model: nn.Module, batch: Windows) -> Float[Tensor, " batch"]:
    """The loss of each window: the sum over its characters."""
    return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").sum(1)


def loss_on(model: nn.Module, windows: Windows) -> float:
    """The mean loss of a character."""
    return F.cross_entropy(predict(model, windows[0], 200).flatten(0, 1), windows[1].flatten()).item()


def windows_of(text: Int[Tensor, " n"], count: int, length: int, trial: Trial, stream: int = 0) -> Windows:
    """Random windows of a text."""
    start = torch.randint(len(text) - length, (count, 1), generator=trial.generator(stream))
    window = text[start + torch.arange(length + 1)].to(trial.device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def matrix_bits(model: nn.Module, x: Int[Tensor, "batch length"]) -> float:
    """The size of the matrices in a model's blocks."""
    layers = [layer for layer in model_cost(model, x).layers if layer.name.startswith("layers.")]
    total = 0.0
    for layer in layers:
        bits = min(layer.weight_bits, _BITS)
        total += min(layer.weights * bits, layer.nonzero * bits + layer.weights)
    return total


def block_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers in the blocks."""
    return [n for n, layer in model.named_modules() if n.startswith("layers.") and isinstance(layer, nn.Linear)]


def plain_svd(commission: Commission) -> nn.Module:
    """Every matrix to the rank that leaves its share."""
    return compress_linear(commission.model, ratio=commission.share, layers=block_layers(commission.model))[0]


@torch.no_grad()
def input_moments(commission: Commission) -> dict[str, Float[Tensor, "in in"]]:
    """Mean products of what comes into each layer of the blocks, on 256 windows."""
    model, moments = commission.model, dict[str, Tensor]()

    def watch(name: str, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].flatten(0, -2)
        moments[name] = x.mT @ x / len(x)

    names = block_layers(model)
    handles = [model.get_submodule(name).register_forward_pre_hook(partial(watch, name)) for name in names]
    model(commission.calibration(256)[0])
    for handle in handles:
        handle.remove()
    return moments


def activation_weighted_svd(commission: Commission) -> nn.Module:
    """The same, rows weighted by the root mean square of what comes in."""
    scales = {name: found.diagonal().sqrt() for name, found in input_moments(commission).items()}
    return compress_linear(commission.model, scales, ratio=commission.share, layers=list(scales))[0]


class _Kept(nn.Module):
    """A weight of which only some entries are there."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def magnitude_pruning(commission: Commission) -> nn.Module:
    """The smallest weights of all blocks left out, as many as it takes with a bit a weight for the mask."""
    model, names = commission.model, block_layers(commission.model)
    weights = [cast(nn.Linear, model.get_submodule(name)).weight.detach() for name in names]
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    kept = int((commission.share - 1 / _BITS) * len(sizes))
    mask = torch.zeros_like(sizes, dtype=torch.bool)
    mask[sizes.argsort(descending=True, stable=True)[:kept]] = True
    for name, part in zip(names, mask.split([weight.numel() for weight in weights]), strict=True):
        layer = cast(nn.Linear, model.get_submodule(name))
        parametrize.register_parametrization(layer, "weight", _Kept(part.view_as(layer.weight)))
    return model


def round_to_nearest(commission: Commission) -> nn.Module:
    """Every weight on a grid of its output's range, of as many bits as there may be; trained on by straight-through."""
    model, bits = commission.model, int(commission.share * _BITS)
    for name in block_layers(model):
        layer = cast(nn.Linear, model.get_submodule(name))
        parametrize.register_parametrization(layer, "weight", MinMaxWeight(layer.weight.detach(), bits))
    return model


class _OnGrid(nn.Module):
    """A weight rounded to a grid that stays."""

    step: Tensor
    zero_point: Tensor

    def __init__(self, step: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.register_buffer("step", step)
        self.register_buffer("zero_point", zero_point)
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, self.step, self.zero_point, self.bits, pass_clipped=True)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


@torch.no_grad()
def gptq(commission: Commission) -> nn.Module:
    """Every input's weights rounded in turn, and those of the inputs to come moved so that the output changes least.

    Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022; what
    comes into a layer is that of the model before it was rounded.
    """
    model, bits = commission.model, int(commission.share * _BITS)
    for name, moments in input_moments(commission).items():
        layer = cast(nn.Linear, model.get_submodule(name))
        step, zero_point = affine_qparams(*layer.weight.aminmax(dim=1, keepdim=True), bits)
        damped = moments.double() + 0.01 * moments.diagonal().mean() * torch.eye(len(moments)).to(moments).double()
        factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).to(layer.weight.dtype)
        left, rounded = layer.weight.clone(), torch.empty_like(layer.weight)
        for i in range(layer.in_features):
            rounded[:, i : i + 1] = fake_quantize(left[:, i : i + 1], step, zero_point, bits)
            error = (left[:, i : i + 1] - rounded[:, i : i + 1]) / factor[i, i]
            left[:, i + 1 :] -= error * factor[i, i + 1 :]
        layer.weight.copy_(rounded)
        parametrize.register_parametrization(layer, "weight", _OnGrid(step, zero_point, bits))
    return model


@torch.no_grad()
def _weight_error(base: nn.Module, smaller: nn.Module) -> dict[str, float]:
    """The share of the matrices' squares that their stand-ins miss, where each has one."""
    lost = total = 0.0
    known = dict(smaller.named_modules())
    for name in block_layers(base):
        layer = cast(nn.Linear, base.get_submodule(name))
        other = known.get(name)
        identity = torch.eye(layer.in_features, device=layer.weight.device)
        if not isinstance(other, nn.Linear | nn.Sequential):
            return {}
        if isinstance(other, nn.Linear) and other.weight.shape != layer.weight.shape:
            return {}
        matrix = other(identity) - other(torch.zeros_like(identity[:1]))
        lost += float((matrix.mT - layer.weight).square().sum())
        total += float(layer.weight.square().sum())
    return {"weight_error": lost / total}


to_a_quarter = CompressTransformer()
to_a_half = CompressTransformer(share=0.5)
