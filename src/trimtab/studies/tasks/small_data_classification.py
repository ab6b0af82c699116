"""Image classification from few images, and what the trained weights look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab import nets
from trimtab.data import load
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import Plan, fit, predict

Prepare = Callable[[nn.Module], object]
"""Changes how a network's weights are made, in place."""

Groups = Callable[[nn.Module, float], list[dict[str, Any]]]
"""Maps a network and the weight decay to an optimizer's groups."""


@dataclass(frozen=True)
class SmallDataClassification(Task):
    """Train a small network long enough to overfit; by SGD with momentum and cosine annealing.

    Weights are those of the linear and convolutional layers, as the layers use them. Their shape is measured layer by
    layer, in units of the layer's standard deviation, and averaged over layers by the number of weights.

    Attributes:
        dataset: "fashion_mnist", "mnist" or "digits"; at the smoke budget always digits.
        net: "cnn" or "mlp".
        size: training images at the laptop budget.
        epochs: length of the training there.
    """

    dataset: str = "fashion_mnist"
    net: Literal["cnn", "mlp"] = "cnn"
    size: int = 1000
    epochs: int = 40

    name: ClassVar[str] = "small-data-classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "test_loss": Metric("test loss", best="min"),
        "pruned_accuracy": Metric("test accuracy without half of the weights (%)", percent=True),
        "kurtosis": Metric("kurtosis of the weights (normal: 3)", best=None),
        "near_zero": Metric("weights within 0.01 deviations of zero (%)", best=None, percent=True),
        "largest": Metric("largest weight (deviations)", best=None),
        "seconds_per_step": Metric("time per step (s)", best="min"),
    }

    def train(
        self,
        prepare: Prepare | None = None,
        groups: Groups | None = None,
        weight_decay: float | None = None,
        lr: float | None = None,
    ) -> Arm:
        """A contestant that brings its own form of the weights; without any it is the plain network.

        Args:
            prepare: called with the network before training.
            groups: by default, all parameters are decayed.
            weight_decay: 5e-4 by default.
            lr: learning rate at the start, 0.05 by default.
        """
        return self.arm(prepare=prepare, groups=groups, weight_decay=weight_decay, lr=lr)

    def run(self, trial: Trial, **options: Any) -> Result:
        prepare: Prepare = options.get("prepare", lambda model: None)
        groups: Groups = options.get("groups", decay_all)
        weight_decay: float = options.get("weight_decay", 5e-4)
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        size = trial.pick(smoke=256, laptop=self.size, paper=self.size)
        data = data.subset(train=size, test=trial.pick(smoke=256, laptop=None, paper=None), generator=trial.generator())
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        epochs = trial.pick(smoke=3, laptop=self.epochs, paper=5 * self.epochs)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            if self.net == "mlp":
                model = nets.mlp(x[0].numel(), num_classes=data.num_classes).to(trial.device)
            else:
                model = nets.small_cnn(data.in_shape, data.num_classes).to(trial.device)
        prepare(model)

        def sgd(params: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
            return torch.optim.SGD(groups(model, weight_decay), lr=options.get("lr", 0.05), momentum=0.9)

        # Testing takes longer than training: six points of the curve are enough.
        shown = [epoch for epoch in range(epochs) if (epoch + 1) % -(-epochs // 6) == 0]
        accuracies: list[float] = []

        def after_epoch(epoch: int) -> None:
            if epoch in shown:
                accuracies.append(accuracy(model, x_test, y_test))

        done = fit(
            model,
            x,
            y,
            num_classes=data.num_classes,
            epochs=epochs,
            trial=trial,
            optimizer=sgd,
            after_epoch=after_epoch,
        )
        logits = predict(model, x_test)
        return Result(
            {
                "test_accuracy": (logits.argmax(1) == y_test).float().mean().item(),
                "test_loss": F.cross_entropy(logits, y_test).item(),
                **weight_shape(model),
                "seconds_per_step": done.seconds / done.steps,
                # Last: it takes weights away.
                "pruned_accuracy": pruned_accuracy(model, x_test, y_test, trial.generator(4)),
            },
            {"test_accuracy": Curve([float(epoch + 1) for epoch in shown], accuracies)},
        )


def decay_all(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """One group."""
    return [{"params": list(model.parameters()), "weight_decay": weight_decay}]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of samples that are classified right."""
    return (predict(model, x).argmax(1) == y).float().mean().item()


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
