"""Regularised logistic and softmax regression on real data: how soon the gradient is below 1e-8, how near the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.optim.objectives import LogisticObjective, SoftmaxObjective
from trimtab.studies.lr_search import best_learning_rate
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

Problem = Literal["logistic", "softmax"]


@dataclass(frozen=True)
class Instance:
    """A convex problem in double precision.

    Attributes:
        objective: the function, with its gradient, Hessian and approximations of it.
        start: (d,), where to begin.
        tol: norm of the gradient at which to stop.
        max_iter: most iterations.
        generator: for the contestant's random draws.
        record: to be called with the start and after every iteration with the iterate.
    """

    objective: LogisticObjective | SoftmaxObjective
    start: Float[Tensor, " d"]
    tol: float
    max_iter: int
    generator: torch.Generator
    record: Callable[[Tensor], None]


# Returns the number of linear systems it has solved by factorising a matrix.
Method = Callable[[Instance], int]
OptimizerFactory = Callable[[Sequence[nn.Parameter], float], torch.optim.Optimizer]


@dataclass(frozen=True)
class Data:
    """Features with a column of ones, labels in 0 to `num_classes - 1`; four fifths to train on, drawn by the seed."""

    x_train: Float[Tensor, "n d"]
    y_train: Int[Tensor, " n"]
    x_test: Float[Tensor, "m d"]
    y_test: Int[Tensor, " m"]
    num_classes: int


@dataclass(frozen=True)
class Convex(Task):
    """Minimise a smooth strongly convex function; a seed draws the samples and the start.

    The strength of the squared norm is one over the number of samples, scikit-learn's default; the intercept is
    penalised too. The start is standard normal, where most predictions are sure and wrong.

    Attributes:
        problem: "logistic" (breast cancer, standardised, 31 variables) or "softmax" (digits, 650 variables).
    """

    problem: Problem = "logistic"

    name: ClassVar[str] = "convex"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "iterations": Metric("iterations to a gradient of 1e-8", best="min"),
        "seconds": Metric("time to a gradient of 1e-8 (s)", best="min"),
        "solves": Metric("linear systems solved", best=None),
        "gradient_norm": Metric("norm of the last gradient", best="min"),
        "gap": Metric("last value above the minimum", best="min"),
        "distance": Metric("distance to the solution", best="min"),
        "test_accuracy": Metric("accuracy on held-out data", percent=True),
    }

    TOLERANCE: ClassVar[float] = 1e-8

    def __post_init__(self) -> None:
        if self.problem not in get_args(Problem):
            raise ValueError(f"problem must be one of {', '.join(get_args(Problem))}, got {self.problem!r}")

    def solve(self, method: Method) -> Arm:
        """A contestant that minimises an instance, recording its iterates."""
        return self.arm(method=method)

    def descend(self, optimizer: OptimizerFactory, lr: Sequence[float]) -> Arm:
        """A torch optimizer on the whole data, with the learning rate of the lowest value after half of the iterations.

        Args:
            optimizer: makes the optimizer from parameters and a learning rate.
            lr: learning rates to choose from.
        """
        return self.arm(optimizer=optimizer, lr=tuple(lr))

    def run(self, trial: Trial, **options: Any) -> Result:
        data = self.data(trial)
        objective = self.objective(data)
        generator = trial.generator(1)
        start = torch.randn(len(self._zero(data)), generator=generator, dtype=torch.float64)
        max_iter = trial.pick(smoke=40, laptop=1000, paper=100_000)
        iterates: list[tuple[float, Tensor]] = []
        started = time.process_time()

        def record(x: Tensor) -> None:
            iterates.append((time.process_time() - started, x.detach().clone()))

        instance = Instance(objective, start, self.TOLERANCE, max_iter, generator, record)
        method: Method
        if "method" in options:
            method = options["method"]
        else:
            make: OptimizerFactory = options["optimizer"]
            rate = best_learning_rate(options["lr"], lambda lr: -_value_after(instance, make, lr, max_iter // 2))
            method = lambda instance: _descend(instance, make, rate)
        trial.report(0.4)
        started = time.process_time()
        solves = method(instance)
        trial.report(0.8)
        norms = [float(objective.gradient(x).norm()) for _, x in iterates]
        reached = next((i for i, norm in enumerate(norms) if norm <= self.TOLERANCE), None)
        end = iterates[-1][1]
        solution = trial.cached(lambda: _solution(objective, self._zero(data)), key=f"{self!r} seed {trial.seed}")
        return Result(
            {
                "iterations": float(max_iter if reached is None else reached),
                "seconds": iterates[-1 if reached is None else reached][0],
                "solves": float(solves),
                "gradient_norm": norms[-1],
                "gap": max(0.0, float(objective(end) - objective(solution))),
                "distance": float((end - solution).norm()),
                "test_accuracy": self._accuracy(end, data),
            },
            {"gradient_norm": Curve(list(range(len(norms))), norms)},
        )

    def data(self, trial: Trial) -> Data:
        """The trial's samples."""
        from sklearn.datasets import load_breast_cancer, load_digits

        bunch = (load_breast_cancer if self.problem == "logistic" else load_digits)()
        x, y = torch.from_numpy(bunch.data), torch.from_numpy(np.asarray(bunch.target)).long()
        classes = 2 if self.problem == "logistic" else trial.pick(smoke=3, laptop=10, paper=10)
        x, y = x[y < classes], y[y < classes]
        order = torch.randperm(len(x), generator=trial.generator())
        train, test = order[: 4 * len(x) // 5], order[4 * len(x) // 5 :]
        x = (x - x[train].mean(0)) / x[train].std(0) if self.problem == "logistic" else x / 16
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        return Data(x[train], y[train], x[test], y[test], classes)

    def objective(self, data: Data) -> LogisticObjective | SoftmaxObjective:
        """The function to minimise."""
        l2 = 1 / len(data.x_train)
        if self.problem == "logistic":
            return LogisticObjective(data.x_train, 2.0 * data.y_train - 1, l2=l2)
        return SoftmaxObjective(data.x_train, data.y_train, data.num_classes, l2=l2)

    def _zero(self, data: Data) -> Tensor:
        d = data.x_train.shape[1]
        return torch.zeros(d if self.problem == "logistic" else data.num_classes * d, dtype=torch.float64)

    def _accuracy(self, x: Tensor, data: Data) -> float:
        if self.problem == "logistic":
            said = (data.x_test @ x > 0).long()
        else:
            said = (data.x_test @ x.view(data.num_classes, -1).mT).argmax(1)
        return float((said == data.y_test).double().mean())


def _descend(instance: Instance, make: OptimizerFactory, lr: float) -> int:
    x = nn.Parameter(instance.start.clone())
    optimizer = make([x], lr)
    instance.record(x)
    for _ in range(instance.max_iter):
        x.grad = instance.objective.gradient(x.detach())
        if x.grad.norm() <= instance.tol:
            break
        optimizer.step()
        instance.record(x)
    return 0


def _value_after(instance: Instance, make: OptimizerFactory, lr: float, steps: int) -> float:
    x = nn.Parameter(instance.start.clone())
    optimizer = make([x], lr)
    for _ in range(steps):
        x.grad = instance.objective.gradient(x.detach())
        optimizer.step()
    return float(instance.objective(x.detach()))


def _solution(objective: LogisticObjective | SoftmaxObjective, start: Tensor) -> Tensor:
    """SciPy's trust-region method with exact subproblems from zero, and two plain Newton steps for the last digits."""
    minimize: Any = scipy.optimize.minimize
    found = minimize(
        lambda z: float(objective(torch.from_numpy(z))),
        start.numpy(),
        method="trust-exact",
        jac=lambda z: objective.gradient(torch.from_numpy(z)).numpy(),
        hess=lambda z: objective.hessian(torch.from_numpy(z)).numpy(),
        options={"gtol": 1e-9},
    )
    x = torch.from_numpy(found.x)
    for _ in range(2):
        x = x - torch.linalg.solve(objective.hessian(x), objective.gradient(x))
    return x
