"""Logistic regression on the whole data: how few passes over them bring a minimiser there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import scipy.optimize
import torch
from torch import Tensor

from trimtab.data import load
from trimtab.optim.objectives import LogisticObjective, SoftmaxObjective
from trimtab.studies.engine.study import Budget, Curve, Metric, Result, Task, Trial
from trimtab.studies.tools import newton
from trimtab.studies.tools.full_batch import (
    FinishedError,
    Minimizer,
    Objective,
    Oracle,
    Split,
    descent,
    lbfgs,
    thinned,
)

Problem = Literal["breast cancer", "digits", "outvoted", "digits 3 8", "few threes"]
_GAP = 1e-6


@dataclass(frozen=True)
class LogisticRegression(Task[Minimizer]):
    """Minimise a logistic loss of the whole training set, in double precision.

    What counts is the number of passes over the data: one is the multiplications of a gradient, half a one of a value,
    and a Hessian of d variables is d / 2 of them. Two problems have scikit-learn's default penalty, the intercept's
    weight included, and a standard normal start; they are solved when the loss is within a millionth of its first
    distance from the minimum. The others are separable, without a penalty, and start from zero; they are solved when
    no training sample is on the wrong side. Who is never there has spent all passes. Whoever has a step size chooses it
    among six, on another draw of the data. A seed draws the four fifths of the samples that are trained on.

    Attributes:
        problem: "breast cancer" (two classes, 31 variables) or "digits" (ten, 650 variables), with a penalty;
            "outvoted" (2 samples whose side 198 others contradict, 5 variables), "digits 3 8" or "few threes" (as
            before, with five threes alone), separable.
    """

    problem: Problem = "breast cancer"

    name: ClassVar[str] = "logistic-regression"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "passes": Metric("passes until solved", best="min"),
        "iterations": Metric("iterations until solved", best="min"),
        "seconds": Metric("time until solved (s)", best="min"),
        "gap": Metric("loss left, of that at the start (%)", best="min", percent=True),
        "peak_loss": Metric("highest loss on the way (nats)", best=None),
        "test_accuracy": Metric("test accuracy (%)", percent=True),
    }
    accepts: ClassVar[type[Minimizer]] = Minimizer
    tries: ClassVar[int] = 6
    cost: ClassVar[float] = 3.0

    def __post_init__(self) -> None:
        if self.problem not in get_args(Problem):
            raise ValueError(f"problem must be one of {', '.join(get_args(Problem))}, got {self.problem!r}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {task.problem: task for task in (breast_cancer, digits, outvoted, threes_eights, few_threes)}

    @classmethod
    def references(cls) -> Mapping[str, Minimizer]:
        return {
            "gradient descent": descent(lambda parameters, lr: torch.optim.SGD(parameters, lr=lr)),
            "Nesterov": descent(
                lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True), scale=0.1
            ),
            "Adam": descent(lambda parameters, lr: torch.optim.Adam(parameters, lr=lr), scale=0.1),
            "L-BFGS": Minimizer(minimize=lbfgs),
            "damped Newton": Minimizer(minimize=partial(newton.run, newton.damped_newton)),
            "cubic Newton": Minimizer(minimize=partial(newton.run, newton.cubic_newton)),
            "super-universal Newton": Minimizer(minimize=partial(newton.run, newton.super_universal_newton)),
            "trust-ncg": Minimizer(minimize=partial(newton.run, newton.trust_ncg)),
        }

    @property
    def separable(self) -> bool:
        """Whether there is no penalty, and the end is a line between the classes."""
        return self.problem not in ("breast cancer", "digits")

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return {"breast cancer": ("breast_cancer",), "outvoted": ()}.get(self.problem, ("digits",))

    def run(self, trial: Trial, entrant: Minimizer) -> Result:
        data = self.split(trial)
        objective, start = self.objective(data), self.start(data, trial)
        first = float(objective(start))
        least = 0.0 if self.separable else self._least(objective, start, trial)

        def solved(x: Tensor, value: float) -> bool:
            if self.separable:
                return bool((objective.labels * (objective.features @ x) > 0).all())
            return value - least <= _GAP * (first - least)

        budget = trial.pick(smoke=400, laptop=10_000, paper=1_000_000)
        oracle = Oracle(objective, start, budget, solved, trial.generator(2), trial.setting)
        with suppress(FinishedError):
            entrant.minimize(oracle)
        passes = oracle.passes if oracle.reached else float(budget)
        gap = (oracle.best - least) / (first - least)
        if trial.searching:
            return Result(score=-passes - min(gap, 1e9))
        curve = thinned(oracle.values)
        return Result(
            {
                "passes": passes,
                "iterations": float(oracle.iterations),
                "seconds": oracle.seconds,
                "gap": gap,
                "peak_loss": max(value for _, value in oracle.values),
                "test_accuracy": self._accuracy(oracle.last, data),
            },
            {"loss": Curve(list(curve), list(curve.values()), x_label="pass")},
        )

    def split(self, trial: Trial) -> Split:
        """The trial's samples."""
        generator = trial.generator()
        if self.problem == "outvoted":
            return Split(*_outvoted(generator), *_outvoted(generator), num_classes=2)
        data = load(self.datasets(trial.budget)[0])
        digits_of = {"digits": trial.pick(smoke=[0, 1, 2], laptop=None, paper=None), "breast cancer": None}
        kept = digits_of.get(self.problem, [3, 8])
        data = data if kept is None else data.classes(kept)
        x = torch.cat([data.x_train, data.x_test]).flatten(1).double()
        y = torch.cat([data.y_train, data.y_test])
        order = torch.randperm(len(x), generator=generator)
        train, test = order[: 4 * len(x) // 5], order[4 * len(x) // 5 :]
        if self.problem == "few threes":
            threes = train[y[train] == 0]
            train, test = torch.cat([threes[:5], train[y[train] == 1]]), torch.cat([threes[5:], test])
        if self.problem == "breast cancer":
            x = (x - x[train].mean(0)) / x[train].std(0)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        return Split(x[train], y[train], x[test], y[test], data.num_classes)

    def objective(self, data: Split) -> Objective:
        """The function to minimise."""
        l2 = 0.0 if self.separable else 1 / len(data.x_train)
        if data.num_classes == 2:
            return LogisticObjective(data.x_train, 2.0 * data.y_train - 1, l2=l2)
        return SoftmaxObjective(data.x_train, data.y_train, data.num_classes, l2=l2)

    def start(self, data: Split, trial: Trial) -> Tensor:
        """Where everyone begins."""
        count = data.x_train.shape[1] * (1 if data.num_classes == 2 else data.num_classes)
        if self.separable:
            return torch.zeros(count, dtype=torch.float64)
        return torch.randn(count, generator=trial.generator(1), dtype=torch.float64)

    def _least(self, objective: Objective, start: Tensor, trial: Trial) -> float:
        # A method of its own, so that what is kept goes with the code that draws the data.
        minimizer = trial.cached(partial(self._minimizer, objective, start), key=f"{self!r} seed {trial.seed}")
        return float(objective(minimizer))

    def _minimizer(self, objective: Objective, start: Tensor) -> Tensor:
        return _minimizer(objective, start)

    def _accuracy(self, x: Tensor, data: Split) -> float:
        if data.num_classes == 2:
            said = (data.x_test @ x > 0).long()
        else:
            said = (data.x_test @ x.view(data.num_classes, -1).mT).argmax(1)
        return float((said == data.y_test).double().mean())


def _outvoted(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two samples to bring to one side, and 198 that pull the other way; dealt to the two classes at random."""
    samples = 0.02 * torch.randn(200, 5, generator=generator, dtype=torch.float64)
    samples[:, 0] += 0.3
    samples[:2, 1] -= 1
    samples[2:, 1] += 1
    labels = (torch.rand(200, generator=generator) < 0.5).long()
    return samples * (2.0 * labels - 1)[:, None], labels


def _minimizer(objective: Objective, start: Tensor) -> Tensor:
    """SciPy's trust-region method with exact subproblems from zero, and two plain Newton steps for the last digits."""
    minimize: Any = scipy.optimize.minimize
    found = minimize(
        lambda z: float(objective(torch.from_numpy(z))),
        torch.zeros_like(start).numpy(),
        method="trust-exact",
        jac=lambda z: objective.gradient(torch.from_numpy(z)).numpy(),
        hess=lambda z: objective.hessian(torch.from_numpy(z)).numpy(),
        options={"gtol": 1e-9},
    )
    x = torch.from_numpy(found.x)
    for _ in range(2):
        x = x - torch.linalg.solve(objective.hessian(x), objective.gradient(x))
    return x


breast_cancer = LogisticRegression("breast cancer")
digits = LogisticRegression("digits")
outvoted = LogisticRegression("outvoted")
threes_eights = LogisticRegression("digits 3 8")
few_threes = LogisticRegression("few threes")
