"""Minimising a function of the whole data: what a method may ask for, what it costs, and the adapter of optimizers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import scipy.optimize
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.optim.objectives import LogisticObjective, SoftmaxObjective
from trimtab.studies.engine.study import Entrant, Setting

Objective = LogisticObjective | SoftmaxObjective


class FinishedError(Exception):
    """The problem is solved, or the passes are spent; it ends a contestant, which has nothing to catch."""


@dataclass
class Oracle:
    """A function of some data, which counts the passes over them.

    One pass is the multiplications of a gradient: half of them give the value, the other half lead back. A Hessian is
    as many passes as it has rows, over two; one of independent blocks has the rows of a block. Linear algebra on the
    variables alone is not counted.

    Attributes:
        objective: the function, with its features and labels.
        start: (d,), where to begin.
        budget: passes allowed.
        solved: whether a point with its value is good enough.
        generator: for the contestant's random draws.
        setting: the values that the search chose, or tries.
        passes, iterations, seconds: what was spent up to the last recorded point.
        best: lowest value among the recorded points.
        last: the last of them.
        reached: whether it is good enough.
    """

    objective: Objective
    start: Float[Tensor, " d"]
    budget: float
    solved: Callable[[Tensor, float], bool]
    generator: torch.Generator
    setting: Setting = field(default_factory=dict)
    passes: float = 0.0
    iterations: int = -1
    seconds: float = 0.0
    best: float = math.inf
    last: Tensor = field(init=False)
    reached: bool = False
    values: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.last, self._since = self.start, time.process_time()
        self._seen: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weights: one row a class, or one for two classes."""
        rows = self.objective.num_classes if isinstance(self.objective, SoftmaxObjective) else 1
        return rows, self.objective.features.shape[1]

    def spend(self, passes: float) -> None:
        """Count passes that a contestant makes by itself.

        Raises:
            FinishedError: there are none left.
        """
        if self.passes + passes > self.budget:
            raise FinishedError
        self.passes += passes

    def __call__(self, x: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        self._forward(x)
        return self.objective(x)

    def gradient(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The first derivatives."""
        self._forward(x)
        self.spend(0.5)
        return self.objective.gradient(x)

    def hessian(self, x: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """The second derivatives."""
        self._forward(x)
        self.spend(len(x) / 2)
        return self.objective.hessian(x)

    def gauss_newton(self, x: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """An approximation of them: for many classes the blocks of one class each, for two the Hessian's bound."""
        if isinstance(self.objective, LogisticObjective):
            self.spend(0.0 if "_bound" in vars(self.objective) else len(x) / 2)
            return self.objective.hessian_bound(x)
        self._forward(x)
        self.spend(self.shape[1] / 2)
        return self.objective.gauss_newton(x)

    def hessian_vector(self, x: Float[Tensor, " d"], v: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The second derivatives times a vector."""
        self._forward(x)
        self.spend(1.0)
        product: Tensor = torch.func.jvp(self.objective.gradient, (x,), (v,))[1]
        return product

    def record(self, x: Float[Tensor, " d"]) -> None:
        """Where the contestant stands: with the start, and after every iteration; looking at it costs nothing.

        Raises:
            FinishedError: it is good enough, or not finite.
        """
        self.seconds += time.process_time() - self._since
        self.iterations += 1
        self.last = x.detach().clone()
        value = float(self.objective(self.last))
        self.best = min(self.best, value)
        self.values.append((self.passes, value))
        self.reached = self.solved(self.last, value)
        if self.reached or not math.isfinite(value):
            raise FinishedError
        self._since = time.process_time()

    def _forward(self, x: Tensor) -> None:
        if self._seen is None or not torch.equal(self._seen, x):
            self.spend(0.5)
            self._seen = x.detach().clone()


@dataclass(frozen=True, kw_only=True)
class Minimizer(Entrant):
    """What a contestant of full-batch minimisation brings.

    Attributes:
        minimize: asks the oracle, and records its iterates, until the oracle ends it; or returns where it is done.
    """

    minimize: Callable[[Oracle], object]


OptimizerOfRate = Callable[[Sequence[nn.Parameter], float], torch.optim.Optimizer]
RATES = (0.1, 0.3, 1.0, 10.0, 100.0, 1000.0)


def descent(make: OptimizerOfRate, *, scale: float = 1.0) -> Minimizer:
    """A torch optimizer with full gradients, which may choose among six learning rates.

    Args:
        make: makes the optimizer from parameters and a learning rate.
        scale: of the rates, a tenth for those that normalise the gradient.
    """
    return Minimizer(minimize=partial(_descend, make), search={"lr": tuple(scale * rate for rate in RATES)})


def _descend(make: OptimizerOfRate, oracle: Oracle) -> None:
    x = nn.Parameter(oracle.start.clone().view(oracle.shape))
    optimizer = make([x], float(oracle.setting["lr"]))
    oracle.record(x.flatten())
    while True:
        x.grad = oracle.gradient(x.detach().flatten()).view_as(x)
        optimizer.step()
        oracle.record(x.flatten())


def lbfgs(oracle: Oracle) -> None:
    """SciPy's L-BFGS as it comes, without its limits."""

    def both(z: Any) -> tuple[float, Any]:
        x = torch.from_numpy(z.copy())
        return float(oracle(x)), oracle.gradient(x).numpy()

    minimize: Any = scipy.optimize.minimize
    oracle.record(oracle.start)
    minimize(
        both,
        oracle.start.numpy(),
        method="L-BFGS-B",
        jac=True,
        callback=lambda z: oracle.record(torch.from_numpy(z.copy())),
        options={"ftol": 0.0, "gtol": 0.0, "maxiter": 10**6, "maxfun": 10**7},
    )


def thinned(points: Sequence[tuple[float, float]], count: int = 40) -> Mapping[float, float]:
    """Some of the points of a curve, the first and the last among them."""
    kept = sorted({round(i * (len(points) - 1) / (count - 1)) for i in range(count)})
    return dict(points[i] for i in kept)


@dataclass(frozen=True)
class Split:
    """Features with their labels, 0 to `num_classes - 1`, for training and for testing."""

    x_train: Float[Tensor, "n d"]
    y_train: Int[Tensor, " n"]
    x_test: Float[Tensor, "m d"]
    y_test: Int[Tensor, " m"]
    num_classes: int
