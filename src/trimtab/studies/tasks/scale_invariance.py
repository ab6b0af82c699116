"""What an optimizer does to the length of weights that a normalisation layer makes scale invariant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.data import load
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import OptimizerFactory, Plan, fit, predict, sgd


@dataclass(frozen=True)
class ScaleInvariance(Task):
    """Train a batch-normalised MLP and watch the weights of its first layer, whose scale the network does not feel.

    What the layer computes depends on the direction of each unit's weights alone, so a step counts for what it turns
    them by: the effective step, the distance of two successive directions. It shrinks as the weights grow longer.

    Attributes:
        dataset: "digits", "mnist" or "fashion_mnist" (the first 5,000 images); at the smoke budget always digits.
        epochs: length of the training at the laptop budget.
    """

    dataset: str = "digits"
    epochs: int = 20

    name: ClassVar[str] = "scale-invariance"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "norm_growth": Metric("length of the first layer's weights, last over first", best="min"),
        "effective_step": Metric("effective step, mean over the training", best=None),
        "cosine": Metric("cosine of gradient and weights (absolute)", best=None),
    }

    def train(self, optimizer: OptimizerFactory | None = None) -> Arm:
        """A contestant that brings its own optimizer; without one it is SGD with momentum."""
        return self.arm(optimizer=optimizer)

    def run(self, trial: Trial, optimizer: OptimizerFactory = sgd, **options: Any) -> Result:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        data = data.subset(
            train=trial.pick(smoke=512, laptop=5_000, paper=len(data.y_train)),
            test=trial.pick(smoke=256, laptop=None, paper=None),
            generator=trial.generator(),
        )
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            first = nn.Linear(x[0].numel(), 128, bias=False)
            model = nn.Sequential(
                nn.Flatten(),
                first,
                nn.BatchNorm1d(128),
                nn.ReLU(),
                nn.Linear(128, 128, bias=False),
                nn.BatchNorm1d(128),
                nn.ReLU(),
                nn.Linear(128, data.num_classes),
            ).to(trial.device)
        watched = _Watched(first.weight)
        epochs = trial.pick(smoke=4, laptop=self.epochs, paper=200)
        accuracy: list[float] = []
        norms: list[float] = []

        def watching(parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
            stepper = optimizer(parameters, plan)
            stepper.register_step_post_hook(lambda *_: watched.observe())
            return stepper

        def after_epoch(epoch: int) -> None:
            accuracy.append((predict(model, x_test).argmax(1) == y_test).float().mean().item())
            norms.append((first.weight.detach().norm() / watched.first).item())
            watched.close_epoch()

        fit(
            model,
            x,
            y,
            num_classes=data.num_classes,
            epochs=epochs,
            trial=trial,
            batch_size=trial.pick(smoke=64, laptop=128, paper=128),
            optimizer=watching,
            after_epoch=after_epoch,
        )
        passed = [float(e + 1) for e in range(epochs)]
        return Result(
            {
                "test_accuracy": accuracy[-1],
                "norm_growth": norms[-1],
                "effective_step": sum(watched.steps) / epochs,
                "cosine": sum(watched.cosines) / epochs,
            },
            {
                "norm_growth": Curve(passed, norms),
                "effective_step": Curve(passed, watched.steps),
                "cosine": Curve(passed, watched.cosines),
                "test_accuracy": Curve(passed, accuracy),
            },
        )


class _Watched:
    """A weight whose length and direction are followed from step to step; `steps`, `cosines` are means of epochs."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.last, self.first = weight, weight.detach().clone(), weight.detach().norm()
        self.steps: list[float] = []
        self.cosines: list[float] = []
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def observe(self) -> None:
        """After an optimizer step; the gradient is still the one at the weights before it."""
        if self.weight.grad is None:
            return
        step = (F.normalize(self.weight, dim=1) - F.normalize(self.last, dim=1)).norm(dim=1).mean()
        self._seen.append((step, F.cosine_similarity(self.weight.grad, self.last, dim=1).abs().mean()))
        self.last.copy_(self.weight)

    def close_epoch(self) -> None:
        steps, cosines = zip(*self._seen, strict=True)
        self.steps.append(torch.stack(steps).mean().item())
        self.cosines.append(torch.stack(cosines).mean().item())
        self._seen.clear()
