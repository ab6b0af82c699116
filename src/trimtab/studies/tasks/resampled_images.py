"""Image classification on changed data: some training examples are repeated, the number of iterations stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.optim.useful import EarlyOutputs, UpsampledSampler, find_separating_epoch
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import OptimizerFactory, fit, predict

# Which examples to train on, some repeatedly, from what a network says of them early in training.
Selection = Callable[[EarlyOutputs, torch.Generator], Tensor]


@dataclass(frozen=True)
class ResampledImages(Task):
    """Train a small CNN by SGD, choose examples to repeat from its early outputs, and train anew.

    The outputs are those after the epoch at which the training error of the first training stops falling steeply. The
    first training is the same for all contestants, at a constant learning rate, as early training is. The second one,
    annealed, has as many steps whatever is repeated: an epoch draws as many examples as the data set has, without
    replacement, from those chosen.

    Attributes:
        dataset: "fashion_mnist", "mnist" or "digits"; at the smoke budget always digits.
        epochs: length of both trainings at the laptop budget.
    """

    dataset: str = "fashion_mnist"
    epochs: int = 10

    name: ClassVar[str] = "resampled-images"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "test_loss": Metric("test loss", best="min"),
        "train_accuracy": Metric("training accuracy (%)", best=None, percent=True),
        "repeated": Metric("examples repeated (%)", best=None, percent=True),
        "separating_epoch": Metric("epochs before the outputs are taken", best=None),
        "seconds": Metric("training time, with the first training up to its outputs (s)", best="min"),
    }

    def train(self, select: Selection | None = None, optimizer: OptimizerFactory | None = None) -> Arm:
        """A contestant that chooses examples, called (early outputs, generator), or brings its optimizer.

        Without a choice it trains on the data as they are, without an optimizer by SGD.
        """
        return self.arm(select=select, optimizer=optimizer)

    def run(
        self,
        trial: Trial,
        select: Selection | None = None,
        optimizer: OptimizerFactory | None = None,
        **options: Any,
    ) -> Result:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        data = data.subset(
            train=trial.pick(smoke=384, laptop=10_000, paper=len(data.y_train)), generator=trial.generator()
        )
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        epochs = trial.pick(smoke=4, laptop=self.epochs, paper=200)

        def network() -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(trial.seed)
                return nets.small_cnn(data.in_shape, data.num_classes).to(trial.device)

        def first_training() -> dict[str, Tensor]:
            model = network()
            outputs = [predict(model, x).cpu()]
            done = fit(
                model,
                x,
                y,
                num_classes=data.num_classes,
                epochs=epochs,
                trial=replace(trial, report=lambda fraction: None),
                anneal=False,
                after_epoch=lambda epoch: outputs.append(predict(model, x).cpu()),
            )
            errors = [(logits.argmax(1) != y.cpu()).float().mean().item() for logits in outputs]
            taken = find_separating_epoch(errors)
            seconds = done.seconds * taken / epochs
            return {"outputs": outputs[taken], "epochs": torch.tensor(taken), "seconds": torch.tensor(seconds)}

        indices, taken, seconds = torch.arange(len(y)), 0, 0.0
        if select is not None:
            key = f"early outputs of {self.dataset}, {epochs} epochs, seed {trial.seed}, {trial.device}"
            first = trial.cached(first_training, key=key)
            losses = F.cross_entropy(first["outputs"], y.cpu(), reduction="none")
            indices = select(EarlyOutputs(first["outputs"], y.cpu(), losses), trial.generator(2))
            taken, seconds = int(first["epochs"]), float(first["seconds"])

        sampler = UpsampledSampler(indices, num_samples=len(y), generator=trial.generator(3))
        x_epoch, y_epoch = torch.empty_like(x), torch.empty_like(y)

        def draw() -> None:
            drawn = torch.tensor(list(sampler), device=x.device)
            x_epoch.copy_(x[drawn])
            y_epoch.copy_(y[drawn])

        model = network()
        accuracy: list[float] = []

        def after_epoch(epoch: int) -> None:
            accuracy.append((predict(model, x_test).argmax(1) == y_test).float().mean().item())
            draw()

        draw()
        done = fit(
            model,
            x_epoch,
            y_epoch,
            num_classes=data.num_classes,
            epochs=epochs,
            trial=trial,
            optimizer=optimizer,
            after_epoch=after_epoch,
        )
        return Result(
            {
                "test_accuracy": accuracy[-1],
                "test_loss": F.cross_entropy(predict(model, x_test), y_test).item(),
                "train_accuracy": (predict(model, x).argmax(1) == y).float().mean().item(),
                "repeated": len(indices) / len(y) - 1,
                "separating_epoch": float(taken),
                "seconds": done.seconds + seconds,
            },
            {"test_accuracy": Curve([float(e + 1) for e in range(epochs)], accuracy)},
        )
