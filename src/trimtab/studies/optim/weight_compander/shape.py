"""What the weights of a network trained on few images look like, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.studies.engine.study import Metric, Result, Trial
from trimtab.studies.tasks.image_classification import few_images
from trimtab.studies.tools.training import Supervised, Training, accuracy, fit

METRICS = {
    "test_accuracy": Metric("test accuracy (%)", percent=True),
    "pruned_accuracy": Metric("test accuracy without half of the weights (%)", percent=True),
    "kurtosis": Metric("kurtosis of the weights (normal: 3)", best=None),
    "near_zero": Metric("weights within 0.01 deviations of zero (%)", best=None, percent=True),
    "largest": Metric("largest weight (deviations)", best=None),
}


def train(entrant: Training, longer: float, trial: Trial) -> Result:
    """Train a small CNN by SGD at 0.05, times a factor, and weight decay 5e-4.

    Weights are those of the linear and convolutional layers, as the layers use them, in units of the layer's standard
    deviation, averaged over layers by the number of weights.
    """
    trial = replace(trial, setting={"lr": 0.05 * longer, "weight_decay": 5e-4})
    images = few_images.images(trial)
    bench = images.bench(trial, entrant, "cnn", trial.pick(smoke=3, laptop=40, paper=200))
    rule = Supervised(bench)
    fit(bench, rule)
    network = rule.network.eval()
    return Result(
        {
            "test_accuracy": accuracy(network, images.x_test, images.y_test),
            **weight_shape(network),
            # Last: it takes weights away.
            "pruned_accuracy": pruned_accuracy(network, images.x_test, images.y_test, trial.generator(4)),
        }
    )


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose weights are looked at."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


@torch.no_grad()
def weight_shape(model: nn.Module) -> dict[str, float]:
    """Kurtosis, share near zero, and the largest weight, in units of each layer's deviation from zero."""
    weights = [cast(Tensor, layer.weight).flatten() for layer in layers(model)]
    share = torch.tensor([float(len(w)) for w in weights])
    share /= share.sum()
    scaled = [w / w.square().mean().sqrt() for w in weights]

    def mean(values: Iterable[Tensor]) -> float:
        return (share * torch.stack(list(values)).cpu()).sum().item()

    return {
        "kurtosis": mean(w.pow(4).mean() for w in scaled),
        "near_zero": mean((w.abs() < 0.01).float().mean() for w in scaled),
        "largest": mean(w.abs().max() for w in scaled),
    }


@torch.no_grad()
def pruned_accuracy(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, repeats: int = 3) -> float:
    """Test accuracy with a random half of each layer's weights set to zero, mean over draws; the model is used up."""
    for layer in layers(model):
        for name in list(getattr(layer, "parametrizations", {})):
            parametrize.remove_parametrizations(layer, name)
    whole = [cast(Tensor, layer.weight).clone() for layer in layers(model)]
    found = []
    for _ in range(repeats):
        for layer, weight in zip(layers(model), whole, strict=True):
            kept = torch.rand(weight.shape, generator=generator).to(weight.device) >= 0.5
            cast(Tensor, layer.weight).copy_(weight * kept)
        found.append(accuracy(model, x, y))
    return sum(found) / repeats
