"""Image classification of which the confidence is what counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from trimtab import nets
from trimtab.data import load
from trimtab.losses.calibration import (
    adaptive_calibration_error,
    area_under_risk_coverage,
    expected_calibration_error,
)
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import LossFactory, OptimizerFactory, PenaltyFactory, fit, predict


@dataclass(frozen=True)
class Calibration(Task):
    """Train a small CNN until it fits its training set, and ask whether it is as sure as it is right.

    Attributes:
        dataset: "fashion_mnist", "mnist", "cifar10" or "digits"; at the smoke budget always digits.
        epochs: length of the training at the laptop budget.
    """

    dataset: str = "fashion_mnist"
    epochs: int = 20

    name: ClassVar[str] = "calibration"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "ece": Metric("calibration error (%)", best="min", percent=True),
        "adaptive_ece": Metric("calibration error, adaptive bins (%)", best="min", percent=True),
        "nll": Metric("test loss (nats)", best="min"),
        "aurc": Metric("area under the risk-coverage curve (%)", best="min", percent=True),
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(
        self,
        loss: LossFactory | None = None,
        optimizer: OptimizerFactory | None = None,
        penalty: PenaltyFactory | None = None,
    ) -> Arm:
        """A contestant that brings its own loss, optimizer or penalty; without any it is cross-entropy with SGD."""
        return self.arm(loss=loss, optimizer=optimizer, penalty=penalty)

    def run(self, trial: Trial, **options: Any) -> Result:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        train: int | None = trial.pick(smoke=1024, laptop=10_000, paper=None)
        data = data.subset(train, trial.pick(smoke=256, laptop=None, paper=None), generator=trial.generator())
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = nets.small_cnn(data.in_shape, data.num_classes).to(trial.device)
        errors: list[float] = []
        losses: list[float] = []

        def measure(epoch: int) -> None:
            logits = predict(model, x_test)
            errors.append(expected_calibration_error(logits.softmax(1), y_test))
            losses.append(F.cross_entropy(logits, y_test).item())

        epochs = trial.pick(smoke=3, laptop=self.epochs, paper=100)
        done = fit(
            model, x, y, num_classes=data.num_classes, epochs=epochs, trial=trial, after_epoch=measure, **options
        )
        probs = predict(model, x_test).softmax(1)
        passed = [float(epoch + 1) for epoch in range(epochs)]
        return Result(
            {
                "ece": errors[-1],
                "adaptive_ece": adaptive_calibration_error(probs, y_test),
                "nll": losses[-1],
                "aurc": area_under_risk_coverage(probs, y_test),
                "test_accuracy": (probs.argmax(1) == y_test).float().mean().item(),
                "seconds": done.seconds,
            },
            {"ece": Curve(passed, errors), "test_loss": Curve(passed, losses)},
        )
