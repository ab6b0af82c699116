"""Training on several source domains at once, with the places where a method may enter.

A method enters as a penalty on what the domains' forward pass gives, as a way to weigh the domains' losses, as a
change of the batch, of the network or of the optimizer, as a predictor that takes over after training, or, where it
trains in a way of its own, as a rule. The loop is the same for every contestant.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.domain.environments import DomainBatch, domain_batches
from trimtab.nets import Classifier
from trimtab.studies.engine.study import Entrant, Setting, Trial


@dataclass(frozen=True)
class DomainPlan:
    """What a method may need to know before training starts.

    Attributes:
        num_domains: number of source domains.
        num_classes: number of classes.
        in_shape: shape of a sample.
        steps: optimizer steps of the training.
        setting: the values that the search chose, or tries.
        seed: of the run.
    """

    num_domains: int
    num_classes: int
    in_shape: tuple[int, ...]
    steps: int
    setting: Setting = field(default_factory=dict)
    seed: int = 0

    @property
    def lr(self) -> float:
        """The learning rate of the setting."""
        return float(self.setting.get("lr", 1e-3))

    @property
    def weight_decay(self) -> float:
        """The weight decay of the setting."""
        return float(self.setting.get("weight_decay", 1e-3))

    @property
    def weight(self) -> float:
        """The weight of a penalty in the setting; 1 where there is none."""
        return float(self.setting.get("weight", 1.0))

    def generator(self, stream: int = 100) -> torch.Generator:
        """A CPU generator fixed by the run's seed, for a method that draws."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + stream)


@dataclass(frozen=True)
class Seen:
    """What the forward pass of a batch gives, one entry a domain.

    Attributes:
        losses: mean cross-entropy of each domain, scalars with their graph.
        features: (batch, dim).
        logits: (batch, classes).
        targets: (batch,).
    """

    losses: list[Float[Tensor, ""]]
    features: list[Float[Tensor, "batch dim"]]
    logits: list[Float[Tensor, "batch classes"]]
    targets: list[Int[Tensor, " batch"]]


Penalty = Callable[[Seen], Tensor]
Risk = Callable[[Float[Tensor, " domains"]], Tensor]


class DomainRule(Protocol):
    """A way to train on domains. A `network` (a `Classifier`), `begin()`, called before samples of another domain are
    predicted, and `predictor` are used where they exist."""

    def step(self, batch: DomainBatch) -> Tensor:
        """One step on a batch; the loss, detached."""

    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Scores of the classes in eval mode: logits or probabilities."""


class Predictor(Protocol):
    """What predicts in the network's place after training. `begin()` is called before each domain, where it exists."""

    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Scores of the classes of one batch of a stream; it may learn from it."""


@dataclass(frozen=True, kw_only=True)
class DomainTraining(Entrant):
    """What a contestant of domain generalisation brings; what it leaves out is empirical risk minimisation's.

    A penalty's weight is `setting["weight"]`, or 1. For the first quarter of the training it is 1 at most; later the
    loss is divided by the weight where that is above 1, so that steps stay of one size.

    Attributes:
        penalty: makes a further term of the objective from the network and the plan.
        risk: makes a function from the domains' losses to the loss; their mean where it is None.
        augment: makes a function that changes each batch.
        prepare: changes a new network in place.
        optimizer: makes the optimizer from parameters; it is stepped with a closure.
        rule: makes a way to train of its own, in place of all of these.
        predictor: makes, from the trained network, what predicts in its place; it sees each domain as a stream of
            batches of `STREAM` samples.
    """

    penalty: Callable[[Classifier, DomainPlan], Penalty] | None = None
    risk: Callable[[DomainPlan], Risk] | None = None
    augment: Callable[[DomainPlan], Callable[[DomainBatch], DomainBatch]] | None = None
    prepare: Callable[[Classifier, DomainPlan], None] | None = None
    optimizer: Callable[[Any, DomainPlan], torch.optim.Optimizer] | None = None
    rule: Callable[[DomainBench], DomainRule] | None = None
    predictor: Callable[[Classifier, DomainBench], Predictor] | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and any((self.penalty, self.risk, self.augment)):
            raise ValueError("rule must stand without penalty, risk and augment: it trains in a way of its own")


STREAM = 50
"""Samples that a predictor sees at a time."""

_WARM = 0.25


def adamw(parameters: Any, plan: DomainPlan) -> torch.optim.Optimizer:
    """AdamW at the setting's rate and weight decay: what trains where nothing else is brought."""
    return torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)


@dataclass(frozen=True)
class DomainBench:
    """What a rule works with.

    Attributes:
        entrant: what the contestant brings.
        plan: length, sizes and setting.
        sources: the training samples of each source domain.
        held: held-out samples of each source domain, for choices within the method.
        batch_size: samples of each domain in a batch.
        make_network: a new classifier, from torch's global random state.
        trial: source of random draws, and of trained parts that are kept.
    """

    entrant: DomainTraining
    plan: DomainPlan
    sources: DomainBatch
    held: DomainBatch
    batch_size: int
    make_network: Callable[[], Classifier]
    trial: Trial

    def network(self, which: int = 0) -> Classifier:
        """A new network, prepared by the entrant, of weights that the seed and its number decide."""

        def build() -> Classifier:
            network = self.make_network()
            if self.entrant.prepare is not None:
                self.entrant.prepare(network, self.plan)
            return network

        return self.trial.seeded(build, which).to(self.trial.device)

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """The entrant's optimizer, or AdamW."""
        return (self.entrant.optimizer or adamw)(parameters, self.plan)

    def rule(self) -> DomainRule:
        """The entrant's own way to train, or the plain one with what it brings."""
        return self.entrant.rule(self) if self.entrant.rule else RiskMinimization(self)


class RiskMinimization:
    """The plain way to train: one network on all domains, their mean loss, perhaps a penalty."""

    def __init__(self, bench: DomainBench) -> None:
        entrant, plan = bench.entrant, bench.plan
        self.bench, self.plan = bench, plan
        self.network = bench.network()
        self.optimizer = bench.make_optimizer(self.network.parameters())
        self.penalty = entrant.penalty(self.network, plan) if entrant.penalty else None
        self.risk: Risk = entrant.risk(plan) if entrant.risk else torch.mean
        self.augment = entrant.augment(plan) if entrant.augment else None
        self.steps_done = 0

    def step(self, batch: DomainBatch) -> Tensor:
        self.network.train()
        if self.augment is not None:
            batch = self.augment(batch)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value = self.objective(batch)
            value.backward()
            return value.detach()

        value: Tensor = self.optimizer.step(closure)  # type: ignore[assignment, arg-type]
        self.steps_done += 1
        return value

    def objective(self, batch: DomainBatch) -> Tensor:
        """The loss of a batch, penalty included."""
        seen = forward(self.network, batch)
        loss = self.risk(torch.stack(seen.losses))
        if self.penalty is None:
            return loss
        weight = self.plan.weight
        if self.steps_done < _WARM * self.plan.steps:
            weight = min(weight, 1.0)
        return (loss + weight * self.penalty(seen)) / max(weight, 1.0)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network.eval()(x)
        return logits


def forward(network: Classifier, batch: DomainBatch) -> Seen:
    """All domains through the network at once, so that batch normalisation sees them together."""
    targets = [y for _, y in batch]
    sizes = [len(y) for y in targets]
    features = network.features(torch.cat([x for x, _ in batch]))
    logits = network.head(features).split(sizes)
    losses = [F.cross_entropy(said, y) for said, y in zip(logits, targets, strict=True)]
    return Seen(losses, list(features.split(sizes)), list(logits), targets)


def fit_domains(bench: DomainBench, rule: DomainRule, *, after_step: Callable[[int], None] | None = None) -> float:
    """Train in place; the seconds of processor time in the steps alone.

    What draws from torch's global state (noise, dropout) is fixed by the seed.

    Args:
        bench: data and plan.
        rule: how to train.
        after_step: called with the number of steps done.
    """
    return bench.trial.seeded(lambda: _fit(bench, rule, after_step), stream=7)


def _fit(bench: DomainBench, rule: DomainRule, after_step: Callable[[int], None] | None) -> float:
    steps, seconds = bench.plan.steps, 0.0
    batches = domain_batches(bench.sources, bench.batch_size, generator=bench.trial.generator(1))
    clock = time.process_time if torch.device(bench.trial.device).type == "cpu" else time.perf_counter
    for step in range(1, steps + 1):
        batch = next(batches)
        started = clock()
        rule.step(batch)
        seconds += clock() - started
        if after_step is not None:
            after_step(step)
        if step % 50 == 0:
            bench.trial.report(step / steps)
    return seconds


def predictor_of(bench: DomainBench, rule: DomainRule) -> DomainRule | Predictor:
    """What predicts after training: the entrant's predictor around the trained network, or the rule itself."""
    if bench.entrant.predictor is None:
        return rule
    network: Classifier = rule.network  # type: ignore[attr-defined]
    return bench.entrant.predictor(network.eval(), bench)


def domain_accuracy(
    predictor: DomainRule | Predictor, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"], *, stream: bool
) -> float:
    """Share of the samples of one domain whose label is predicted.

    Args:
        predictor: what predicts.
        x, y: all samples of the domain.
        stream: whether they come in batches of `STREAM`, in this order, or of thousands.
    """
    begin = getattr(predictor, "begin", None)
    if callable(begin):
        begin()
    said = torch.cat([predictor.predict(part).argmax(1) for part in x.split(STREAM if stream else 2048)])
    return (said == y).float().mean().item()


def mean_accuracy(
    predictor: DomainRule | Predictor, domains: Sequence[tuple[Tensor, Tensor]], *, stream: bool
) -> float:
    """The mean of the domains' accuracies."""
    return sum(domain_accuracy(predictor, x, y, stream=stream) for x, y in domains) / len(domains)


def grid_without_weight(grid: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    """A grid whose penalty weight is the largest one, and not chosen.

    Example:
        >>> grid_without_weight({"lr": (0.1, 0.2), "weight": (1, 100)})
        {'lr': (0.1, 0.2), 'weight': (100,)}
    """
    return {name: (max(values),) if name == "weight" else values for name, values in grid.items()}
