"""Transport of one digit onto another with a squared penalty, and how fast its dual is solved."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data import load
from trimtab.solvers import sparse_transport
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial


@dataclass(frozen=True)
class Problem:
    """Two digits as histograms over pixels, in float64, and how many non-zeros a column may have.

    Attributes:
        cost: (n, n) squared distances of the pixels, the largest 1.
        a, b: (n,) histograms.
        reg: weight of the squared penalty.
        k: most non-zeros in a column; n leaves them free.
        max_iter: when to stop.
    """

    cost: Tensor
    a: Tensor
    b: Tensor
    reg: float
    k: int
    max_iter: int


@dataclass(frozen=True)
class Solution:
    """What a contestant returns.

    Attributes:
        plan: (n, n).
        values: of the dual, at zero potentials and after each iteration.
    """

    plan: Tensor
    values: Sequence[float]


Solver = Callable[[Problem], Solution]


@dataclass(frozen=True)
class QuadraticTransport(Task):
    """Maximise the dual of one transport problem from zero potentials; a seed is a pair of digits.

    Attributes:
        k: most non-zeros in a column; None leaves them free.
        reg: weight of the squared penalty where the largest cost is one.
    """

    k: int | None = None
    reg: float = 20.0

    name: ClassVar[str] = "quadratic-transport"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "iterations": Metric("iterations until the dual is within 0.1 % of its optimum", best="min"),
        "shortfall": Metric("dual's final shortfall, relative", best="min"),
        "row_error": Metric("L1 error of the plan's rows", best="min"),
        "entries": Metric("most non-zeros in a column", best=None),
        "seconds": Metric("time (s)", best="min"),
    }

    WITHIN: ClassVar[float] = 1e-3

    def solve(self, solver: Solver) -> Arm:
        """A contestant."""
        return self.arm(solver=solver)

    def run(self, trial: Trial, **options: Any) -> Result:
        solver: Solver = options["solver"]
        problem = self.problem(trial)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sparse_transport stopped")  # what is left is reported
            clock = time.process_time
            started = clock()
            solution = solver(problem)
            seconds = clock() - started
            trial.report(0.5)
            exact = sparse_transport(problem.cost, problem.a, problem.b, problem.reg, problem.k, tol=1e-4)
        values = torch.tensor(solution.values)
        best = max(exact.value, float(values.max()))
        shortfalls = (best - values.cummax(0).values) / abs(best)
        within = (shortfalls <= self.WITHIN).nonzero()
        reached = int(within[0]) if len(within) else problem.max_iter
        return Result(
            {
                "iterations": float(reached),
                "shortfall": float(shortfalls[-1]),
                "row_error": float((solution.plan.sum(1) - problem.a).abs().sum()),
                "entries": float((solution.plan > 0).sum(0).max()),
                "seconds": seconds,
            },
            {"shortfall": Curve(list(range(len(values))), shortfalls.clamp_min(1e-9).tolist())},
        )

    def problem(self, trial: Trial) -> Problem:
        """The trial's pair of digits, pooled to half their side: 14 x 14 pixels (4 x 4 at the smoke budget)."""
        images = load(trial.pick(smoke="digits", laptop="mnist", paper="mnist")).x_test
        pair = images[torch.randperm(len(images), generator=trial.generator())[:2]].double()
        pair = F.avg_pool2d(pair, 2)[:, 0]
        side = pair.shape[-1]
        a, b = pair.flatten(1) + 0.01  # so that every pixel takes part
        axis = torch.arange(side, dtype=torch.float64)
        pixels = torch.cartesian_prod(axis, axis)
        cost = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist").square()
        limit = trial.pick(smoke=60, laptop=1000, paper=5000)
        return Problem(cost / cost.max(), a / a.sum(), b / b.sum(), self.reg, self.k or side**2, limit)
