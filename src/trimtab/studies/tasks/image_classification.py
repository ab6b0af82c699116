"""Plain image classification: accuracy, calibration, and what a step costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from trimtab import nets
from trimtab.data import load
from trimtab.losses.calibration import expected_calibration_error
from trimtab.losses.label_noise import symmetric_noise
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import LossFactory, OptimizerFactory, PenaltyFactory, fit, predict


@dataclass(frozen=True)
class ImageClassification(Task):
    """Train a small network on real images for a few epochs.

    Attributes:
        dataset: "fashion_mnist", "mnist" or "digits"; at the smoke budget always digits.
        net: "cnn" or "mlp".
        noise: share of training labels drawn anew, 0 for clean labels.
        epochs: length of the training at the laptop budget.
    """

    dataset: str = "fashion_mnist"
    net: Literal["cnn", "mlp"] = "cnn"
    noise: float = 0.0
    epochs: int = 8

    name: ClassVar[str] = "image-classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "train_loss": Metric("training loss", best="min"),
        "ece": Metric("calibration error (%)", best="min", percent=True),
        "seconds_per_step": Metric("time per step (s)", best="min"),
        "optimizer_state_bytes": Metric("optimizer state (bytes)", best="min"),
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
        size = trial.pick(smoke=1024, laptop=10_000, paper=len(data.y_train))
        data = data.subset(train=size, test=trial.pick(smoke=256, laptop=None, paper=None), generator=trial.generator())
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        if self.noise:
            y = symmetric_noise(data.y_train, self.noise, data.num_classes, generator=trial.generator(2)).targets.to(y)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = {
                "cnn": lambda: nets.small_cnn(data.in_shape, data.num_classes),
                "mlp": lambda: nets.mlp(x[0].numel(), num_classes=data.num_classes),
            }[self.net]().to(trial.device)
        accuracy: list[float] = []
        epochs = trial.pick(smoke=3, laptop=self.epochs, paper=50)
        done = fit(
            model,
            x,
            y,
            num_classes=data.num_classes,
            epochs=epochs,
            trial=trial,
            after_epoch=lambda epoch: accuracy.append(
                (predict(model, x_test).argmax(1) == y_test).float().mean().item()
            ),
            **options,
        )
        state = (value for held in done.optimizer.state.values() for value in held.values())
        return Result(
            {
                "test_accuracy": accuracy[-1],
                "train_loss": done.train_loss,
                "ece": float(expected_calibration_error(predict(model, x_test).softmax(1), y_test)),
                "seconds_per_step": done.seconds / done.steps,
                "optimizer_state_bytes": float(
                    sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor) and t.dim())
                ),
            },
            {"test_accuracy": Curve([float(e + 1) for e in range(epochs)], accuracy)},
        )
