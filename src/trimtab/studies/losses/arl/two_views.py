"""Classification from two views of an image, of which one is noisier than the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data import load
from trimtab.losses import SharedHeadFusion, scale_gradient
from trimtab.nets import mlp
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.stopwatch import Stopwatch

Views = list[Tensor]


class TwoViewNet(nn.Module):
    """An MLP encoder for each view, and a linear head on both.

    Args:
        in_features: pixels of each view.
        num_classes: number of classes.
        width: features of each encoder; its hidden layer has twice as many.
    """

    def __init__(self, in_features: Sequence[int], num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(mlp(pixels, (2 * width, width), num_classes).features for pixels in in_features)
        self.fusion = SharedHeadFusion(nn.Linear(width * len(in_features), num_classes), [width] * len(in_features))

    def features(self, views: Views) -> list[Float[Tensor, "batch width"]]:
        return [encoder(view) for encoder, view in zip(self.encoders, views, strict=True)]

    def forward(self, views: Views) -> tuple[Tensor, Tensor]:
        """The joint logits, and those of each view alone."""
        joint, alone = self.fusion(self.features(views))
        return joint, alone


class Objective(Protocol):
    """A contestant at work: leaves a batch's gradients in the network; `progress` is the share of epochs done."""

    def __call__(self, views: Views, y: Int[Tensor, " batch"], progress: float) -> None: ...


# From the network, the optimizer, the value of the knob, and a generator for what is drawn.
Method = Callable[[TwoViewNet, torch.optim.Optimizer, float, torch.Generator], Objective]


@dataclass(frozen=True)
class _Data:
    """Training, validation and test part, each as views and labels."""

    train: tuple[Views, Tensor]
    validation: tuple[Views, Tensor]
    test: tuple[Views, Tensor]
    num_classes: int


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("test accuracy (%)", percent=True),
    "clear_accuracy": Metric("accuracy of the clearer view alone (%)", percent=True),
    "noisy_accuracy": Metric("accuracy of the noisier view alone (%)", percent=True),
    "dependence_ratio": Metric("dependence, clearer to noisier view", best=None),
    "inverse_variance_ratio": Metric("inverse entropy, clearer to noisier view", best=None),
    "imbalance": Metric("distance of the two ratios (nats)", best="min"),
    "learning_rate": Metric("learning rate", best=None),
    "knob": Metric("the arm's own setting", best=None),
    "ms_per_step": Metric("time per step (ms)", best="min"),
}
RATES = (0.01, 0.03, 0.1)


@dataclass(frozen=True)
class TwoViews:
    """Train two encoders under one head on few images, seen with much noise in one view and little in the other.

    The noise is drawn once for each image, as of a measurement, so that it can be learned by heart. The learning rate
    (of three) and an arm's own knob (of two values) are those with the best accuracy on held-out images.

    Attributes:
        dataset: "mnist" or "fashion_mnist"; at the smoke budget always digits.
        views: "copies" shows the whole image twice, "halves" its left and its right half.
        noise: standard deviation of the pixels' noise in each view, for pixels in [0, 1].
    """

    dataset: str
    views: Literal["copies", "halves"]
    noise: tuple[float, float]

    def train(self, trial: Trial, *, method: Method, knob: Sequence[float], judged: int | None = None) -> Result:
        """One run.

        Args:
            trial: seed and budget.
            method: from the network, SGD, a value of the knob and a generator, makes what fills the gradients.
            knob: two values to choose from.
            judged: the view whose own accuracy counts; both together if None.
        """
        data = self._data(trial)
        settings = [(rate, value) for rate in RATES for value in knob]
        runs = []
        for done, (rate, value) in enumerate(settings):
            model, seconds, ratios = self._trained(data, trial, method, rate, value)
            runs.append((_accuracies(model, data.validation, judged)[0], model, seconds, ratios, rate, value))
            trial.report((done + 1) / len(settings))
        _, model, seconds, ratios, rate, value = max(runs, key=lambda run: run[0])
        accuracy, clear, noisy = _accuracies(model, data.test, judged)
        dependence, inverse_variance = _ratios(model, data.test[0])
        epochs = [float(epoch + 1) for epoch in range(len(ratios))]
        return Result(
            {
                "accuracy": accuracy,
                "clear_accuracy": clear,
                "noisy_accuracy": noisy,
                "dependence_ratio": dependence,
                "inverse_variance_ratio": inverse_variance,
                "imbalance": abs(math.log(dependence / inverse_variance)),
                "learning_rate": rate,
                "knob": value,
                "ms_per_step": 1e3 * seconds,
            },
            {"dependence_ratio": Curve(epochs, ratios)},
        )

    def _data(self, trial: Trial) -> _Data:
        whole = load("digits" if trial.budget == "smoke" else self.dataset)
        train, held = trial.pick(smoke=(300, 100), laptop=(2000, 1000), paper=(10_000, 2000))
        some = whole.subset(train + held, trial.pick(smoke=200, laptop=5000, paper=None), generator=trial.generator())
        draws = trial.generator(2)

        def seen(x: Tensor) -> Views:
            halves = x.chunk(2, dim=3) if self.views == "halves" else (x, x)
            return [
                (half.flatten(1) + std * torch.randn(half.flatten(1).shape, generator=draws)).to(trial.device)
                for half, std in zip(halves, self.noise, strict=True)
            ]

        y, y_test = some.y_train.to(trial.device), some.y_test.to(trial.device)
        return _Data(
            (seen(some.x_train[:train]), y[:train]),
            (seen(some.x_train[train:]), y[train:]),
            (seen(some.x_test), y_test),
            some.num_classes,
        )

    def _trained(
        self, data: _Data, trial: Trial, method: Method, rate: float, value: float
    ) -> tuple[TwoViewNet, float, list[float]]:
        """A network after training, the processor seconds of a step, and the dependence ratio after each epoch."""
        views, y = data.train
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = TwoViewNet([view.shape[1] for view in views], data.num_classes).to(trial.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=WEIGHT_DECAYS[0])
        objective = method(model, optimizer, value, trial.generator(3))
        epochs, batch_size = trial.pick(smoke=6, laptop=16, paper=100), 64
        steps = len(y) // batch_size
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        order, watch, ratios = trial.generator(1), Stopwatch(trial.device), []
        for epoch in range(epochs):
            with watch:
                for index in torch.randperm(len(y), generator=order)[: steps * batch_size].view(steps, -1):
                    optimizer.zero_grad()
                    objective([view[index] for view in views], y[index], epoch / epochs)
                    optimizer.step()
                    schedule.step()
            ratios.append(_ratios(model, data.validation[0])[0])
        return model, watch.seconds / (epochs * steps), ratios


WEIGHT_DECAYS = (1e-4, 1e-3)


def joint(
    model: TwoViewNet, optimizer: torch.optim.Optimizer, weight_decay: float, generator: torch.Generator
) -> Objective:
    """Baseline: cross-entropy of the joint logits and nothing else; the knob is the weight decay."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay

    def objective(views: Views, y: Tensor, progress: float) -> None:
        F.cross_entropy(model(views)[0], y).backward()

    return objective


def one_view(
    model: TwoViewNet, optimizer: torch.optim.Optimizer, weight_decay: float, generator: torch.Generator
) -> Objective:
    """Baseline: cross-entropy of the first view alone; the knob is the weight decay."""
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay

    def objective(views: Views, y: Tensor, progress: float) -> None:
        F.cross_entropy(model(views)[1][:, 0], y).backward()

    return objective


def unimodal_losses(
    model: TwoViewNet,
    optimizer: torch.optim.Optimizer,
    gamma: float,
    generator: torch.Generator,
    factor: float = 1.0,
) -> Objective:
    """Baseline: joint training with a loss for each view alone; the knob is its weight after the first 5 %."""

    def objective(views: Views, y: Tensor, progress: float) -> None:
        warm = progress >= 0.05
        features = model.features(views)
        logits, alone = model.fusion([scale_gradient(part, factor) if warm else part for part in features])
        own = sum(F.cross_entropy(part, y) for part in alone.unbind(1))
        (F.cross_entropy(logits, y) + (gamma if warm else 1.0) * own).backward()

    return objective


def scaled_unimodal_losses(
    model: TwoViewNet, optimizer: torch.optim.Optimizer, gamma: float, generator: torch.Generator
) -> Objective:
    """Control: the same, with both encoders' gradients times 1.5 after the first 5 %: ARL's mean factor."""
    return unimodal_losses(model, optimizer, gamma, generator, factor=1.5)


def ogm_ge(model: TwoViewNet, optimizer: torch.optim.Optimizer, alpha: float, generator: torch.Generator) -> Objective:
    r"""Baseline: on-the-fly gradient modulation with generalisation enhancement; the knob is its strength.

    The encoder of the view that is more sure of the right classes is slowed down by $1 - \tanh(\alpha \rho)$, where
    $\rho$ is the ratio of the two confidences, and the weights of both encoders get noise of their gradient's
    deviation, in the first half of training (Peng et al., CVPR 2022, arXiv 2203.15332).
    """

    def objective(views: Views, y: Tensor, progress: float) -> None:
        logits, alone = model(views)
        F.cross_entropy(logits, y).backward()
        if progress >= 0.5:
            return
        with torch.no_grad():
            # Half of the bias belongs to each view.
            halved = alone - model.fusion.head.bias / 2  # type: ignore[operator]
            sure = halved.softmax(2).gather(2, y[:, None, None].expand(-1, 2, 1)).sum((0, 2))
            ratio = sure / sure.flip(0)
            factors = torch.where(ratio > 1, 1 - (alpha * ratio).tanh(), 1.0)
            for encoder, factor in zip(model.encoders, factors.unbind(), strict=True):
                for weight in encoder.parameters():
                    if weight.ndim > 1 and weight.grad is not None:
                        spread = weight.grad.std() + 1e-8
                        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
                        weight.grad.mul_(factor).add_(spread * noise)

    return objective


@torch.no_grad()
def _accuracies(model: TwoViewNet, part: tuple[Views, Tensor], judged: int | None) -> tuple[float, float, float]:
    """Accuracy of both views (or of the one that is judged), of the first alone and of the second alone."""
    views, y = part
    logits, alone = model(views)
    scores = (logits if judged is None else alone[:, judged], alone[:, 0], alone[:, 1])
    counted, first, second = ((each.argmax(1) == y).float().mean().item() for each in scores)
    return counted, first, second


@torch.no_grad()
def _ratios(model: TwoViewNet, views: Views) -> tuple[float, float]:
    """First view to second: the dependence, and the inverse of the entropy."""
    alone = model(views)[1]
    dependence = alone.abs().sum(2).mean(0)
    entropy = torch.special.entr(alone.softmax(2)).sum(2).mean(0).clamp_min(1e-6)
    return (dependence[0] / dependence[1]).item(), (entropy[1] / entropy[0]).item()
