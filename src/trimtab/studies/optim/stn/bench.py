"""Tuning the regularisation of a small network that overfits: how good it gets, and what the tuning costs.

Dropout rates and a weight decay are tuned by as many validation images as there are training images. Every training is
judged by the epoch with its lowest validation loss, and by the test images there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.stopwatch import Stopwatch
from trimtab.studies.tools.training import predict

METRICS = {
    "test_loss": Metric("test loss (nats)", best="min"),
    "test_accuracy": Metric("test accuracy (%)", percent=True),
    "valid_loss": Metric("validation loss (nats)", best="min"),
    "last_test_loss": Metric("test loss after the last epoch (nats)", best="min"),
    "seconds": Metric("time of all trainings (s)", best="min"),
    "dropout": Metric("mean dropout rate at the end", best=None),
}

Values = Mapping[str, float]

# Where each dropout layer of the network is, and the name of its rate.
DROPOUT = {"1": "input dropout", "4": "first dropout", "7": "second dropout"}
NAMES = (*DROPOUT.values(), "weight decay")


@dataclass(frozen=True)
class Training:
    """What one training came to; plain numbers, so that it can be kept (`vars`).

    Attributes:
        seconds: processor time of the training steps, evaluation left out.
        valid_losses: after each epoch.
        test_loss, test_accuracy: of the network after the epoch with the lowest validation loss, which is kept.
        last_test_loss: of the network after the last epoch.
        schedule: the values of the hyper-parameters after each epoch, by name.
    """

    seconds: float
    valid_losses: list[float]
    test_loss: float
    test_accuracy: float
    last_test_loss: float
    schedule: dict[str, list[float]]

    @property
    def valid_loss(self) -> float:
        """Lowest validation loss."""
        return min(self.valid_losses)


@dataclass(frozen=True)
class Bench:
    """The data and the network that are regularised, and one training of it.

    Attributes:
        train, valid, test: inputs and labels of each part.
        num_classes: number of classes.
        width: units in each of the two hidden layers.
        epochs: length of a training.
        points: trainings that a search may make.
        trial: seed, device, progress, and trained parts that arms share.
    """

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    width: int
    epochs: int
    points: int
    trial: Trial
    batch_size: int = 128

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Within the block, what draws without a generator (initialisation, dropout) draws the same for every arm."""
        with torch.random.fork_rng():
            torch.manual_seed(self.trial.seed)
            yield

    def network(self) -> nn.Module:
        """Two hidden layers, with dropout of the input and of both layers; the same at every call."""
        with self.seeded():
            return nn.Sequential(
                nn.Flatten(),
                nn.Dropout(0.0),
                nn.Linear(self.train[0][0].numel(), self.width),
                nn.ReLU(),
                nn.Dropout(0.0),
                nn.Linear(self.width, self.width),
                nn.ReLU(),
                nn.Dropout(0.0),
                nn.Linear(self.width, self.num_classes),
            ).to(self.trial.device)

    def batches(self, part: tuple[Tensor, Tensor], order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over a part in random order, without a last batch that is not full."""
        x, y = part
        size = min(self.batch_size, len(y))
        for index in torch.randperm(len(y), generator=order)[: len(y) // size * size].view(-1, size):
            yield x[index], y[index]

    def sgd(self, groups: Any) -> torch.optim.Optimizer:
        """The optimizer of every contestant."""
        return torch.optim.SGD(groups, lr=0.03, momentum=0.9)

    def follow(
        self,
        state: nn.Module,
        run_epoch: Callable[[], object],
        outputs: Callable[[Tensor], Tensor],
        values: Callable[[], Values],
    ) -> Training:
        """Train for the epochs there are, and keep the network of the one with the lowest validation loss.

        Args:
            state: all that the outputs depend on.
            run_epoch: one epoch of training, and of tuning if it is done on the way.
            outputs: logits of a batch in eval mode.
            values: the present values of the hyper-parameters.
        """
        watch, losses, kept = Stopwatch(self.trial.device), [], copy.deepcopy(state.state_dict())
        schedule: dict[str, list[float]] = {name: [] for name in values()}
        with self.seeded():
            for _ in range(self.epochs):
                with watch:
                    run_epoch()
                losses.append(F.cross_entropy(outputs(self.valid[0]), self.valid[1]).item())
                if losses[-1] <= min(losses):
                    kept = copy.deepcopy(state.state_dict())
                for name, value in values().items():
                    schedule[name].append(value)
        last_test_loss = F.cross_entropy(outputs(self.test[0]), self.test[1]).item()
        state.load_state_dict(kept)
        logits = outputs(self.test[0])
        return Training(
            watch.seconds,
            losses,
            F.cross_entropy(logits, self.test[1]).item(),
            (logits.argmax(1) == self.test[1]).float().mean().item(),
            last_test_loss,
            schedule,
        )

    def fit(self, values: Values) -> Training:
        """One training with fixed dropout rates and a fixed weight decay."""
        model, order = self.network(), self.trial.generator(1)
        for name, hparam in DROPOUT.items():
            cast(nn.Dropout, model.get_submodule(name)).p = values[hparam]
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        weights = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        sgd = self.sgd([{"params": weights, "weight_decay": values["weight decay"]}, {"params": biases}])

        def run_epoch() -> None:
            model.train()
            for x, y in self.batches(self.train, order):
                descent_step(sgd, F.cross_entropy(model(x), y))

        return self.follow(model, run_epoch, lambda x: predict(model, x), lambda: values)

    def kept(self, build: Callable[[], list[Training]], key: str) -> list[Training]:
        """What `build` returns, made once for all arms of a seed."""
        of = f"seed {self.trial.seed} epochs {self.epochs} shape {tuple(self.train[0].shape)}"
        found = self.trial.cached(lambda: [vars(training) for training in build()], key=f"{key} {of}")
        return [Training(**training) for training in found]


@dataclass(frozen=True)
class Tuned:
    """What a way of tuning ends with.

    Attributes:
        training: the training whose network it keeps.
        seconds: processor time of all trainings it needed.
    """

    training: Training
    seconds: float


Strategy = Callable[[Bench], Tuned]


def bench(trial: Trial) -> Bench:
    """Data and network of a trial."""
    data = load("digits" if trial.budget == "smoke" else "fashion_mnist")
    size = trial.pick(smoke=256, laptop=2000, paper=10_000)
    data = data.subset(train=2 * size, test=trial.pick(smoke=256, laptop=None, paper=None), generator=trial.generator())
    x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
    return Bench(
        train=(x[:size], y[:size]),
        valid=(x[size:], y[size:]),
        test=(data.x_test.to(trial.device), data.y_test.to(trial.device)),
        num_classes=data.num_classes,
        width=trial.pick(smoke=32, laptop=256, paper=1024),
        epochs=trial.pick(smoke=20, laptop=40, paper=200),
        points=trial.pick(smoke=3, laptop=10, paper=30),
        trial=trial,
    )


def tune(strategy: Strategy, trial: Trial) -> Result:
    """One way of tuning, from beginning to end."""
    tuned = strategy(bench(trial))
    trial.report(1.0)
    training = tuned.training
    passed = [float(e + 1) for e in range(len(training.valid_losses))]
    rates = [training.schedule[name][-1] for name in DROPOUT.values()]
    return Result(
        {
            "test_loss": training.test_loss,
            "test_accuracy": training.test_accuracy,
            "valid_loss": training.valid_loss,
            "last_test_loss": training.last_test_loss,
            "seconds": tuned.seconds,
            "dropout": math.fsum(rates) / len(rates),
        },
        {
            "valid_loss": Curve(passed, training.valid_losses),
            **{name.replace(" ", "_"): Curve(passed, values) for name, values in training.schedule.items()},
        },
    )
