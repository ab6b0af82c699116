"""Image classification by networks that mix their training images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from trimtab import nets
from trimtab.data import load
from trimtab.losses.calibration import expected_calibration_error
from trimtab.studies.mixing import Parts, RuleFactory, fit_rule, make_rule
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import predict


@dataclass(frozen=True)
class MixupImages(Task):
    """Train a small CNN on few real images by Adam; all contestants see the same batches and make as many steps.

    Attributes:
        dataset: "fashion_mnist", "mnist" or "digits"; at the smoke budget always digits.
        samples: size of the training set at the laptop budget.
        epochs: length of the training at the laptop budget.
    """

    dataset: str = "fashion_mnist"
    samples: int = 5000
    epochs: int = 20

    name: ClassVar[str] = "mixup-images"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "test_loss": Metric("test loss", best="min"),
        "ece": Metric("calibration error (%)", best="min", percent=True),
        "seconds_per_step": Metric("time per step (s)", best="min"),
    }

    def train(self, rule: RuleFactory | None = None) -> Arm:
        """A contestant that builds its model from parts; without one it is a plain classifier."""
        return self.arm(rule=rule)

    def run(self, trial: Trial, rule: RuleFactory | None = None, **options: Any) -> Result:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        size = trial.pick(smoke=512, laptop=self.samples, paper=len(data.y_train))
        data = data.subset(train=size, generator=trial.generator())
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        epochs, between = trial.pick(smoke=3, laptop=self.epochs, paper=400), trial.pick(smoke=1, laptop=2, paper=10)
        channels, height, width = data.in_shape

        def trunk(side_by_side: int) -> nn.Module:
            return nets.small_cnn((side_by_side * channels, height, width)).features

        feature_dim = nets.small_cnn(data.in_shape).feature_dim
        model = make_rule(rule, Parts(trunk, feature_dim, data.num_classes), trial)
        accuracy: list[float] = []

        def after_epoch(epoch: int) -> None:
            if (epoch + 1) % between == 0:
                accuracy.append((predict(model, x_test).argmax(1) == y_test).float().mean().item())

        seconds = fit_rule(
            model,
            data.x_train.to(trial.device),
            data.y_train.to(trial.device),
            epochs=epochs,
            trial=trial,
            after_epoch=after_epoch,
        )
        logits = predict(model, x_test)
        return Result(
            {
                "test_accuracy": (logits.argmax(1) == y_test).float().mean().item(),
                "test_loss": F.cross_entropy(logits, y_test).item(),
                "ece": float(expected_calibration_error(logits.softmax(1), y_test)),
                "seconds_per_step": seconds,
            },
            {"test_accuracy": Curve([float(between * (i + 1)) for i in range(len(accuracy))], accuracy)},
        )
