"""A trained image classifier made as small, or as cheap, as a quantised one: what accuracy is left."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.compress.cost import ModelCost, model_cost
from trimtab.compress.fake_quant import (
    MinMaxActivation,
    MinMaxWeight,
    prepare_quantized,
    quantizable_layers,
    recalibrate_bn,
)
from trimtab.data import load
from trimtab.nets import Classifier, plain_cnn
from trimtab.studies.engine.study import Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.images import Images, worth_halving
from trimtab.studies.tools.training import Supervised, Training, accuracy, fit

Measure = Literal["size", "operations"]


@dataclass(frozen=True)
class Target:
    """What the compressed model may need, and no more: as much as a network of this many bits.

    Attributes:
        bits: of the quantised network's weights and inputs; its first and last layers have `ends` bits.
        ends: 8, or `bits` where that is more.
        of: whether the size or the operations are what may not be exceeded.
        size: bits of all weights, as `model_cost` counts them.
        operations: bit operations per sample, as `model_cost` counts them.
    """

    bits: int
    ends: int
    of: Measure
    size: float
    operations: float

    @property
    def limit(self) -> float:
        """The size, or the operations."""
        return self.size if self.of == "size" else self.operations

    def spent(self, cost: ModelCost) -> float:
        """What a model needs, as a part of what it may."""
        return (cost.size if self.of == "size" else cost.operations) / self.limit


@dataclass(frozen=True)
class CompressionData:
    """What a contestant may look at.

    Attributes:
        images: training and held-out images; of the test images nothing may be used.
        steps: how many steps of fine-tuning everyone may take, of `batch_size` images each.
        batch_size: of fine-tuning.
        key: names the images and the trained model, for parts of a run that are kept.
    """

    images: Images
    steps: int
    batch_size: int
    key: str = ""

    @property
    def sample(self) -> Tensor:
        """Training images to calibrate on, 256 at most."""
        return self.images.x[:256]


Compress = Callable[[Classifier, CompressionData, Target, Trial], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Compression(Entrant):
    """What a contestant brings.

    Attributes:
        compress: from the trained model, which it must leave as it is, the data, the target and the trial, whose
            setting has what the search chose, to another model that meets the target.
    """

    compress: Compress


@dataclass(frozen=True)
class CompressClassifier(Task[Compression]):
    """Compress a trained CNN of 15,000 weights to the size of a quantised one, in 150 steps of fine-tuning at most.

    Four convolutions with batch normalisation and a linear head, trained on 8,000 images of 14 x 14 pixels; the same
    trained network for everyone, another one for each seed. What a model needs is counted by `compress.model_cost`:
    bits of its weights, with a mask of one bit a weight where some are left out, or multiply-adds times the bits of
    both factors. A model that needs more than the target is refused. Everyone may try two settings on held-out images.
    Quantisation is simulated, so that times tell what thinner models gain, and not what fewer bits would.

    Attributes:
        dataset: "fashion_mnist", "mnist", "digits" or a file `.npz`; at the smoke budget digits.
        bits: the target is what a network with this many bits needs, whose first and last layers have 8 or more.
        of: whether size or operations may not be exceeded. Operations of 16 bits are a quarter of those of floats.
    """

    dataset: str = "fashion_mnist"
    bits: int = 4
    of: Measure = "size"

    name: ClassVar[str] = "compress-classifier"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("test accuracy (%)", percent=True),
        "lost": Metric("accuracy lost (%)", best="min", percent=True),
        "kilobytes": Metric("weights (kB)", best="min"),
        "operations": Metric("bit operations (millions)", best="min"),
        "multiply_adds": Metric("multiply-adds (thousands)", best="min"),
        "ms": Metric("time for 256 images (ms)", best="min"),
        "seconds": Metric("time of compression (s)", best="min"),
    }
    accepts: ClassVar[type[Compression]] = Compression
    tries: ClassVar[int] = 2
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-3, 3e-3)}
    cost: ClassVar[float] = 2.5

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "size of 4-bit weights": four_bits,
            "size of 3-bit weights": three_bits,
            "size of 2-bit weights": two_bits,
            "a quarter of the operations": quarter_operations,
        }

    @classmethod
    def references(cls) -> Mapping[str, Compression]:
        return {
            "round to nearest": Compression(compress=round_to_nearest, search={}),
            "LSQ": Compression(compress=learned_steps),
            "magnitude pruning": Compression(compress=magnitude_pruning),
            "filter pruning": Compression(compress=filter_pruning),
        }

    def images(self, trial: Trial) -> Images:
        """Training, held-out and test images of a run."""
        sizes = trial.pick(smoke=(600, 200), laptop=(10_000, 4_000), paper=(None, None))
        data = load(self.datasets(trial.budget)[0]).subset(*sizes, generator=trial.generator())
        return Images.of(data, data.y_train, trial.device, halve=worth_halving(data, trial))

    def trained(self, images: Images, trial: Trial) -> Classifier:
        """The network that is to be compressed, the same for all contestants of a seed."""
        epochs = trial.pick(smoke=3, laptop=4, paper=60)
        channels, classes = images.x.shape[1], images.num_classes

        def network() -> Classifier:
            return plain_cnn(channels, classes)

        def train() -> dict[str, Tensor]:
            quiet = Trial(trial.seed, trial.budget, trial.device, {"lr": 0.05, "weight_decay": 5e-4})
            bench = images.bench(quiet, Training(), "cnn", epochs, batch_size=64)
            rule = Supervised(bench, quiet.seeded(network).to(trial.device))
            fit(bench, rule)
            return {name: tensor.cpu() for name, tensor in rule.network.state_dict().items()}

        model = trial.seeded(network).to(trial.device)
        model.load_state_dict(trial.cached(train, key=f"{self._key(images, trial)} {epochs} epochs"))
        recalibrate_bn(model, images.x[:2048].split(256))
        return model.eval()

    def data(self, images: Images, trial: Trial) -> CompressionData:
        """What a contestant may look at in a run."""
        return CompressionData(images, trial.pick(smoke=8, laptop=150, paper=5000), 64, self._key(images, trial))

    def _key(self, images: Images, trial: Trial) -> str:
        return f"{self.name} plain_cnn {self.dataset} {len(images.y)} images seed {trial.seed}"

    def target(self, model: Classifier, data: CompressionData) -> Target:
        """What the variant allows for a model."""
        ends = max(8, self.bits)
        layers = model_cost(model, data.sample[:1]).layers
        widths = [ends if n in (0, len(layers) - 1) else self.bits for n in range(len(layers))]
        size = sum(layer.weights * width for layer, width in zip(layers, widths, strict=True))
        operations = sum(layer.dense_multiply_adds * width**2 for layer, width in zip(layers, widths, strict=True))
        return Target(self.bits, ends, self.of, float(size), float(operations))

    def run(self, trial: Trial, entrant: Compression) -> Result:
        images = self.images(trial)
        model = self.trained(images, trial)
        data = self.data(images, trial)
        target = self.target(model, data)
        started = time.process_time()
        small = entrant.compress(model, data, target, trial).eval()
        seconds = time.process_time() - started
        cost = model_cost(small, data.sample[:64])
        if (spent := target.spent(cost)) > 1 + 1e-6:
            raise ValueError(f"compress must meet the target's {target.of}, got {spent:.3f} times as much")
        if trial.searching:
            return Result(score=accuracy(small, images.x_held, images.y_held))
        reached = accuracy(small, images.x_test, images.y_test)
        return Result(
            {
                "accuracy": reached,
                "lost": accuracy(model, images.x_test, images.y_test) - reached,
                "kilobytes": cost.size / 8000,
                "operations": cost.operations / 1e6,
                "multiply_adds": cost.multiply_adds / 1e3,
                "ms": _milliseconds(small, images.x_test[:256]),
                "seconds": seconds,
            }
        )


@torch.no_grad()
def _milliseconds(model: nn.Module, x: Tensor) -> float:
    """Processor time of the quickest of three passes."""
    taken = []
    for _ in range(4):
        started = time.process_time()
        model(x)
        taken.append(time.process_time() - started)
    return 1e3 * min(taken[1:])


def fine_tune(
    model: nn.Module,
    data: CompressionData,
    trial: Trial,
    *,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    after_step: Callable[[int], None] | None = None,
    steps: int | None = None,
    stream: int = 11,
) -> None:
    """Train a compressed model in place by Adam, at the setting's rate, annealed to zero, and take statistics anew.

    Args:
        model: it is put into training mode.
        data: the images, and how many steps.
        trial: source of the order of images, of what layers draw, and of the setting's `lr`.
        loss: of logits, labels and images; cross-entropy if None.
        after_step: called with the 0-based step.
        steps: fewer than everyone may take, for methods that use the others in another way.
        stream: of the order of images.
    """
    images, total = data.images, data.steps if steps is None else min(steps, data.steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=float(trial.setting.get("lr", 1e-3)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total, 1))
    order = trial.generator(stream)

    def train() -> None:
        for step in range(total):
            index = torch.randint(len(images.y), (data.batch_size,), generator=order).to(images.y.device)
            x, y = images.x[index], images.y[index]
            logits = model(x)
            value = F.cross_entropy(logits, y) if loss is None else loss(logits, y, x)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            if after_step is not None:
                after_step(step)

    model.train()
    trial.seeded(train, stream=stream)
    recalibrate_bn(model, images.x[:1024].split(256))
    model.eval()


def round_to_nearest(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """Weights by output channel and inputs by layer between their extremes, statistics anew, and no training."""
    small = prepare_quantized(
        model, data.sample, target.bits, weight=MinMaxWeight, inputs=MinMaxActivation, ends=target.ends
    )
    recalibrate_bn(small, data.images.x[:1024].split(256))
    return small


def learned_steps(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """LSQ: quantisation-aware training with learned steps."""
    small = prepare_quantized(model, data.sample, target.bits, ends=target.ends)
    fine_tune(small, data, trial)
    return small


def magnitude_pruning(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """The largest weights of all layers together are kept, as many as the target allows, and then fine-tuned."""
    small = copy.deepcopy(model)
    weights = [cast(nn.Parameter, layer.weight) for layer in quantizable_layers(small).values()]
    masks = masks_within(target, small, data, [w.detach().abs() for w in weights])

    @torch.no_grad()
    def cut(step: int = 0) -> None:
        for weight, mask in zip(weights, masks, strict=True):
            weight.mul_(mask)

    cut()
    fine_tune(small, data, trial, after_step=cut)
    return small


def masks_within(target: Target, model: Classifier, data: CompressionData, scores: Sequence[Tensor]) -> list[Tensor]:
    """Masks of weights that keep the highest scores of all layers together, as many as the target allows.

    Args:
        target: what may be needed.
        model: its weights are floats.
        data: for the shape of an image.
        scores: of the weights of each layer, in order.
    """
    layers = model_cost(model, data.sample[:1]).layers
    order = torch.cat([score.flatten() for score in scores]).argsort(descending=True, stable=True)
    if target.of == "size":
        total = sum(layer.weights for layer in layers)
        kept = int((target.size - total) // 32)
    else:
        each = [layer.dense_multiply_adds / layer.weights * 32 * 32 for layer in layers]
        spent = torch.cat([torch.full((s.numel(),), e, dtype=torch.float64) for s, e in zip(scores, each, strict=True)])
        kept = int((spent.to(order.device)[order].cumsum(0) <= target.operations).sum())
    flat = torch.zeros(len(order), device=order.device)
    flat[order[: max(kept, 1)]] = 1
    parts = flat.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def filter_pruning(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """The filters of the largest L1 norm are kept, the same share in every layer, and then fine-tuned."""
    norms = [layer.weight.detach().abs().sum((1, 2, 3)) for layer in convolutions(model)]
    small = thinner(model, filters_within(target, model, data, norms))
    fine_tune(small, data, trial)
    return small


def convolutions(model: Classifier) -> list[nn.Conv2d]:
    """The convolutions of the task's network, in order."""
    return [layer for layer in cast(nn.Sequential, model.features) if isinstance(layer, nn.Conv2d)]


def filters_within(target: Target, model: Classifier, data: CompressionData, scores: Sequence[Tensor]) -> list[Tensor]:
    """Indices of the filters of the highest scores, as large a share in every layer as the target allows.

    Args:
        target: what may be needed.
        model: whose filters are chosen.
        data: for the shape of an image.
        scores: of the filters of each convolution, in order.
    """
    largest = max(len(score) for score in scores)
    for count in range(largest, 0, -1):
        kept = [score.topk(max(1, len(score) * count // largest)).indices.sort().values for score in scores]
        if target.spent(model_cost(thinner(model, kept), data.sample[:1])) <= 1:
            return kept
    raise ValueError("target must allow one filter a layer, got less")


def thinner(model: Classifier, kept: Sequence[Tensor]) -> Classifier:
    """A copy of the task's network that has only some of its filters, with their weights and statistics.

    Args:
        model: it is left as it is.
        kept: indices of filters of each convolution, in order.
    """
    rows = list(kept)
    columns: list[Tensor | None] = [None, *rows]
    layers: list[nn.Module] = []
    number = -1
    for layer in cast(nn.Sequential, model.features):
        made = copy.deepcopy(layer)
        if isinstance(made, nn.Conv2d):
            number += 1
            weight = made.weight.detach()[rows[number]]
            before = columns[number]
            weight = weight if before is None else weight[:, before]
            made.weight = nn.Parameter(weight.clone())
            made.out_channels, made.in_channels = weight.shape[:2]
        elif isinstance(made, nn.BatchNorm2d):
            held = rows[number]
            made.num_features = len(held)
            made.weight = nn.Parameter(made.weight.detach()[held].clone())
            made.bias = nn.Parameter(made.bias.detach()[held].clone())
            made.running_mean, made.running_var = (
                cast(Tensor, stat)[held].clone() for stat in (made.running_mean, made.running_var)
            )
        layers.append(made)
    small = Classifier(nn.Sequential(*layers), len(rows[-1]), model.head.out_features)
    with torch.no_grad():
        small.head.weight.copy_(model.head.weight[:, rows[-1]])
        small.head.bias.copy_(model.head.bias)
    return small.to(model.head.weight.device).eval()


four_bits = CompressClassifier()
three_bits = CompressClassifier(bits=3)
two_bits = CompressClassifier(bits=2)
quarter_operations = CompressClassifier(bits=16, of="operations")
