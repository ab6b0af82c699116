"""The same set is to be forgotten by a ridge regression, whose retrained outputs are exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.ops.averaging import frozen_copy
from trimtab.studies.engine.study import Experiment, Metric, Result, Trial
from trimtab.studies.tools.descent import descend
from trimtab.studies.unlearning.datamodel_matching.methods import REPEATS
from trimtab.studies.unlearning.datamodel_matching.networks import CLASSES, samples
from trimtab.unlearning import datamodel_matching, ridge_influences

_PENALTY = 1.0


@dataclass(frozen=True)
class Regression:
    """A ridge regression of classes on pixels, and the one without what is to be forgotten, both exact."""

    x: Tensor
    y: Tensor
    points: Tensor
    forget: Tensor
    trained: nn.Linear
    wanted: Tensor
    steps: int

    @property
    def retained(self) -> Tensor:
        """Positions of samples that stay."""
        left = torch.ones(len(self.x), dtype=torch.bool)
        left[self.forget] = False
        return left.nonzero()[:, 0]

    def errors(self, model: nn.Linear, rows: Tensor) -> Tensor:
        """Sum of squares."""
        found: Tensor = (model(self.x[rows]) - self.y[rows]).square().sum()
        return found

    def loss(self, model: nn.Linear) -> Tensor:
        """What the regression of retained samples minimises."""
        return self.errors(model, self.retained) + _PENALTY * model.weight.square().sum()


def regression(trial: Trial, stream: int) -> Regression:
    """A cluster of one class is to be forgotten, as from the networks."""
    x, targets, unseen, _ = samples(trial)
    x, points = (torch.cat([part, torch.ones(len(part), 1)], 1).double() for part in (x, torch.cat([x, unseen])))
    y = F.one_hot(targets, CLASSES).double()
    members = (targets == (trial.seed + stream) % CLASSES).nonzero()[:, 0]
    count = trial.pick(smoke=3, laptop=15, paper=50)
    centre = members[torch.randint(len(members), (1,), generator=trial.generator(stream))]
    forget = members[torch.cdist(x[centre], x[members])[0].argsort()[:count]]
    left = torch.ones(len(x), dtype=torch.bool).index_fill(0, forget, False)
    whole, rest = (
        torch.linalg.solve(x[rows].T @ x[rows] + _PENALTY * torch.eye(x.shape[1]).double(), x[rows].T @ y[rows])
        for rows in (torch.ones_like(left), left)
    )
    model = trial.seeded(lambda: nn.Linear(x.shape[1], CLASSES, bias=False)).double()
    with torch.no_grad():
        model.weight.copy_(whole.T)
    return Regression(x, y, points, forget, model, points @ rest, trial.pick(smoke=5, laptop=50, paper=50))


Step = Callable[[Regression, nn.Linear], Tensor]


def _retained_loss(given: Regression, model: nn.Linear) -> Tensor:
    return given.loss(model)


def _against_forgotten(given: Regression, model: nn.Linear) -> Tensor:
    return -given.errors(model, given.forget)


def _descent_and_ascent(given: Regression, model: nn.Linear) -> Tensor:
    return given.loss(model) - given.errors(model, given.forget)


def by_steps(given: Regression, rate: float, trial: Trial, *, loss: Step) -> nn.Linear:
    """Adam on a loss of all samples at once, at a falling rate as in matching."""
    model = frozen_copy(given.trained).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    anneal = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    descend(optimizer, lambda step: loss(given, model), range(given.steps), anneal=anneal)
    return model


def by_matching(given: Regression, rate: float, trial: Trial) -> nn.Linear:
    """Datamodel matching with influences in closed form, all of its samples in a step."""
    coef = ridge_influences(given.x, given.y, given.x, _PENALTY)
    options: dict[str, Any] = {"epochs": given.steps, "lr": rate, "batch_size": len(given.x) * 20}
    draws = trial.generator(30)
    return datamodel_matching(given.trained, given.x, coef, given.forget, **REPEATS, **options, generator=draws)


def regress(
    trial: Trial, *, by: Callable[[Regression, float, Trial], nn.Linear], rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
) -> Result:
    """A run: the rate that ends nearest on another set to forget, then the set itself."""

    @torch.no_grad()
    def left(given: Regression, rate: float) -> float:
        with torch.enable_grad():
            model = by(given, rate, trial)
        away, before = (part(given.points) - given.wanted for part in (model, given.trained))
        return float(away.norm() / before.norm())

    tuning, given = regression(trial, 5), regression(trial, 0)
    return Result({"left": left(given, min(rates, key=lambda rate: left(tuning, rate)))})


convex = Experiment(
    "forgetting from a ridge regression",
    {
        "datamodel matching": partial(regress, by=by_matching),
        "fine-tuning on retained": partial(regress, by=partial(by_steps, loss=_retained_loss)),
        "gradient ascent": partial(regress, by=partial(by_steps, loss=_against_forgotten)),
        "descent and ascent": partial(regress, by=partial(by_steps, loss=_descent_and_ascent)),
    },
    {"left": Metric("distance to the retrained outputs left after 50 steps (%)", best="min", percent=True)},
    reads=("digits",),
    cost=0.5,
)
