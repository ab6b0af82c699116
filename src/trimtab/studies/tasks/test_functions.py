"""Global minimisation of functions with many local minima or a curved valley, at equal numbers of evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Setting, Task, Trial

Function = Literal["rastrigin", "ackley", "rosenbrock"]
Array = Any  # a tensor or a NumPy array: both have what the formulas need

_FOUND = 1e-12


class FinishedError(Exception):
    """The minimum is found, or the evaluations are spent; it ends a contestant, which has nothing to catch."""


@dataclass
class Problem:
    """A function to minimise, which counts how often it is evaluated; each call takes one or many points.

    A value, a gradient and a product with the second derivatives count one evaluation each, their whole matrix as many
    as there are dimensions.

    Attributes:
        function: the function without its shift.
        minimizer: (dim,), where its global minimum is.
        center: (dim,), the middle of the box and of the cloud that contestants start from.
        budget: evaluations allowed.
        generator: for the contestant's random draws.
        setting: the values that the search chose, or tries.
        evaluations: how many were made.
        best: the best point whose value was taken, and that value.
    """

    function: Function
    minimizer: Float[Tensor, " dim"]
    center: Float[Tensor, " dim"]
    budget: int
    generator: torch.Generator
    setting: Setting = field(default_factory=dict)
    evaluations: int = 0
    best: tuple[Tensor | None, float] = (None, math.inf)
    radius: float = field(default=8.0, init=False)

    @property
    def left(self) -> int:
        """Evaluations that are left."""
        return self.budget - self.evaluations

    @cached_property
    def bounds(self) -> list[tuple[float, float]]:
        """The box, for methods that need one."""
        return [(c - self.radius, c + self.radius) for c in self.center.tolist()]

    @cached_property
    def _minimizer(self) -> NDArray[np.float64]:
        return self.minimizer.numpy()

    def cloud(self, n: int) -> Float[Tensor, "n dim"]:
        """Points drawn around the centre with unit variance: where contestants start."""
        noise = torch.randn(n, len(self.center), generator=self.generator, dtype=self.center.dtype)
        return self.center + noise

    def __call__(self, x: Float[Tensor, "*points dim"]) -> Float[Tensor, "*points"]:
        """The values; they count, and the best of them is remembered."""
        self._count(x.shape[:-1].numel())
        values = self.value(x.detach())
        lowest = values.min()
        if float(lowest) < self.best[1]:
            self.best = x.detach()[values == lowest][0] if x.dim() > 1 else x.detach().clone(), float(lowest)
        self._look()
        return values

    def numpy(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same for NumPy arrays."""
        self._count(math.prod(x.shape[:-1]))
        values: NDArray[np.float64] = base(self.function, x - self._minimizer, np)
        lowest = values.min()
        if lowest < self.best[1]:
            self.best = torch.as_tensor(x.reshape(-1, x.shape[-1])[values.argmin()].copy()), float(lowest)
        self._look()
        return values

    def gradient(self, x: Float[Tensor, "*points dim"]) -> Float[Tensor, "*points dim"]:
        """Derivatives at each point."""
        self._count(x.shape[:-1].numel())
        with torch.enable_grad():
            leaves = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.value(leaves).sum(), leaves)
        return gradient

    def hessian(self, x: Float[Tensor, " dim"]) -> Float[Tensor, "dim dim"]:
        """Second derivatives at one point."""
        self._count(len(x))
        hessian: Tensor = torch.func.hessian(self.value)(x.detach())
        return hessian

    def hessian_vector(self, x: Float[Tensor, " dim"], v: Float[Tensor, " dim"]) -> Float[Tensor, " dim"]:
        """Second derivatives at a point times a vector."""
        self._count(1)
        product: Tensor = torch.func.jvp(torch.func.grad(self.value), (x.detach(),), (v,))[1]
        return product

    def gauss_newton(self, x: Float[Tensor, " dim"]) -> Float[Tensor, "dim dim"]:
        """The second derivatives of a sum of squares without those of its residuals.

        Raises:
            ValueError: the function is no sum of squares, as Ackley's is not.
        """
        if self.function not in _RESIDUALS:
            raise ValueError(f"function must be one of {', '.join(_RESIDUALS)}, got {self.function!r}")
        self._count(len(x))
        residuals = _RESIDUALS[self.function]
        jacobian: Tensor = torch.func.jacrev(lambda z: residuals(z - self.minimizer))(x.detach())
        return 2 * jacobian.mT @ jacobian

    def value(self, x: Float[Tensor, "*points dim"]) -> Float[Tensor, "*points"]:
        """The function itself, differentiable, without counting."""
        values: Tensor = base(self.function, x - self.minimizer, torch)
        return values

    def _look(self) -> None:
        if self.best[1] < _FOUND:
            raise FinishedError

    def _count(self, evaluations: int) -> None:
        if self.evaluations + evaluations > self.budget:
            raise FinishedError
        self.evaluations += evaluations


def base(function: Function, x: Array, xp: Any) -> Array:
    """The function with its only global minimum, zero, at the origin; `xp` is torch or NumPy."""
    if function == "rastrigin":
        return (x**2 + 2.5 * (1 - xp.cos(2 * math.pi * x))).sum(-1)
    if function == "ackley":
        far = xp.exp(-0.2 * xp.sqrt((x**2).mean(-1) + 1e-300))  # differentiable at the origin too
        return 20 * (1 - far) + math.e - xp.exp(xp.cos(2 * math.pi * x).mean(-1))
    residuals = _rosenbrock_residuals(x)
    return (residuals**2).sum(-1)


def _rosenbrock_residuals(x: Array) -> Array:
    """Rosenbrock's valley with its minimum moved from (1, ..., 1) to the origin, chained over all dimensions."""
    head, tail = x[..., :-1] + 1, x[..., 1:] + 1
    cat = torch.cat if isinstance(x, Tensor) else np.concatenate
    return cat([10 * (tail - head**2), 1 - head], -1)


def _rastrigin_residuals(x: Tensor) -> Tensor:
    """One minus a cosine is twice the square of the sine of half the angle."""
    return torch.cat([x, math.sqrt(5) * torch.sin(math.pi * x)], -1)


_RESIDUALS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "rastrigin": _rastrigin_residuals,
    "rosenbrock": _rosenbrock_residuals,
}


@dataclass(frozen=True, kw_only=True)
class GlobalMinimizer(Entrant):
    """What a contestant of global minimisation brings.

    Attributes:
        minimize: evaluates the problem until its evaluations are spent; it may leave earlier. The answer is the best
            point whose value it took, so that whoever has no use for values takes that of its last points.
    """

    minimize: Callable[[Problem], object]


OptimizerFactory = Callable[[Sequence[nn.Parameter], float, torch.Generator], torch.optim.Optimizer]
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
STARTS = (20, 200)


def descent(make: OptimizerFactory) -> GlobalMinimizer:
    """A torch optimizer from many points of the cloud at once; it chooses its learning rate, and how many they are.

    All points are rows of one parameter, so the optimizer must treat each number alone.
    """
    return GlobalMinimizer(minimize=partial(_descend, make), search={"lr": RATES, "starts": STARTS})


def _descend(make: OptimizerFactory, problem: Problem) -> None:
    starts = int(problem.setting["starts"])
    points = nn.Parameter(problem.cloud(starts))
    optimizer = make([points], float(problem.setting["lr"]), problem.generator)
    for _ in range(problem.left // starts - 1):
        points.grad = problem.gradient(points)
        optimizer.step()
    problem(points.detach().nan_to_num(nan=math.inf))


def restarted(minimize: Callable[[Problem, Tensor], object], problem: Problem) -> None:
    """A local method, from one point of the cloud after another."""
    while True:
        minimize(problem, problem.cloud(1)[0])


def _lbfgs(problem: Problem, start: Tensor) -> None:
    def both(z: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        x = torch.from_numpy(z.copy())
        return float(problem(x)), problem.gradient(x).numpy()

    minimize: Any = scipy.optimize.minimize
    minimize(both, start.numpy(), method="L-BFGS-B", jac=True, options={"ftol": 0.0, "gtol": 1e-8})


class AnnealedLangevin(torch.optim.Optimizer):
    """Gradient steps with noise that falls like the logarithm of time, as in the illustrations of "Gradient is All You
    Need?": step number k adds `sigma / log(k + 1) * sqrt(lr)` times standard normal numbers.
    """

    def __init__(
        self, params: Sequence[nn.Parameter], lr: float, sigma: float = 10.0, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(params, {"lr": lr, "sigma": sigma})
        self.generator = generator
        self.taken = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        self.taken += 1
        for group in self.param_groups:
            width = group["sigma"] / math.log(self.taken + 1) * math.sqrt(group["lr"])
            for p in group["params"]:
                noise = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
                p.sub_(p.grad, alpha=group["lr"]).add_(noise, alpha=width)


def differential_evolution(problem: Problem) -> None:
    """SciPy's differential evolution, with a member of its population at the centre of the box."""
    evolve: Any = scipy.optimize.differential_evolution
    size = int(problem.setting["popsize"])
    while True:
        evolve(
            lambda x: problem.numpy(x.T),
            problem.bounds,
            maxiter=problem.budget,
            popsize=size,
            vectorized=True,
            updating="deferred",
            x0=problem.center.numpy(),
            rng=_rng(problem),
        )


def dual_annealing(problem: Problem) -> None:
    """SciPy's dual annealing, from the centre of the box; begun anew where it ends before its evaluations do."""
    anneal: Any = scipy.optimize.dual_annealing
    while True:
        anneal(
            problem.numpy,
            problem.bounds,
            initial_temp=float(problem.setting["initial_temp"]),
            maxfun=10**9,
            x0=problem.center.numpy(),
            rng=_rng(problem),
        )


def _rng(problem: Problem) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, (), generator=problem.generator)))


@dataclass(frozen=True)
class TestFunctions(Task[GlobalMinimizer]):
    """Find the global minimum from a cloud of points at a distance; a run restarts three times.

    Every restart has a minimum of its own, drawn around the origin. The cloud and the box have one centre, four units
    from the minimum along every axis, so that neither their middle nor a round number is where the minimum is.
    Everybody has the same evaluations, 10,000 for each dimension, is stopped where a value is within 1e-12 of the
    minimum, and chooses among up to twelve settings on other restarts; grids were extended once, when most had chosen
    an end. The answer is the best point whose value was taken.

    Attributes:
        function: "rastrigin", "ackley" (many local minima) or "rosenbrock" (a curved valley).
        dim: 2 to 50.
    """

    __test__: ClassVar[bool] = False

    function: Function = "rastrigin"
    dim: int = 2

    name: ClassVar[str] = "test-functions"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "success": Metric("success rate (%)", percent=True),
        "gap": Metric("value above the global minimum", best="min"),
        "digits": Metric("decimal digits of the value, from 10 above the minimum to 1e-12"),
        "evaluations": Metric("evaluations until 1e-12 is reached", best="min"),
        "seconds": Metric("time of a restart (s)", best="min"),
    }
    accepts: ClassVar[type[GlobalMinimizer]] = GlobalMinimizer
    tries: ClassVar[int] = 12
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 6, "paper": 10}
    cost: ClassVar[float] = 4.0

    OFFSET: ClassVar[float] = 4.0
    TOLERANCE: ClassVar[float] = 0.25  # in each coordinate: within the basin of the global minimum

    def __post_init__(self) -> None:
        if self.function not in get_args(Function):
            raise ValueError(f"function must be one of {', '.join(get_args(Function))}, got {self.function!r}")
        if not 2 <= self.dim <= 50:
            raise ValueError(f"dim must be in 2 to 50, got {self.dim}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"Rastrigin 2-d": plane, "Rastrigin 10-d": space, "Rosenbrock 10-d": valley}

    @classmethod
    def references(cls) -> Mapping[str, GlobalMinimizer]:
        return {
            "gradient descent": descent(lambda points, lr, generator: torch.optim.SGD(points, lr=lr)),
            "Adam": descent(lambda points, lr, generator: torch.optim.Adam(points, lr=lr)),
            "Langevin": descent(lambda points, lr, generator: AnnealedLangevin(points, lr, generator=generator)),
            "L-BFGS, restarted": GlobalMinimizer(minimize=partial(restarted, _lbfgs)),
            "differential evolution": GlobalMinimizer(
                minimize=differential_evolution, search={"popsize": (2, 5, 10, 15, 30)}
            ),
            "dual annealing": GlobalMinimizer(
                minimize=dual_annealing, search={"initial_temp": (50, 500, 5230, 50_000)}
            ),
        }

    def run(self, trial: Trial, entrant: GlobalMinimizer) -> Result:
        restarts = trial.pick(smoke=1, laptop=3, paper=20)
        off, gaps, spent, started = [], [], 0, time.process_time()
        for problem in self.problems(trial, restarts):
            with suppress(FinishedError):
                entrant.minimize(problem)
            point = problem.center if problem.best[0] is None else problem.best[0]
            off.append(float((point - problem.minimizer).abs().max()))
            gaps.append(float(problem.value(point)))
            spent += problem.evaluations if problem.best[1] < _FOUND else problem.budget
            trial.report(len(gaps) / restarts)
        success = sum(distance < self.TOLERANCE for distance in off) / restarts
        digits = sum(1 - math.log10(min(max(gap, 1e-12), 10.0)) for gap in gaps) / restarts
        if trial.searching:
            return Result(score=success + digits / 1000)
        return Result(
            {
                "success": success,
                "gap": sum(gaps) / restarts,
                "digits": digits,
                "evaluations": spent / restarts,
                "seconds": (time.process_time() - started) / restarts,
            }
        )

    def problems(self, trial: Trial, restarts: int) -> Iterator[Problem]:
        """The problems of a trial, the same for every contestant."""
        evaluations = trial.pick(smoke=1_000, laptop=10_000, paper=100_000) * self.dim
        for restart in range(restarts):
            generator = trial.generator(restart)
            minimizer = 2 * torch.rand(self.dim, generator=generator, dtype=torch.float64) - 1
            center = minimizer + self.OFFSET
            yield Problem(self.function, minimizer, center, evaluations, generator, trial.setting)


plane = TestFunctions()
space = TestFunctions(dim=10)
valley = TestFunctions("rosenbrock", dim=10)
