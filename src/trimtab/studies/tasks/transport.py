"""Optimal transport between point clouds and between images, to a cost near the least one."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from trimtab.data import load
from trimtab.ops.sinkhorn import sinkhorn
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Setting, Task, Trial

Points = Literal["uniform", "clouds", "images"]


@dataclass(frozen=True)
class Problem:
    """A transport problem of mass one in float64, its cost scaled to a largest value of one.

    Attributes:
        cost: (n, m).
        a, b: (n,) and (m,), how much is where and how much is wanted.
        setting: the values that the search chose, or tries.
    """

    cost: Float[Tensor, "n m"]
    a: Float[Tensor, " n"]
    b: Float[Tensor, " m"]
    setting: Setting = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TransportSolver(Entrant):
    """What a contestant of transport brings.

    Attributes:
        plan: of about the least cost; where its marginals are not exact, it is rounded to what has them.
    """

    plan: Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Transport(Task[TransportSolver]):
    """Find a plan whose cost is at most 1 % above the least one; a seed is a pair of clouds or images.

    Regularisation is a means here: contestants choose its weight and their tolerance, among ten settings, as the
    quickest with which they are within half of a per cent on another instance; the least weight was added when all had
    chosen the least on uniform costs. Plans whose marginals are off are
    rounded to ones that have them (Altschuler, Weed and Rigollet 2017) before they are judged.

    Attributes:
        points: "uniform" (costs uniform on [0, 1], as in assignment), "clouds" (two Gaussian clouds in the plane,
            squared distances) or "images" (two MNIST digits as histograms over their pixels, 14 x 14 of them; at the
            smoke budget scikit-learn's digits).
        power: for images, the cost is the distance of pixels to this power, 1 or 2.
    """

    points: Points = "clouds"
    power: int = 2

    name: ClassVar[str] = "transport"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "seconds": Metric("time to a cost within 1 % (s)", best="min"),
        "excess": Metric("cost above the least one (%)", best="min", percent=True),
        "entries": Metric("entries of the plan with 1 % of a point's mass or more, for each point", best="min"),
    }
    accepts: ClassVar[type[TransportSolver]] = TransportSolver
    tries: ClassVar[int] = 10
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"reg": (3e-3, 1e-3, 3e-4, 1e-4, 3e-5), "tol": (1e-3, 1e-5)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 10, "paper": 10}
    cost: ClassVar[float] = 1.0

    WITHIN: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        if self.points not in get_args(Points):
            raise ValueError(f"points must be one of {', '.join(get_args(Points))}, got {self.points!r}")
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"uniform costs": uniform, "clouds": clouds, "digits, W1": digits_w1, "digits, W2": digits_w2}

    @classmethod
    def references(cls) -> Mapping[str, TransportSolver]:
        return {
            "Sinkhorn": TransportSolver(plan=_sinkhorn),
            "POT emd": TransportSolver(plan=_pot_emd, search={}, requires=("ot",)),
            "product of the marginals": TransportSolver(
                plan=lambda problem: torch.outer(problem.a, problem.b), search={}
            ),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return () if self.points != "images" else ("digits",) if budget == "smoke" else ("mnist",)

    def run(self, trial: Trial, entrant: TransportSolver) -> Result:
        cost, a, b = draw(trial, self.points, self.power, n=trial.pick(smoke=40, laptop=300, paper=1000), pool=2)
        problem = Problem(cost, a, b, trial.setting)
        plan, seconds = timed(lambda: entrant.plan(problem))
        trial.report(0.7)
        least = least_cost(cost, a, b)
        rounded = rounded_plan(plan, a, b)
        excess = float((rounded * cost).sum()) / least - 1
        if trial.searching:
            # Of those that are well within, the quickest; of the others, the nearest.
            return Result(score=-seconds if excess <= self.WITHIN / 2 else -1e3 * (1 + excess))
        return Result(
            {
                # Who is not there has not needed this time, but more; it counts as no time at all.
                "seconds": seconds if excess <= self.WITHIN else float("inf"),
                "excess": max(excess, 0.0),
                "entries": float((rounded >= 0.01 / len(a)).sum()) / len(a),
            }
        )


uniform = Transport("uniform")
clouds = Transport()
digits_w1 = Transport("images", power=1)
digits_w2 = Transport("images")


def draw(trial: Trial, points: Points, power: int = 2, *, n: int, pool: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A cost whose largest entry is one, and two marginals of mass one, in float64, drawn by the trial's seed.

    Args:
        trial: its seed.
        points: as for `Transport`.
        power: likewise.
        n: number of points on each side; images have as many as pixels.
        pool: images are pooled to this fraction of their side.
    """
    generator = trial.generator()
    a = b = torch.ones(n, dtype=torch.float64)
    if points == "uniform":
        cost = torch.rand(n, n, generator=generator, dtype=torch.float64)
    elif points == "clouds":
        x, y = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
        cost = torch.cdist(x, 0.7 * y + 1).square()
    else:
        images = load(trial.pick(smoke="digits", laptop="mnist", paper="mnist")).x_test
        pair = F.avg_pool2d(images[torch.randperm(len(images), generator=generator)[:2]].double(), pool)[:, 0]
        axis = torch.arange(pair.shape[-1], dtype=torch.float64)
        a, b = pair.flatten(1) + 0.01  # a little mass everywhere, so that every pixel takes part
        pixels = torch.cartesian_prod(axis, axis)
        cost = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist") ** power
    return cost / cost.max(), a / a.sum(), b / b.sum()


def timed(solve: Callable[[], Any]) -> tuple[Any, float]:
    """What `solve()` returns, and the processor time it took; warnings that it has not converged are kept back.

    A run has one thread, so that this is the time it would take alone, also where runs share the machine.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        started = time.process_time()
        found = solve()
        return found, time.process_time() - started


def least_cost(cost: Tensor, a: Tensor, b: Tensor) -> float:
    """The optimum of the linear programme, by HiGHS."""
    n, m = cost.shape
    solve: Any = linprog
    product: Any = kron
    sums: list[Any] = [product(eye_array(n), np.ones((1, m))), product(np.ones((1, n)), eye_array(m))]
    marginals = vstack(sums).tocsr()[:-1]
    found = solve(cost.flatten().numpy(), A_eq=marginals, b_eq=torch.cat([a, b])[:-1].numpy(), method="highs-ds")
    return float(found.fun)


def rounded_plan(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A plan with the marginals, near to one whose marginals are off (Altschuler, Weed and Rigollet 2017)."""
    plan = plan * (a / plan.sum(1).clamp_min(1e-300)).clamp_max(1.0)[:, None]
    plan = plan * (b / plan.sum(0).clamp_min(1e-300)).clamp_max(1.0)
    rows, columns = a - plan.sum(1), b - plan.sum(0)
    missing = float(rows.sum())
    return plan if missing <= 1e-15 else plan + torch.outer(rows, columns) / missing


def _sinkhorn(problem: Problem) -> Tensor:
    reg, tol = problem.setting["reg"], problem.setting["tol"]
    return torch.as_tensor(sinkhorn(problem.cost, problem.a, problem.b, reg, tol=tol, max_iter=20_000).plan)


def _pot_emd(problem: Problem) -> Tensor:
    import ot

    plan: Tensor = ot.emd(problem.a, problem.b, problem.cost, numItermax=10_000_000)
    return plan
