"""Image classification from labels of which a known share is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from trimtab import nets
from trimtab.data import human_labels, load
from trimtab.losses.calibration import expected_calibration_error
from trimtab.losses.instance_noise import instance_dependent_noise
from trimtab.losses.label_noise import NoisyLabels, asymmetric_noise, symmetric_noise
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import LossFactory, OptimizerFactory, PenaltyFactory, fit, predict


@dataclass(frozen=True)
class LabelNoise(Task):
    """Train a small CNN on wrong labels and test it on right ones.

    The accuracy at the end of training is what counts: a network first learns what most labels agree on and later
    memorises the wrong ones, which lowers the final accuracy below the best one.

    Attributes:
        dataset: "fashion_mnist", "mnist", "cifar10" or "digits"; at the smoke budget always digits.
        kind: "symmetric" draws the wrong label from all classes, "asymmetric" flips a class to the next one,
            "instance" draws it from what the image looks like, and "human" takes the labels that people gave to
            CIFAR-10, wrong ones preferred (40 % are wrong, whatever the rate). At the smoke budget, which has no
            such labels, "human" is "instance".
        rate: probability that a label is drawn anew (symmetric), flipped (asymmetric) or wrong (instance).
    """

    dataset: str = "fashion_mnist"
    kind: Literal["symmetric", "asymmetric", "instance", "human"] = "symmetric"
    rate: float = 0.4

    name: ClassVar[str] = "label-noise"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "final_accuracy": Metric("final test accuracy (%)", percent=True),
        "best_accuracy": Metric("best test accuracy (%)", percent=True),
        "memorised": Metric("wrong labels memorised (%)", best="min", percent=True),
        "ece": Metric("calibration error (%)", best="min", percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }

    def __post_init__(self) -> None:
        if self.kind == "human" and self.dataset != "cifar10":
            raise ValueError(f"dataset: {self.dataset!r}; human labels are those of 'cifar10'")

    def train(
        self,
        loss: LossFactory | None = None,
        optimizer: OptimizerFactory | None = None,
        penalty: PenaltyFactory | None = None,
    ) -> Arm:
        """A contestant that brings its own loss, optimizer or penalty; without any it is cross-entropy with SGD."""
        return self.arm(loss=loss, optimizer=optimizer, penalty=penalty)

    def run(self, trial: Trial, **options: Any) -> Result:
        whole = load("digits" if trial.budget == "smoke" else self.dataset)
        train: int | None = trial.pick(smoke=1024, laptop=5_000, paper=None)
        test: int | None = trial.pick(smoke=256, laptop=5_000, paper=None)
        data = whole.subset(train, test, generator=trial.generator())
        draws = trial.generator(2)
        if self.kind == "human" and trial.budget != "smoke":
            given = replace(whole, y_train=human_labels("worse")).subset(train, generator=trial.generator()).y_train
            noisy = NoisyLabels(given, given != data.y_train)
        elif self.kind in ("instance", "human"):
            noisy = instance_dependent_noise(data.x_train, data.y_train, self.rate, data.num_classes, generator=draws)
        else:
            flip = symmetric_noise if self.kind == "symmetric" else asymmetric_noise
            noisy = flip(data.y_train, self.rate, data.num_classes, generator=draws)
        x, y = data.x_train.to(trial.device), noisy.targets.to(trial.device)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        wrong = noisy.is_noisy.to(trial.device)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = nets.small_cnn(data.in_shape, data.num_classes).to(trial.device)
        accuracy: list[float] = []
        memorised: list[float] = []

        def measure(epoch: int) -> None:
            accuracy.append((predict(model, x_test).argmax(1) == y_test).float().mean().item())
            learned = predict(model, x[wrong]).argmax(1) == y[wrong]
            memorised.append(learned.float().mean().item() if len(learned) else 0.0)

        epochs = trial.pick(smoke=4, laptop=30, paper=120)
        done = fit(
            model, x, y, num_classes=data.num_classes, epochs=epochs, trial=trial, after_epoch=measure, **options
        )
        probs = predict(model, x_test).softmax(1)
        steps = [float(epoch + 1) for epoch in range(epochs)]
        return Result(
            {
                "final_accuracy": accuracy[-1],
                "best_accuracy": max(accuracy),
                "memorised": memorised[-1],
                "ece": float(expected_calibration_error(probs, y_test)),
                "seconds": done.seconds,
            },
            {"test_accuracy": Curve(steps, accuracy), "memorised": Curve(steps, memorised)},
        )
