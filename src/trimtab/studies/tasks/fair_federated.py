"""Incomes of people who are spread over clients: whom a model serves badly, and what its unfairness consists of."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data.adult import adult
from trimtab.federated.fairness_pid import disparities_from_table
from trimtab.federated.simulation import SimulationState, finish, simulate
from trimtab.studies.engine.study import Budget, Curve, Metric, Result, Task, Trial
from trimtab.studies.tasks.federated_images import (
    Federated,
    FederatedPlan,
    class_accuracies,
    fedavg,
    feddyn,
    fedprox,
    perceptron,
    scaffold,
)
from trimtab.studies.tools.training import predict

Split = Literal["at random", "by sex", "by sex and income"]

_LATE = 3  # final rounds whose models are judged, for from one to the next they swing
_USUAL = 0.9  # share of the people of a kind who are at the clients of that kind
_GROUPS = 4  # women and men, of lower and of higher income


@dataclass(frozen=True, kw_only=True)
class Informed(Federated):
    """A contestant whose clients also know the sex of their people: their targets are (people, 2), income and sex."""


@dataclass(frozen=True)
class People:
    """Some people.

    Attributes:
        x: (people, features) what is known of them, without their sex.
        income: (people,) 1 for more than 50,000 dollars a year.
        sex: (people,) 1 for men.
        client: (people,) where they are.
    """

    x: Float[Tensor, "people features"]
    income: Int[Tensor, " people"]
    sex: Int[Tensor, " people"]
    client: Int[Tensor, " people"]

    def at(self, chosen: Tensor) -> People:
        """Those of some positions, or those that a mask marks."""
        return People(self.x[chosen], self.income[chosen], self.sex[chosen], self.client[chosen])


@dataclass(frozen=True)
class FairFederated(Task[Federated]):
    """Train one small network on people who never leave their clients, and look at whom it serves.

    20 clients share 10,000 people of Adult; half of the clients take part in each of 30 rounds, with two passes over
    their people in batches of 50 and gradients of a norm of at most 10. The network, an MLP with one hidden layer of
    64, does not see the sex. Every contestant chooses among up to five settings by the accuracy on 2,000 held-out
    people. What is judged, on 30,000 others, is the mean over the models of the last three rounds, each after the final
    exchange that a method may have. The worst group is that of women or men of lower or higher income for which
    predictions are least often right. Disparity is what a prediction tells about the sex, in bits: over all clients
    (unique and redundant), and once the client is known (unique and masked).

    Attributes:
        split: how people are spread over clients: "at random"; "by sex", so that nine in ten at a client are of
            one sex; or "by sex and income", so that they are women of higher and men of lower income at half of the
            clients, and the reverse at the others.
    """

    split: Split = "by sex"

    name: ClassVar[str] = "fair-federated"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("test accuracy, mean of the last 3 rounds (%)", percent=True),
        "worst_group_accuracy": Metric("accuracy of the worst of four groups (%)", percent=True),
        "parity_gap": Metric("gap of women's and men's shares of high predictions (%)", best="min", percent=True),
        "global_disparity": Metric("disparity over all clients (bits)", best="min"),
        "local_disparity": Metric("disparity within clients (bits)", best="min"),
        "unique": Metric("unique disparity (bits)", best="min"),
        "redundant": Metric("redundant disparity (bits)", best="min"),
        "masked": Metric("masked disparity (bits)", best="min"),
        "gradients": Metric("mini-batch gradients", best="min"),
    }
    accepts: ClassVar[type[Federated]] = Federated
    tries: ClassVar[int] = 5
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.03, 0.1, 0.3, 1.0, 3.0)}
    cost: ClassVar[float] = 7.0

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ValueError(f"split must be one of {', '.join(map(repr, get_args(Split)))}, got {self.split!r}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"at random": at_random, "by sex": by_sex, "by sex and income": by_sex_and_income}

    @classmethod
    def references(cls) -> Mapping[str, Federated]:
        return {
            "FedAvg": Federated(algorithm=fedavg),
            "FedProx": Federated(algorithm=fedprox, search={"lr": (0.1, 0.3), "prox": (0.01, 0.1)}),
            "SCAFFOLD": Federated(algorithm=scaffold),
            "FedDyn": Federated(algorithm=feddyn, search={"lr": (0.1, 0.3), "alpha": (0.01, 0.1)}),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return () if budget == "smoke" else ("adult",)

    def people(self, trial: Trial) -> tuple[People, People, People]:
        """Those to learn from, to choose settings on and to be judged on; at the smoke budget they are drawn."""
        x, income, sex = _drawn(trial) if trial.budget == "smoke" else _census()
        sizes = trial.pick(smoke=(600, 200, 400), laptop=(10_000, 2_000, 30_000), paper=(30_000, 4_000, 14_000))
        order = torch.randperm(len(x), generator=trial.generator(1))
        client = spread(self.split, income, sex, self.num_clients(trial), trial.generator(2))
        everyone = People(*(part.to(trial.device) for part in (x, income, sex, client)))
        first, second, third = order[: sum(sizes)].split(sizes)
        return everyone.at(first), everyone.at(second), everyone.at(third)

    @staticmethod
    def num_clients(trial: Trial) -> int:
        """How many clients there are, an even number."""
        return trial.pick(smoke=6, laptop=20, paper=20)

    def run(self, trial: Trial, entrant: Federated) -> Result:
        train, held, test = self.people(trial)
        count = self.num_clients(trial)
        targets = torch.stack([train.income, train.sex], 1) if isinstance(entrant, Informed) else train.income
        clients = [(train.x[train.client == k], targets[train.client == k]) for k in range(count)]
        rounds = trial.pick(smoke=4, laptop=30, paper=200)
        plan = FederatedPlan(count, 2, tuple(train.x.shape[1:]), rounds, trial.setting, trial.seed)
        model = trial.seeded(lambda: (entrant.network or perceptron)(plan)).to(trial.device)
        algorithm = entrant.algorithm(plan)
        shown = {round(rounds * part / 8) for part in range(1, 9)}
        found: list[dict[str, float]] = []
        steps: list[float] = []
        reached: list[float] = []

        def evaluate(model: nn.Module, state: SimulationState) -> dict[str, float]:
            done = state.server.round
            trial.report(done / rounds)
            if done in shown and not trial.searching:
                steps.append(float(done))
                reached.append(share_right(model, test))
            if done > rounds - _LATE:
                # The model is a scratch space: the next round loads what the server holds.
                finish(algorithm, model, clients, state)
                found.append({"accuracy": share_right(model, held)} if trial.searching else judged(model, test, count))
            return {}

        draws = trial.generator(3)
        history = simulate(algorithm, model, clients, rounds=rounds, fraction=0.5, generator=draws, evaluate=evaluate)
        means = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
        if trial.searching:
            return Result(score=means["accuracy"])
        gradients = sum(metrics.get("gradients", 0.0) for entry in history.rounds for metrics in entry.metrics)
        return Result({**means, "gradients": gradients}, {"test_accuracy": Curve(steps, reached, "round")})


def share_right(model: nn.Module, people: People) -> float:
    """Of the predictions."""
    return (predict(model, people.x).argmax(1) == people.income).float().mean().item()


def judged(model: nn.Module, people: People, num_clients: int) -> dict[str, float]:
    """A model's accuracy, and how unfair it is."""
    told = predict(model, people.x).argmax(1)
    right = told == people.income
    groups = class_accuracies(right, 2 * people.sex + people.income, _GROUPS)
    table = np.zeros((2, 2, num_clients))
    np.add.at(table, tuple(part.cpu().numpy() for part in (people.sex, told, people.client)), 1 / len(told))
    found = disparities_from_table(table)
    return {
        "accuracy": right.float().mean().item(),
        "worst_group_accuracy": groups.min().item(),
        "parity_gap": abs(found.parity_global or 0.0),
        "global_disparity": found.global_,
        "local_disparity": found.local,
        "unique": found.unique,
        "redundant": found.redundant,
        "masked": found.masked,
    }


def spread(
    split: Split, income: Int[Tensor, " people"], sex: Int[Tensor, " people"], clients: int, generator: torch.Generator
) -> Int[Tensor, " people"]:
    """The client of each person.

    Kinds of people are sexes, or whether sex and income agree. Even clients are those of the first kind and odd ones
    those of the second; nine in ten people of a kind are at its clients, one in ten at the others.

    Example:
        >>> sex = torch.arange(2).repeat(5000)
        >>> client = spread("by sex", torch.zeros_like(sex), sex, 4, torch.Generator().manual_seed(0))
        >>> (client % 2 == sex).float().mean().round(decimals=1)
        tensor(0.9000)
    """
    anywhere = torch.randint(clients, sex.shape, generator=generator)
    usual = torch.rand(len(sex), generator=generator) < _USUAL
    if split == "at random":
        return anywhere
    kind = sex if split == "by sex" else sex ^ income
    return 2 * (anywhere // 2) + torch.where(usual, kind, 1 - kind)


def _drawn(trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
    """1,200 people who need no file: income goes with sex, and four features with income."""
    draws = trial.generator(4)
    sex = torch.randint(2, (1200,), generator=draws)
    income = torch.where(torch.rand(1200, generator=draws) < 0.8, sex, 1 - sex)
    return torch.randn(1200, 4, generator=draws) + income[:, None], income, sex


def _census() -> tuple[Tensor, Tensor, Tensor]:
    """Adult: an indicator for every category, numbers of mean 0 and deviation 1; without the sex."""
    table = adult()
    named = dict(zip(table.columns, torch.cat([table.train, table.test]).T, strict=True))
    income, sex = (named.pop(name).long() for name in ("income", "sex"))
    domain = dict(zip(table.columns, table.domain, strict=True))
    columns = [
        F.one_hot(column.long(), size).float()
        if isinstance(size := domain[name], int)
        else ((column - column.mean()) / column.std()).float()[:, None]
        for name, column in named.items()
    ]
    return torch.cat(columns, 1), income, sex


at_random = FairFederated("at random")
by_sex = FairFederated()
by_sex_and_income = FairFederated("by sex and income")
