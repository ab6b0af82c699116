"""Entropic optimal transport between histograms and point clouds, to a given error of the marginals."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from trimtab.data import load
from trimtab.ops.sinkhorn import sinkhorn
from trimtab.solvers import sinkhorn_newton_sparse
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

Problem = Literal["uniform", "clouds", "images"]


@dataclass(frozen=True)
class Instance:
    """A transport problem in float64, its cost scaled to a largest value of one, and when to stop."""

    cost: Tensor
    a: Tensor
    b: Tensor
    reg: float
    tol: float
    max_iter: int


@dataclass(frozen=True)
class Solution:
    """What a contestant returns.

    Attributes:
        plan: (n, m).
        iterations: sweeps and Newton steps, of whatever kind.
        products: products with a Hessian, in the inner iterations of second-order methods.
        errors: of the marginals after the last of the iterations, one for each; may be empty.
    """

    plan: Tensor
    iterations: int
    products: int = 0
    errors: Sequence[float] = ()


Solver = Callable[[Instance], Solution]


@dataclass(frozen=True)
class Transport(Task):
    """Solve one entropic transport problem; a seed is an instance.

    Attributes:
        problem: "uniform" (costs uniform on [0, 1], as in assignment), "clouds" (two Gaussian clouds in the plane,
            squared distances) or "images" (two MNIST digits as histograms over their pixels; at the smoke budget
            scikit-learn's digits).
        n: number of points on each side; None is the budget's. Images have as many as pixels.
        reg: weight of the entropy where the largest cost is one.
        power: for images, the cost is the distance of pixels to this power, 1 or 2.
    """

    problem: Problem = "clouds"
    n: int | None = None
    reg: float = 1 / 1200
    power: int = 2

    name: ClassVar[str] = "transport"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "iterations": Metric("sweeps and Newton steps", best="min"),
        "seconds": Metric("time (s)", best="min"),
        "marginal_error": Metric("L1 error of the plan's marginals", best="min"),
        "cost_gap": Metric("relative error of the transport cost", best="min"),
        "cg_products": Metric("products with the Hessian", best=None),
    }

    TOLERANCE: ClassVar[float] = 1e-10

    def __post_init__(self) -> None:
        if self.problem not in get_args(Problem):
            raise ValueError(f"problem must be one of {', '.join(get_args(Problem))}, got {self.problem!r}")
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power}")
        if self.n is not None and (self.problem == "images" or self.n < 2):
            raise ValueError(f"n must be at least 2, and None for images, got {self.n} for {self.problem}")

    def solve(self, solver: Solver | None = None) -> Arm:
        """A contestant; without one, log-domain Sinkhorn from zero potentials."""
        return self.arm(solver=solver)

    def run(self, trial: Trial, **options: Any) -> Result:
        solver: Solver = options.get("solver", log_sinkhorn)
        instance = self.instance(trial)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*marginal error.*")  # which is reported
            first = Instance(instance.cost[:8, :8], *(torch.full((8,), 1 / 8).to(instance.cost),) * 2, 0.1, 1e-3, 50)
            solver(first)  # what is set up once in a process is not the solver's time
            trial.report(0.1)
            # A run has one thread: its processor time is what it would take alone, also where runs share the machine.
            clock = time.process_time if instance.cost.device.type == "cpu" else time.perf_counter
            started = clock()
            solution = solver(instance)
            seconds = clock() - started
        trial.report(0.9)
        plan = solution.plan
        error = (plan.sum(1) - instance.a).abs().sum() + (plan.sum(0) - instance.b).abs().sum()
        exact = sinkhorn_newton_sparse(
            instance.cost, instance.a, instance.b, instance.reg, tol=1e-11, density=1.0, max_newton=200
        )
        cost = float((plan * instance.cost).sum())
        end = solution.iterations
        return Result(
            {
                "iterations": float(end),
                "seconds": seconds,
                "marginal_error": float(error),
                "cost_gap": abs(cost - exact.cost) / exact.cost,
                "cg_products": float(solution.products),
            },
            {"error": Curve(list(range(end - len(solution.errors) + 1, end + 1)), list(solution.errors))}
            if solution.errors
            else {},
        )

    def instance(self, trial: Trial) -> Instance:
        """The trial's problem: drawn by its seed, of its budget's size."""
        cost, a, b = self._images(trial) if self.problem == "images" else self._drawn(trial)
        limit = trial.pick(smoke=300, laptop=10_000, paper=100_000)
        cost, a, b = (value.to(trial.device) for value in (cost / cost.max(), a / a.sum(), b / b.sum()))
        return Instance(cost, a, b, self.reg, self.TOLERANCE, limit)

    def _drawn(self, trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
        n = self.n or trial.pick(smoke=60, laptop=400, paper=1000)
        generator = trial.generator()
        weights = torch.ones(n, dtype=torch.float64)
        if self.problem == "uniform":
            return torch.rand(n, n, generator=generator, dtype=torch.float64), weights, weights
        x, y = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
        return torch.cdist(x, 0.7 * y + 1).square(), weights, weights

    def _images(self, trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
        images = load(trial.pick(smoke="digits", laptop="mnist", paper="mnist")).x_test[:, 0]
        side = images.shape[-1]
        pair = torch.randperm(len(images), generator=trial.generator())[:2]
        # A little mass everywhere, so that every pixel takes part.
        a, b = images[pair].double().flatten(1) + 0.01
        axis = torch.arange(side, dtype=torch.float64)
        pixels = torch.cartesian_prod(axis, axis)
        return torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist") ** self.power, a, b


def log_sinkhorn(instance: Instance) -> Solution:
    """Sinkhorn's algorithm, safe at any regularisation."""
    result = sinkhorn(instance.cost, instance.a, instance.b, instance.reg, tol=instance.tol, max_iter=instance.max_iter)
    return Solution(torch.as_tensor(result.plan), result.n_iter, errors=result.errors)


def pot_sinkhorn_log(instance: Instance) -> Solution:
    """POT's log-domain Sinkhorn, stopped at the same L1 error of the marginals.

    POT looks at the L2 error, every tenth sweep. It is run to that tolerance first and, as the L1 error is larger by a
    factor that hardly changes near the solution, continued to the tolerance divided by that factor.

    Raises:
        ImportError: POT is not installed.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError('pot_sinkhorn_log needs POT: pip install "trimtab[peers]"') from error
    cost, a, b = instance.cost, instance.a, instance.b
    goal, start, iterations = instance.tol, None, 0
    while True:
        plan, log = ot.bregman.sinkhorn_log(
            a,
            b,
            cost,
            instance.reg,
            numItermax=instance.max_iter - iterations,
            stopThr=goal,
            log=True,
            warn=False,
            warmstart=start,
        )
        iterations += log["niter"] + 1
        off = (plan.sum(0) - b).abs().sum() + (plan.sum(1) - a).abs().sum()
        if off <= instance.tol or iterations >= instance.max_iter:
            return Solution(plan, iterations)
        goal *= 0.9 * instance.tol / float(off)
        start = log["log_u"], log["log_v"]
