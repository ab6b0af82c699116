"""The one supervised training loop, with the places where a method may enter.

A method enters as a loss, an optimizer, a penalty, a change of the network, or, where it trains in a way of its own
(two networks, mixed inputs, chosen samples), as a rule. The loop is the same for every contestant.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.studies.engine.study import Entrant, Setting, Trial


@dataclass(frozen=True)
class Plan:
    """What a method may need to know before training starts.

    Attributes:
        num_samples: size of the training set; also `len(plan)`.
        num_classes: number of classes.
        epochs: length of the training.
        steps_per_epoch: optimizer steps in an epoch.
        setting: the values that the search chose, or tries.
        seed: of the run.
    """

    num_samples: int
    num_classes: int
    epochs: int
    steps_per_epoch: int
    setting: Setting = field(default_factory=dict)
    seed: int = 0

    def __len__(self) -> int:
        return self.num_samples

    @property
    def lr(self) -> float:
        """The learning rate of the setting."""
        return float(self.setting.get("lr", 0.05))

    @property
    def weight_decay(self) -> float:
        """The weight decay of the setting."""
        return float(self.setting.get("weight_decay", 0.0))

    def generator(self, stream: int = 100) -> torch.Generator:
        """A CPU generator fixed by the run's seed, for a method that draws."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)


class Penalty(Protocol):
    """A term added to the loss. `update()` (after each step) and `set_epoch(epoch)` are called if they exist."""

    def __call__(
        self, logits: Float[Tensor, "batch classes"], x: Float[Tensor, "batch ..."], index: Int[Tensor, " batch"]
    ) -> Tensor: ...


Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
LossFactory = Callable[[Plan], nn.Module]
OptimizerFactory = Callable[[Any, Plan], torch.optim.Optimizer]
PenaltyFactory = Callable[[nn.Module, Plan], Penalty]
Prepare = Callable[[nn.Module, Plan], "Sequence[Mapping[str, Any]] | None"]


class Rule(Protocol):
    """A way to train. `set_epoch(epoch)` and `after_epoch()` are called if they exist.

    Attributes:
        optimizers: whose learning rates the loop anneals.
    """

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]: ...

    def step(self, x: Float[Tensor, "batch ..."], y: Int[Tensor, " batch"], index: Int[Tensor, " batch"]) -> Tensor:
        """One step on a batch; the loss, detached."""

    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Training(Entrant):
    """What a contestant of supervised training brings; what it leaves out is the task's own.

    Attributes:
        loss: makes the loss; `forward(logits, targets)`, or with a third parameter `index`.
        optimizer: makes the optimizer from parameters (or groups of them); it is stepped with a closure.
        penalty: makes a further term of the objective.
        prepare: changes a new network in place, and may return groups of its parameters for the optimizer.
        rule: makes a way to train of its own, in place of all of these.
    """

    loss: LossFactory | None = None
    optimizer: OptimizerFactory | None = None
    penalty: PenaltyFactory | None = None
    prepare: Prepare | None = None
    rule: Callable[[Workbench], Rule] | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and any((self.loss, self.penalty, self.prepare)):
            raise ValueError("rule must stand without loss, penalty and prepare: it trains in a way of its own")


def sgd(parameters: Parameters, plan: Plan) -> torch.optim.Optimizer:
    """SGD with momentum, at the rate and the weight decay of the setting: what trains where nothing else is brought."""
    return torch.optim.SGD(parameters, lr=plan.lr, momentum=0.9, weight_decay=plan.weight_decay)


class Workbench:
    """What a rule works with.

    Attributes:
        entrant: what the contestant brings.
        plan: length, sizes and setting.
        x, y: the training set.
        x_held, y_held: held-out samples with labels of the same kind, for choices within the method.
        trial: source of random draws, and of trained parts that are kept.
        device: where the networks are.
    """

    def __init__(
        self,
        entrant: Training,
        make_network: Callable[[], nn.Module],
        train: tuple[Tensor, Tensor],
        held_out: tuple[Tensor, Tensor],
        *,
        num_classes: int,
        epochs: int,
        trial: Trial,
        batch_size: int = 128,
    ) -> None:
        self.entrant = entrant
        self.x, self.y = train
        self.x_held, self.y_held = held_out
        self.batch_size = min(batch_size, len(self.y))
        self.plan = Plan(len(self.y), num_classes, epochs, len(self.y) // self.batch_size, trial.setting, trial.seed)
        self.trial = trial
        self.device = trial.device
        self._make_network = make_network

    def network(self, which: int = 0) -> nn.Module:
        """A new network, of an initialisation that the seed and its number decide."""
        return self.trial.seeded(self._make_network, which).to(self.device)

    def with_plan(self, **changes: Any) -> Workbench:
        """The same with another plan, unwatched, for a training within the training."""
        other = copy.copy(self)
        other.plan = replace(self.plan, **changes)
        other.trial = replace(self.trial, report=lambda fraction: None)
        return other

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """The entrant's optimizer, or SGD, for a network's parameters or groups of them."""
        return (self.entrant.optimizer or sgd)(parameters, self.plan)

    def rule(self) -> Rule:
        """The entrant's own way to train, or the plain one with what it brings."""
        return self.entrant.rule(self) if self.entrant.rule else Supervised(self)


class Supervised:
    """The plain way to train: one network, a loss, an optimizer, perhaps a penalty."""

    def __init__(self, bench: Workbench, network: nn.Module | None = None) -> None:
        entrant, plan = bench.entrant, bench.plan
        self.network = bench.network() if network is None else network
        groups = entrant.prepare(self.network, plan) if entrant.prepare else None
        self.network.to(bench.device)
        self.criterion = (entrant.loss(plan) if entrant.loss else nn.CrossEntropyLoss()).to(bench.device)
        own = [p for p in self.criterion.parameters() if p.requires_grad]
        if groups is None:
            parameters: Any = [p for p in self.network.parameters() if p.requires_grad] + own
        else:
            parameters = [*groups, {"params": own}] if own else list(groups)
        self.optimizer = bench.make_optimizer(parameters)
        self.optimizers = [self.optimizer]
        self.penalty = entrant.penalty(self.network, plan) if entrant.penalty else None
        self._takes_index = "index" in inspect.signature(self.criterion.forward).parameters

    def set_epoch(self, epoch: int) -> None:
        for part in (self.criterion, self.penalty):
            _call_if_there(part, "set_epoch", epoch)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.network.train()

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            logits = self.network(x)
            value: Tensor = self.criterion(logits, y, index) if self._takes_index else self.criterion(logits, y)
            if self.penalty is not None:
                value = value + self.penalty(logits, x, index)
            value.backward()
            return value.detach()

        value: Tensor = self.optimizer.step(closure)  # type: ignore[assignment, arg-type]
        _call_if_there(self.penalty, "update")
        return value

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network.eval()(x)
        return logits


@dataclass(frozen=True)
class Fit:
    """What training leaves behind, beside the rule itself.

    Attributes:
        seconds: of processor time in the training steps alone, evaluation left out.
        steps: number of steps.
        train_loss: mean loss of the last epoch.
    """

    seconds: float
    steps: int
    train_loss: float


def fit(bench: Workbench, rule: Rule, *, anneal: bool = True, after_epoch: Callable[[int], None] | None = None) -> Fit:
    """Train in place.

    Samples keep their index in the training set, which losses with a memory are given. The last batch of an epoch is
    dropped when it is not full, so that batch statistics never rest on a handful of samples. What draws from torch's
    global state (dropout, say) is fixed by the seed.

    Args:
        bench: data and plan.
        rule: how to train.
        anneal: cosine-anneal the learning rates to zero over the training.
        after_epoch: called with the 0-based epoch.
    """
    return bench.trial.seeded(lambda: _fit(bench, rule, anneal, after_epoch), stream=7)


def _fit(bench: Workbench, rule: Rule, anneal: bool, after_epoch: Callable[[int], None] | None) -> Fit:
    plan, trial = bench.plan, bench.trial
    steps = plan.epochs * plan.steps_per_epoch
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(held, steps) for held in rule.optimizers] if anneal else []
    order, seconds, total = trial.generator(1), 0.0, torch.zeros(())
    # A run has one thread, so that its processor time is what it would take alone, also where runs share the machine.
    clock = time.process_time if torch.device(trial.device).type == "cpu" else time.perf_counter
    for epoch in range(plan.epochs):
        started, total = clock(), torch.zeros((), device=trial.device)
        _call_if_there(rule, "set_epoch", epoch)
        batches = torch.randperm(plan.num_samples, generator=order)[: plan.steps_per_epoch * bench.batch_size]
        for index in batches.to(bench.x.device).view(plan.steps_per_epoch, bench.batch_size):
            total += rule.step(bench.x[index], bench.y[index], index)
            for schedule in schedules:
                schedule.step()
        seconds += clock() - started
        _call_if_there(rule, "after_epoch")
        if after_epoch is not None:
            after_epoch(epoch)
        trial.report((epoch + 1) / plan.epochs)
    return Fit(seconds, steps, total.item() / plan.steps_per_epoch)


def _call_if_there(part: object, method: str, *args: int) -> None:
    if callable(found := getattr(part, method, None)):
        found(*args)


@torch.no_grad()
def predict(model: Rule | nn.Module, x: Float[Tensor, "n ..."], batch_size: int = 2048) -> Float[Tensor, "n classes"]:
    """Logits of all samples, in batches, in eval mode; a network's mode is left as it was."""
    if not isinstance(model, nn.Module):
        return torch.cat([model.predict(part) for part in x.split(batch_size)])
    training = model.training
    model.eval()
    logits = torch.cat([model(part) for part in x.split(batch_size)])
    model.train(training)
    return logits


def accuracy(model: Rule | nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> float:
    """Share of the samples whose label is predicted."""
    return (predict(model, x).argmax(1) == y).float().mean().item()


def fitted(
    trial: Trial,
    entrant: Training,
    network: nn.Module,
    samples: tuple[Float[Tensor, "n ..."], Int[Tensor, " n ..."]],
    *,
    num_classes: int,
    epochs: int,
    lr: float | None = None,
    batch_size: int = 128,
    after_epoch: Callable[[int], None] | None = None,
) -> nn.Module:
    """A network, trained in place with what is brought, unless that is a rule of its own; in eval mode.

    Args:
        trial: the run.
        entrant: what is brought.
        network: is trained.
        samples: all that it sees; nothing is held out.
        num_classes: number of classes.
        epochs: passes over the samples.
        lr: learning rate of a training that is not the whole run, and reports nothing; None for the setting's.
        batch_size: samples of a step.
        after_epoch: called with the 0-based epoch.
    """
    if lr is not None:
        trial = replace(trial, setting={"lr": lr}, report=lambda fraction: None)
    none = samples[0][:0], samples[1][:0]
    bench = Workbench(
        entrant,
        lambda: network,
        samples,
        none,
        num_classes=num_classes,
        epochs=epochs,
        trial=trial,
        batch_size=batch_size,
    )
    fit(bench, Supervised(bench, network), after_epoch=after_epoch)
    return network.eval()
