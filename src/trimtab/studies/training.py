"""The supervised training loop of the studies, with the places where a method may enter.

A method enters as a loss, an optimizer or a penalty; the loop is the same for every contestant.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.studies.study import Trial


@dataclass(frozen=True)
class Plan:
    """What a loss or an optimizer may need to know before training starts.

    Attributes:
        num_samples: size of the training set; also `len(plan)`.
        num_classes: number of classes.
        epochs: length of the training.
        steps_per_epoch: optimizer steps in an epoch.
    """

    num_samples: int
    num_classes: int
    epochs: int
    steps_per_epoch: int

    def __len__(self) -> int:
        return self.num_samples


class Penalty(Protocol):
    """A term added to the loss. `update()` (after each step) and `set_epoch(epoch)` are called if they exist."""

    def __call__(
        self, logits: Float[Tensor, "batch classes"], x: Float[Tensor, "batch ..."], index: Int[Tensor, " batch"]
    ) -> Tensor: ...


LossFactory = Callable[[Plan], nn.Module]
OptimizerFactory = Callable[[Iterable[nn.Parameter], Plan], torch.optim.Optimizer]
PenaltyFactory = Callable[[nn.Module, Plan], Penalty]


def cross_entropy(plan: Plan) -> nn.Module:
    """The loss of the baseline."""
    return nn.CrossEntropyLoss()


def sgd(parameters: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """The optimizer of the baseline."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Fit:
    """What training leaves behind, beside the model itself.

    Attributes:
        seconds: time in the training steps alone, evaluation left out.
        steps: number of optimizer steps.
        train_loss: mean loss of the last epoch.
        optimizer: as it ended, so that its state can be measured.
    """

    seconds: float
    steps: int
    train_loss: float
    optimizer: torch.optim.Optimizer


def fit(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    num_classes: int,
    epochs: int,
    trial: Trial,
    batch_size: int = 128,
    loss: LossFactory | None = None,
    optimizer: OptimizerFactory | None = None,
    penalty: PenaltyFactory | None = None,
    anneal: bool = True,
    after_epoch: Callable[[int], None] | None = None,
) -> Fit:
    """Train a classifier in place.

    Samples keep their index in `x`, which losses with a memory are given. The last batch of an epoch is dropped when
    it is not full, so that batch statistics never rest on a handful of samples.

    Args:
        model: maps a batch to logits.
        x, y: the training set.
        num_classes: number of classes.
        epochs: passes over the data.
        trial: seed (the order of the samples), device and progress.
        batch_size: samples in a step; at most the size of the training set.
        loss: makes the loss; `forward(logits, targets)`, or with a third parameter `index`.
        optimizer: makes the optimizer, which is stepped with a closure.
        penalty: makes a further term of the objective.
        anneal: cosine-anneal the learning rate to zero over the training.
        after_epoch: called with the 0-based epoch, in eval mode.
    """
    batch_size = min(batch_size, len(y))
    plan = Plan(len(y), num_classes, epochs, len(y) // batch_size)
    criterion = (loss or cross_entropy)(plan).to(trial.device)
    parameters = [p for module in (model, criterion) for p in module.parameters() if p.requires_grad]
    stepper = (optimizer or sgd)(parameters, plan)
    extra = penalty(model, plan) if penalty else None
    takes_index = "index" in inspect.signature(criterion.forward).parameters
    steps = epochs * plan.steps_per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, steps) if anneal else None
    order, seconds, total = trial.generator(1), 0.0, torch.zeros(())
    # A run has one thread, so that its processor time is what it would take alone, also where runs share the machine.
    clock = time.process_time if torch.device(trial.device).type == "cpu" else time.perf_counter
    for epoch in range(epochs):
        for part in (criterion, extra):
            _call_if_there(part, "set_epoch", epoch)
        model.train()
        started, total = clock(), torch.zeros((), device=trial.device)
        batches = torch.randperm(len(y), generator=order)[: plan.steps_per_epoch * batch_size].to(x.device)
        for index in batches.view(plan.steps_per_epoch, batch_size):
            inputs, targets = x[index], y[index]

            def closure(inputs: Tensor = inputs, targets: Tensor = targets, index: Tensor = index) -> Tensor:
                stepper.zero_grad()
                logits = model(inputs)
                value: Tensor = criterion(logits, targets, index) if takes_index else criterion(logits, targets)
                if extra is not None:
                    value = value + extra(logits, inputs, index)
                value.backward()
                return value.detach()

            total += stepper.step(closure)  # type: ignore[arg-type]
            if schedule is not None:
                schedule.step()
            _call_if_there(extra, "update")
        seconds += clock() - started
        if after_epoch is not None:
            model.eval()
            after_epoch(epoch)
        trial.report((epoch + 1) / epochs)
    model.eval()
    return Fit(seconds, steps, total.item() / plan.steps_per_epoch, stepper)


def _call_if_there(part: object, method: str, *args: int) -> None:
    if callable(found := getattr(part, method, None)):
        found(*args)


@torch.no_grad()
def predict(model: nn.Module, x: Float[Tensor, "n ..."], batch_size: int = 2048) -> Float[Tensor, "n classes"]:
    """Logits of all samples, in batches, in eval mode; the model's mode is left as it was."""
    training = model.training
    model.eval()
    logits = torch.cat([model(part) for part in x.split(batch_size)])
    model.train(training)
    return logits
