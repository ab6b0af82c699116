"""Does what disparity consists of say whether fairness within clients brings fairness over all of them?

Disparity is that of a linear classifier of Adult's incomes, which does not see the sex, over two clients of which nine
people in ten are of one kind. Fairness within clients is a penalty on the squared gap of the mean chances of women and
men in each batch, of weight 30, which was not tuned; the paper gives examples but no such training. Shares are of
unique, redundant and masked disparity together. The curve is the highest accuracy that any strategy can reach that
knows the label and keeps the global disparity below a limit. The headline was first that fairness within clients leaves
half of the global disparity; after one trial run, before any result, the paper's three scenarios took its place, and it
became a further claim.

On the shared task 20 clients train a network, and the gap is that of all people of a client. With 20 clients and 30,000
people, disparity within clients is overestimated by about 0.0005 bits. The claim on local disparity there was first of
a ratio; in a trial on a seed of no result the fair model told everybody the same, so that there was none, and it became
a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data.adult import adult
from trimtab.federated.fairness_pid import accuracy_frontier, disparities
from trimtab.federated.fedavg import FedAvg
from trimtab.federated.local_training import loss_gradient
from trimtab.federated.protocol import Broadcast, ClientState, Update
from trimtab.federated.simulation import simulate
from trimtab.federated.state_dicts import model_state
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.fair_federated import Informed, by_sex, by_sex_and_income
from trimtab.studies.tasks.federated_images import BATCH, EPOCHS, MAX_NORM, FederatedPlan

Split = Literal["at random", "by sex", "by sex and income"]

_MOST = 0.9  # share of a client's people who are of its kind
_LIMITS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.04)


@dataclass(frozen=True)
class People:
    """Features, income, sex and client of some people."""

    x: Tensor
    income: Tensor
    sex: Tensor
    client: Tensor


def audit(split: Split, trial: Trial) -> Result:
    """Train a linear classifier over two clients, as it is and fair within each of them, and take both apart."""
    train, test = people(split, trial)
    plain, fair = (
        train_over_clients(train, weight, trial) for weight in (0.0, trial.pick(smoke=5.0, laptop=30.0, paper=30.0))
    )
    told, fairly_told = (model(test.x).argmax(1) for model in (plain, fair))
    found = disparities(test.sex.numpy(), told.numpy(), test.client.numpy())
    later = disparities(test.sex.numpy(), fairly_told.numpy(), test.client.numpy())
    whole = found.unique + found.redundant + found.masked
    table = np.zeros((2, 2, 2))
    np.add.at(table, (test.sex.numpy(), test.client.numpy(), test.income.numpy()), 1 / len(test.income))
    reachable = [accuracy_frontier(table, limit, 1.0).accuracy for limit in _LIMITS]
    return Result(
        {
            "kept_global": later.global_ / found.global_,
            "kept_local": later.local / found.local,
            "unique": found.unique / whole,
            "redundant": found.redundant / whole,
            "masked": found.masked / whole,
            "global": found.global_,
            "local": found.local,
            "accuracy": float((told == test.income).double().mean()),
            "fair_accuracy": float((fairly_told == test.income).double().mean()),
        },
        {"reachable accuracy": Curve(_LIMITS, reachable, "limit on the global disparity (bits)")},
    )


_EXPECTED: dict[Split, str] = {"at random": "unique", "by sex": "redundant", "by sex and income": "masked"}


def expect(trial: Trial) -> Result:
    """In each split, the share of the disparity that is of the kind which the split should bring; the least of them."""
    shares = {}
    for split, kind in _EXPECTED.items():
        train, test = people(split, trial)
        told = train_over_clients(train, 0.0, trial)(test.x).argmax(1)
        found = disparities(test.sex.numpy(), told.numpy(), test.client.numpy())
        shares[kind] = getattr(found, kind) / (found.unique + found.redundant + found.masked)
    return Result({"expected": min(shares.values()), **shares})


def people(split: Split, trial: Trial) -> tuple[People, People]:
    """Training and test people of two clients, of Adult; at the smoke budget drawn ones."""
    draws = trial.generator()
    if trial.budget == "smoke":
        sex = torch.randint(2, (1200,), generator=draws)
        income = torch.where(torch.rand(1200, generator=draws) < 0.8, sex, 1 - sex)
        x = torch.randn(1200, 4, generator=draws) + income[:, None]
        sizes = (800, 400)
    else:
        table = adult()
        rows = torch.cat([table.train, table.test])
        sizes = trial.pick(smoke=(800, 400), laptop=(10_000, 15_000), paper=(32_000, 16_000))
        rows = rows[torch.randperm(len(rows), generator=draws)[: sum(sizes)]]
        named = dict(zip(table.columns, rows.T, strict=True))
        sex, income = (named.pop(name).long() for name in ("sex", "income"))
        domain = dict(zip(table.columns, table.domain, strict=True))
        x = torch.cat([_encoded(column, domain[name]) for name, column in named.items()], 1)
    kind = {"at random": torch.full_like(sex, -1), "by sex": sex, "by sex and income": sex ^ income}[split]
    usual, other = torch.rand(len(sex), generator=draws) < _MOST, torch.randint(2, sex.shape, generator=draws)
    client = torch.where(kind < 0, other, torch.where(usual, kind, 1 - kind))
    everyone = [part.split(sizes) for part in (x, income, sex, client)]
    return People(*(part[0] for part in everyone)), People(*(part[1] for part in everyone))


def _encoded(column: Tensor, domain: int | tuple[float, float]) -> Tensor:
    """Categories as one column each, numbers with mean 0 and spread 1."""
    if isinstance(domain, int):
        return F.one_hot(column.long(), domain).float()
    return ((column - column.mean()) / column.std()).float()[:, None]


def train_over_clients(train: People, weight: float, trial: Trial) -> nn.Module:
    """FedAvg of a linear classifier, which each client also keeps fair among its own people."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        income, sex = targets.unbind(1)
        chance, groups = logits.softmax(1)[:, 1], torch.stack([1 - sex, sex]).float()
        means = groups @ chance / groups.sum(1).clamp(min=1)
        gap = torch.where((groups.sum(1) > 0).all(), means[1] - means[0], 0.0)
        return F.cross_entropy(logits, income) + weight * gap.square()

    model = trial.seeded(lambda: nn.Linear(train.x.shape[1], 2))
    targets = torch.stack([train.income, train.sex], 1)
    clients = [(train.x[train.client == k], targets[train.client == k]) for k in range(2)]
    rounds = trial.pick(smoke=3, laptop=15, paper=50)
    algorithm = FedAvg(lr=0.1, batch_size=250, momentum=0.9, loss=loss)
    simulate(algorithm, model, clients, rounds=rounds, generator=trial.generator(1))
    return model.requires_grad_(False)


census = Experiment(
    "income of two clients' people",
    {**{split: partial(audit, split) for split in _EXPECTED}, "every split": expect},
    {
        "expected": Metric("share of the expected disparity, least of three splits (%)", percent=True),
        "kept_global": Metric("global disparity left by fairness within clients (%)", best="min", percent=True),
        "kept_local": Metric("local disparity left by fairness within clients (%)", best="min", percent=True),
        "unique": Metric("unique share of the disparity (%)", best=None, percent=True),
        "redundant": Metric("redundant share of the disparity (%)", best=None, percent=True),
        "masked": Metric("masked share of the disparity (%)", best=None, percent=True),
        "global": Metric("global disparity (bits)", best="min"),
        "local": Metric("local disparity (bits)", best="min"),
        "accuracy": Metric("accuracy (%)", percent=True),
        "fair_accuracy": Metric("accuracy, fair within clients (%)", percent=True),
    },
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    reads=("adult",),
    cost=4.0,
)


class FairFedAvg(FedAvg):
    """FedAvg whose clients add the squared gap between the mean chances of their women and their men to the loss."""

    weight = 30.0

    def client_update(
        self,
        model: nn.Module,
        broadcast: Broadcast,
        client: ClientState,
        data: tuple[Tensor, Tensor],
        *,
        generator: torch.Generator,
    ) -> tuple[Update, ClientState]:
        x, (income, sex) = data[0], data[1].unbind(1)
        groups = torch.stack([1 - sex, sex]).to(x)
        shares = groups / groups.sum(1, keepdim=True).clamp_min(1)
        both = groups.any(1).all()

        def fair(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> Sequence[Tensor]:
            def total() -> Tensor:
                women, men = shares @ model(x).softmax(1)[:, 1]
                return loss() + self.weight * both * (men - women).square()  # type: ignore[no-any-return]

            return loss_gradient(total, params)

        model.load_state_dict(broadcast.params)
        steps = self.local.train(model, (x, income), generator=generator, round=broadcast.round, gradient=fair)
        return Update(model_state(model), len(x), metrics={"gradients": float(steps)}), client


def fair_within_clients(plan: FederatedPlan) -> FairFedAvg:
    """FedAvg that is kept fair within each client."""
    return FairFedAvg(plan.lr, EPOCHS, BATCH, max_norm=MAX_NORM)


study = Study(
    paper="fairness_pid",
    entrants={"FedAvg, fair within clients": Informed(algorithm=fair_within_clients)},
    on=[by_sex, by_sex_and_income],
    experiments=[census],
    headline=Claim(
        "every split",
        at_least=0.5,
        on="expected",
        at=census,
        text="With people spread at random, by sex, and by sex and income, at least half of the disparity is unique, "
        "redundant and masked in turn",
    ),
    claims=[
        Claim("by sex", at_least=0.5, on="kept_global", at=census),
        Claim("at random", at_least=0.9, on="unique", at=census),
        Claim("at random", at_most=0.25, on="kept_global", at=census),
        Claim("by sex", beats="at random", on="kept_global", by=0.25, at=census),
        Claim("by sex", at_most=0.25, on="kept_local", at=census),
        Claim("by sex", below="at random", on="local", times=2.0, at=census),
        Claim(
            "FedAvg, fair within clients",
            beats="FedAvg",
            on="redundant",
            times=0.5,
            at=by_sex,
            text="Where nine in ten of a client's people are of one sex, fairness within clients leaves at least half "
            "of FedAvg's redundant disparity",
        ),
        Claim("FedAvg, fair within clients", below="FedAvg", on="local_disparity", by=0.05, at=by_sex_and_income),
    ],
)
