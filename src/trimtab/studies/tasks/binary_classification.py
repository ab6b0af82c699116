"""Binary classification with a network that can fit every training label."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.losses.ensloss import signed_margins
from trimtab.losses.label_noise import symmetric_noise
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import LossFactory, OptimizerFactory, fit, predict


class MarginLoss(nn.Module):
    """The mean of a function of the margin `(2 y - 1) f`."""

    def __init__(self, of_margin: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of_margin = of_margin

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.of_margin(signed_margins(logits, targets)).mean()


def logistic() -> MarginLoss:
    """Binary cross-entropy."""
    return MarginLoss(lambda margin: F.softplus(-margin))


def hinge() -> MarginLoss:
    """The loss of support vector machines."""
    return MarginLoss(lambda margin: (1 - margin).relu())


def exponential() -> MarginLoss:
    """The loss of AdaBoost; train it with clipped gradients."""
    return MarginLoss(lambda margin: (-margin).exp())


@dataclass(frozen=True)
class BinaryClassification(Task):
    """Tell two classes apart with an MLP of two layers of 512, trained long after it has fitted its labels.

    Attributes:
        dataset: "fashion_mnist", "mnist", "digits" or "breast_cancer"; at the smoke budget digits in place of images.
        pair: the two classes.
        noise: share of training labels drawn anew, 0 for clean labels.
    """

    dataset: str = "fashion_mnist"
    pair: tuple[int, int] = (2, 4)
    noise: float = 0.0

    name: ClassVar[str] = "binary-classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "best_accuracy": Metric("best test accuracy (%)", percent=True),
        "train_accuracy": Metric("accuracy on the training labels (%)", best=None, percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(self, loss: LossFactory | None = None, optimizer: OptimizerFactory | None = None) -> Arm:
        """A contestant that brings its loss, called (logits of shape (batch, 1), labels 0 and 1), or its optimizer.

        Without a loss it is the logistic one, without an optimizer SGD with learning rate 0.01 and momentum 0.9.
        """
        return self.arm(loss=loss, optimizer=optimizer)

    def run(
        self,
        trial: Trial,
        loss: LossFactory | None = None,
        optimizer: OptimizerFactory | None = None,
        **options: Any,
    ) -> Result:
        images = self.dataset != "breast_cancer"
        data = load("digits" if trial.budget == "smoke" and images else self.dataset).classes(list(self.pair))
        data = data.subset(
            train=trial.pick(smoke=200, laptop=1_500, paper=len(data.y_train)), generator=trial.generator()
        )
        targets = data.y_train
        if self.noise:
            targets = symmetric_noise(targets, self.noise, 2, generator=trial.generator(2)).targets
        x, y = data.x_train.to(trial.device), targets.to(trial.device)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        accuracy: list[float] = []

        def correct(inputs: Tensor, labels: Tensor) -> float:
            return ((predict(model, inputs)[:, 0] > 0) == (labels == 1)).float().mean().item()

        epochs, between = trial.pick(smoke=5, laptop=100, paper=300), trial.pick(smoke=1, laptop=5, paper=5)

        def measure(epoch: int) -> None:
            if (epoch + 1) % between == 0:
                accuracy.append(correct(x_test, y_test))

        # Random losses draw from torch's global generator, which is seeded here for the whole training.
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = nets.mlp(x[0].numel(), hidden=(512, 512), num_classes=1).to(trial.device)
            done = fit(
                model,
                x,
                y,
                num_classes=2,
                epochs=epochs,
                trial=trial,
                loss=loss or (lambda plan: logistic()),
                optimizer=optimizer or (lambda parameters, plan: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)),
                after_epoch=measure,
            )
        return Result(
            {
                "test_accuracy": accuracy[-1],
                "best_accuracy": max(accuracy),
                "train_accuracy": correct(x, y),
                "seconds": done.seconds,
            },
            {"test_accuracy": Curve([float(between * (i + 1)) for i in range(len(accuracy))], accuracy)},
        )
