"""Plain image classification: accuracy, calibration, sharpness, and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from trimtab import nets
from trimtab.data import load
from trimtab.losses.calibration import expected_calibration_error
from trimtab.losses.label_noise import symmetric_noise
from trimtab.nets.vit import vit
from trimtab.optim.sharpness import sam_sharpness
from trimtab.studies.lr_search import best_learning_rate
from trimtab.studies.peak_memory import peak_memory
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import LossFactory, OptimizerFactory, PenaltyFactory, Plan, fit, predict

OptimizerWithRate = Callable[[Iterable[nn.Parameter], Plan, float], torch.optim.Optimizer]
_PROBED = 1000


@dataclass(frozen=True)
class ImageClassification(Task):
    """Train a small network on real images for a few epochs.

    Attributes:
        dataset: "fashion_mnist", "mnist" or "digits"; at the smoke budget always digits.
        net: "cnn", "mlp" or "vit".
        noise: share of training labels drawn anew, 0 for clean labels.
        epochs: length of the training at the laptop budget.

    Training loss and sharpness (the rise of the loss 0.05 up its gradient) are those of 1,000 training samples, with
    the labels that were trained on, in eval mode. Peak memory is that of training a second such network for two steps,
    the method's own memory of the training set included, network and images left out.
    """

    dataset: str = "fashion_mnist"
    net: Literal["cnn", "mlp", "vit"] = "cnn"
    noise: float = 0.0
    epochs: int = 8

    name: ClassVar[str] = "image-classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "train_loss": Metric("training loss", best="min"),
        "first_epoch_loss": Metric("training loss after one epoch", best="min"),
        "ece": Metric("calibration error (%)", best="min", percent=True),
        "sharpness": Metric("rise of the loss at distance 0.05", best="min"),
        "seconds_per_step": Metric("time per step (s)", best="min"),
        "optimizer_state_bytes": Metric("optimizer state (bytes)", best="min"),
        "peak_memory_bytes": Metric("peak memory of training (bytes)", best="min"),
        "learning_rate": Metric("learning rate", best=None),
    }

    def train(
        self,
        loss: LossFactory | None = None,
        optimizer: OptimizerFactory | OptimizerWithRate | None = None,
        penalty: PenaltyFactory | None = None,
        lr: Sequence[float] | None = None,
    ) -> Arm:
        """A contestant that brings its own loss, optimizer or penalty; without any it is cross-entropy with SGD.

        With `lr`, the optimizer is called with a third argument: the best of these rates in trainings of a third of
        the length on half of the training set, by the accuracy on another fifth of it.
        """
        return self.arm(loss=loss, optimizer=optimizer, penalty=penalty, lr=lr)

    def run(self, trial: Trial, lr: Sequence[float] | None = None, **options: Any) -> Result:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        size = trial.pick(smoke=1024, laptop=10_000, paper=len(data.y_train))
        data = data.subset(train=size, test=trial.pick(smoke=256, laptop=None, paper=None), generator=trial.generator())
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        if self.noise:
            y = symmetric_noise(data.y_train, self.noise, data.num_classes, generator=trial.generator(2)).targets.to(y)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        epochs = trial.pick(smoke=3, laptop=self.epochs, paper=50)

        def network() -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                if self.net == "vit":
                    return vit(data.in_shape, data.num_classes).to(trial.device)
                if self.net == "mlp":
                    return nets.mlp(x[0].numel(), num_classes=data.num_classes).to(trial.device)
                return nets.small_cnn(data.in_shape, data.num_classes).to(trial.device)

        if lr is not None:
            make, held_out, seen = options["optimizer"], len(y) // 5, slice(len(y) // 5, len(y) * 7 // 10)

            def score(rate: float) -> float:
                model = network()
                fit(
                    model,
                    x[seen],
                    y[seen],
                    num_classes=data.num_classes,
                    epochs=max(1, epochs // 3),
                    trial=replace(trial, report=lambda fraction: None),
                    **{**options, "optimizer": lambda params, plan: make(params, plan, rate)},
                )
                return (predict(model, x[:held_out]).argmax(1) == y[:held_out]).float().mean().item()

            rate = best_learning_rate(lr, score)
            options["optimizer"] = lambda params, plan: make(params, plan, rate)

        model = network()
        probe = partial(_probe_loss, model, x[:_PROBED], y[:_PROBED])
        accuracy: list[float] = []
        losses: list[float] = []

        def after_epoch(epoch: int) -> None:
            accuracy.append((predict(model, x_test).argmax(1) == y_test).float().mean().item())
            with torch.no_grad():
                losses.append(probe().item())

        done = fit(
            model,
            x,
            y,
            num_classes=data.num_classes,
            epochs=epochs,
            trial=trial,
            after_epoch=after_epoch,
            **options,
        )
        state = (value for held in done.optimizer.state.values() for value in held.values())
        passed = [float(e + 1) for e in range(epochs)]
        return Result(
            {
                "test_accuracy": accuracy[-1],
                "train_loss": losses[-1],
                "first_epoch_loss": losses[0],
                "ece": float(expected_calibration_error(predict(model, x_test).softmax(1), y_test)),
                "sharpness": sam_sharpness(probe, model.parameters(), rho=0.05),
                "seconds_per_step": done.seconds / done.steps,
                "optimizer_state_bytes": float(
                    sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor) and t.dim())
                ),
                "peak_memory_bytes": float(
                    peak_memory(partial(_two_steps, network(), x, y, data.num_classes, trial, **options), trial.device)
                ),
                "learning_rate": float(done.optimizer.defaults["lr"]),
            },
            {"test_accuracy": Curve(passed, accuracy), "train_loss": Curve(passed, losses)},
        )


def _two_steps(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    num_classes: int,
    trial: Trial,
    loss: LossFactory | None = None,
    **options: Any,
) -> None:
    """A training of two steps, with a loss that is made for the whole training set."""
    make = loss and (lambda plan: loss(replace(plan, num_samples=len(y))))
    quiet = replace(trial, report=lambda fraction: None)
    fit(model, x[:256], y[:256], num_classes=num_classes, epochs=1, trial=quiet, loss=make, **options)


def _probe_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)
