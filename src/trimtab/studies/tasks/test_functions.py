"""Global minimisation of functions with many local minima or a curved valley, at a given number of evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from trimtab.studies.lr_search import best_learning_rate
from trimtab.studies.study import Arm, Metric, Result, Task, Trial

Function = Literal["rastrigin", "ackley", "rosenbrock"]
Array = Any  # a tensor or a NumPy array: both have what the formulas need


class BudgetSpentError(RuntimeError):
    """A contestant asked for more evaluations than it has."""


@dataclass
class Problem:
    """A function to minimise, which counts how often it is evaluated; each call takes one or many points.

    A value and a gradient count one evaluation each, a matrix of second derivatives as many as there are dimensions.

    Attributes:
        function: the function without its shift.
        minimizer: (dim,), where its global minimum is.
        center: (dim,), the middle of the box and of the cloud that contestants start from.
        budget: evaluations allowed.
        generator: for the contestant's random draws.
        evaluations: how many were made.
        best: the best point whose value was taken, and that value.
    """

    function: Function
    minimizer: Float[Tensor, " dim"]
    center: Float[Tensor, " dim"]
    budget: int
    generator: torch.Generator
    evaluations: int = 0
    best: tuple[Tensor | None, float] = (None, math.inf)
    radius: float = field(default=8.0, init=False)

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
        return values

    def numpy(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same for NumPy arrays."""
        self._count(math.prod(x.shape[:-1]))
        values: NDArray[np.float64] = base(self.function, x - self._minimizer, np)
        lowest = values.min()
        if lowest < self.best[1]:
            self.best = torch.as_tensor(x.reshape(-1, x.shape[-1])[values.argmin()].copy()), float(lowest)
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

    def gauss_newton(self, x: Float[Tensor, " dim"]) -> Float[Tensor, "dim dim"]:
        """The second derivatives of Rosenbrock's function, a sum of squares, without those of its residuals.

        Raises:
            ValueError: the function is no sum of squares.
        """
        if self.function != "rosenbrock":
            raise ValueError(f"gauss_newton needs a sum of squares; {self.function} is none")
        self._count(len(x))
        jacobian: Tensor = torch.func.jacrev(lambda z: _rosenbrock_residuals(z - self.minimizer))(x.detach())
        return 2 * jacobian.mT @ jacobian

    def value(self, x: Float[Tensor, "*points dim"]) -> Float[Tensor, "*points"]:
        """The function itself, differentiable, without counting."""
        values: Tensor = base(self.function, x - self.minimizer, torch)
        return values

    def _count(self, evaluations: int) -> None:
        if self.evaluations + evaluations > self.budget:
            raise BudgetSpentError(f"the budget of {self.budget} evaluations is spent")
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


# Returns the best point a contestant has found, (dim,).
Method = Callable[[Problem], Tensor]
OptimizerFactory = Callable[[Sequence[nn.Parameter], float, torch.Generator], torch.optim.Optimizer]


@dataclass(frozen=True)
class FunctionMinimization(Task):
    """Find the global minimum from a cloud of points at a distance; a run restarts many times.

    Every restart has a minimum of its own, drawn around the origin. The cloud and the box have one centre, four units
    from the minimum along every axis, so that neither their middle nor a round number is where the minimum is.

    Attributes:
        function: "rastrigin", "ackley" (many local minima) or "rosenbrock" (a curved valley).
        dim: 2 to 50.
    """

    function: Function = "rastrigin"
    dim: int = 2

    name: ClassVar[str] = "test-functions"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "success": Metric("runs that end at the global minimum", percent=True),
        "gap": Metric("value above the global minimum", best="min"),
        "evaluations": Metric("evaluations", best=None),
        "seconds": Metric("time of a run (s)", best="min"),
    }

    OFFSET: ClassVar[float] = 4.0
    TOLERANCE: ClassVar[float] = 0.25  # in each coordinate: within the basin of the global minimum
    POINTS: ClassVar[int] = 200

    def __post_init__(self) -> None:
        if self.function not in get_args(Function):
            raise ValueError(f"function must be one of {', '.join(get_args(Function))}, got {self.function!r}")
        if not 2 <= self.dim <= 50:
            raise ValueError(f"dim must be in 2 to 50, got {self.dim}")

    def minimize(self, method: Method) -> Arm:
        """A contestant that is given a problem and returns the best point it finds.

        Where the budget ends it, its answer is the best point whose value it took.
        """
        return self.arm(method=method)

    def descend(self, optimizer: OptimizerFactory, lr: Sequence[float], starts: int = 1) -> Arm:
        """A gradient-based optimizer, run from one or more points of a cloud; the best end point is the answer.

        It takes as many steps as a cloud of 200 points has for the same evaluations, so that it uses them all with 200
        starts. Its learning rate is the one with the lowest final values on restarts that are not counted. All points
        are rows of one parameter, so the optimizer must treat each number alone.

        Args:
            optimizer: makes the optimizer from parameters, a learning rate and a generator.
            lr: learning rates to choose from.
            starts: 1 to 200.

        Raises:
            ValueError: `starts` is out of its range.
        """
        if not 1 <= starts <= self.POINTS:
            raise ValueError(f"starts must be in 1 to {self.POINTS}, got {starts}")
        return self.arm(optimizer=optimizer, lr=tuple(lr), starts=starts)

    def run(self, trial: Trial, **options: Any) -> Result:
        restarts = trial.pick(smoke=1, laptop=10, paper=100)
        problems = list(self.problems(trial, restarts, stream=0))
        started = time.process_time()
        if "method" in options:
            answers = []
            for problem in problems:
                answers.append(_answer(options["method"], problem))
                trial.report(len(answers) / restarts)
        else:
            grid, make, starts = options["lr"], options["optimizer"], options["starts"]
            search = trial.pick(smoke=1, laptop=3, paper=10)

            def score(lr: float) -> float:
                tried = list(self.problems(trial, search, stream=1))
                ends = self._descend(make, lr, tried, starts)
                return -sum(float(p.value(end)) for p, end in zip(tried, ends, strict=True))

            rate = best_learning_rate(grid, score)
            trial.report(0.5)
            started = time.process_time()
            answers = self._descend(make, rate, problems, starts)
        seconds = (time.process_time() - started) / restarts
        off = [float((x - p.minimizer).abs().max()) for x, p in zip(answers, problems, strict=True)]
        gaps = [float(p.value(x)) for x, p in zip(answers, problems, strict=True)]
        return Result(
            {
                "success": sum(distance < self.TOLERANCE for distance in off) / restarts,
                "gap": sum(gaps) / restarts,
                "evaluations": sum(p.evaluations for p in problems) / restarts,
                "seconds": seconds,
            }
        )

    def problems(self, trial: Trial, restarts: int, stream: int) -> Iterator[Problem]:
        """The problems of a trial, the same for every contestant."""
        steps = trial.pick(smoke=4, laptop=200, paper=500)
        for restart in range(restarts):
            generator = trial.generator(1000 * stream + restart)
            minimizer = 2 * torch.rand(self.dim, generator=generator, dtype=torch.float64) - 1
            yield Problem(
                self.function,
                minimizer,
                minimizer + self.OFFSET,
                self.POINTS * (steps * self.dim + 2),
                generator,
            )

    def _descend(self, make: OptimizerFactory, lr: float, problems: Sequence[Problem], starts: int) -> list[Tensor]:
        clouds = torch.stack([problem.cloud(starts) for problem in problems])
        points = nn.Parameter(clouds.flatten(0, 1))
        minimizers = torch.stack([problem.minimizer for problem in problems]).repeat_interleave(starts, 0)
        optimizer = make([points], lr, problems[0].generator)
        steps = problems[0].budget // self.POINTS - 1
        for _ in range(steps):
            optimizer.zero_grad()
            base(self.function, points - minimizers, torch).sum().backward()
            optimizer.step()
        ends = points.detach().view(clouds.shape)
        found = []
        for problem, row in zip(problems, ends, strict=True):
            problem.evaluations = (steps + 1) * starts
            values = problem.value(row).nan_to_num(nan=math.inf)
            found.append(row[values.argmin()])
        return found


def _answer(method: Method, problem: Problem) -> Tensor:
    try:
        return method(problem)
    except BudgetSpentError:
        point = problem.best[0]
        return problem.center if point is None else point


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


def differential_evolution(problem: Problem) -> Tensor:
    """SciPy's differential evolution as it comes, with a member of its population at the centre of the box."""
    evolve: Any = scipy.optimize.differential_evolution
    population = 15 * len(problem.center)
    found = evolve(
        lambda x: problem.numpy(x.T),
        problem.bounds,
        maxiter=problem.budget // population,
        vectorized=True,
        updating="deferred",
        x0=problem.center.numpy(),
        rng=_rng(problem),
    )
    return torch.from_numpy(found.x)


def dual_annealing(problem: Problem) -> Tensor:
    """SciPy's dual annealing as it comes, from the centre of the box; it may end before its evaluations do."""
    anneal: Any = scipy.optimize.dual_annealing
    found = anneal(problem.numpy, problem.bounds, maxfun=problem.budget, x0=problem.center.numpy(), rng=_rng(problem))
    return torch.from_numpy(found.x)


def _rng(problem: Problem) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, (), generator=problem.generator)))
