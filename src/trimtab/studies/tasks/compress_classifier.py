"""A trained image classifier made as small, or as cheap, as a quantised one: what accuracy is left."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from trimtab.compress.cost import model_cost
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
from trimtab.studies.tools.compressing import (
    CompressionData,
    Measure,
    Target,
    convolutions,
    filters_within,
    fine_tune,
    masks_within,
    thinner,
)
from trimtab.studies.tools.images import Images, worth_halving
from trimtab.studies.tools.training import Supervised, Training, accuracy, fit

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
        "lost": Metric("accuracy lost (points)", best="min", percent=True),
        "kilobytes": Metric("weights (kB)", best="min"),
        "operations": Metric("bit operations (millions)", best="min"),
        "multiply_adds": Metric("multiply-adds (thousands)", best="min"),
        "ms": Metric("time for 256 images (ms)", best="min"),
        "seconds": Metric("time of compression (s)", best="min"),
    }
    accepts: ClassVar[type[Compression]] = Compression
    needs_images: ClassVar[bool] = True
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


def filter_pruning(model: Classifier, data: CompressionData, target: Target, trial: Trial) -> nn.Module:
    """The filters of the largest L1 norm are kept, the same share in every layer, and then fine-tuned."""
    norms = [layer.weight.detach().abs().sum((1, 2, 3)) for layer in convolutions(model)]
    small = thinner(model, filters_within(target, model, data, norms))
    fine_tune(small, data, trial)
    return small


four_bits = CompressClassifier()
three_bits = CompressClassifier(bits=3)
two_bits = CompressClassifier(bits=2)
quarter_operations = CompressClassifier(bits=16, of="operations")
