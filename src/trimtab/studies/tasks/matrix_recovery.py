"""Low-rank matrices from too little, or partly wrong: sensing matrices, samples of entries, images with gaps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from trimtab.data import load
from trimtab.solvers.subgradient_recovery import (
    Operator,
    entry_operator,
    matrix_operator,
    sign_spectral_start,
)
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

Seen = Literal["entries", "sensing", "digits"]


@dataclass(frozen=True)
class Instance:
    """What a solver is given, in float64.

    Attributes:
        values: (m,) measurements.
        operator: the pair of functions from a matrix to its measurements and back.
        entries: rows and columns of the measurements where they are entries.
        shape: of the matrix.
        rank: of the true matrix, or a guess for images.
        psd: whether the matrix is known to be positive semidefinite.
        steps: how many steps a first-order method may make.
    """

    values: Tensor
    operator: Operator
    entries: tuple[Tensor, Tensor] | None
    shape: tuple[int, int]
    rank: int
    psd: bool
    steps: int

    def part(self, kept: Tensor) -> Instance:
        """The instance with these measurements only."""
        forward, adjoint = self.operator
        count = len(self.values)

        def back(weights: Tensor) -> Tensor:
            return adjoint(weights.new_zeros(count).index_copy_(0, kept, weights))

        entries = None if self.entries is None else (self.entries[0][kept], self.entries[1][kept])
        pair = (lambda x: forward(x)[kept], back)
        return replace(self, values=self.values[kept], operator=pair, entries=entries)

    @property
    def table(self) -> np.ndarray:
        """The matrix with NaN for what was not seen; entries only."""
        if self.entries is None:
            raise ValueError("only a sample of entries makes a table")
        found = np.full(self.shape, np.nan)
        found[self.entries[0].numpy(), self.entries[1].numpy()] = self.values.numpy()
        return found


@dataclass(frozen=True)
class Solution:
    """What a contestant returns.

    Attributes:
        matrix: what was found.
        iterations: steps or sweeps.
        losses: one number for each iteration, of the solver's own kind; may be empty.
        seconds: of the fit alone, where settings were searched before it.
    """

    matrix: Tensor
    iterations: int
    losses: Sequence[float] = field(default=())
    seconds: float | None = None


Solver = Callable[[Instance], Solution]


@dataclass(frozen=True)
class MatrixRecovery(Task):
    """Recover one matrix; a seed is an instance.

    Attributes:
        seen: "entries" (a uniform sample of them), "sensing" (inner products with Gaussian matrices) or "digits" (the
            1,797 images as rows, of which a share of the pixels is seen).
        size: rows and columns; None is the budget's. Images have their own.
        rank: of the true matrix.
        samples: measurements for each entry of the matrix; a share where entries are seen.
        noise: standard deviation of the measurements' noise, in units of their root mean square.
        outliers: share of the measurements that is grossly wrong.
        magnitude: standard deviation of what is added to those, in the same unit.
        psd: whether the matrix is positive semidefinite, with a largest eigenvalue of one.
    """

    seen: Seen = "entries"
    size: int | None = None
    rank: int = 3
    samples: float = 0.6
    noise: float = 0.01
    outliers: float = 0.05
    magnitude: float = 10.0
    psd: bool = True

    name: ClassVar[str] = "matrix-recovery"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "error": Metric("relative error of the matrix (of what was not seen, for images)", best="min"),
        "seconds": Metric("time (s)", best="min"),
        "iterations": Metric("steps or sweeps", best=None),
        "seconds_per_iteration": Metric("time for a step or sweep (s)", best="min"),
    }

    def __post_init__(self) -> None:
        if self.seen not in get_args(Seen):
            raise ValueError(f"seen must be one of {', '.join(get_args(Seen))}, got {self.seen!r}")
        if self.samples <= 0 or (self.seen != "sensing" and self.samples > 1):
            raise ValueError(f"samples must be positive, and a share where entries are seen, got {self.samples}")
        if not 0 <= self.outliers < 1:
            raise ValueError(f"outliers must be in [0, 1), got {self.outliers}")
        if self.rank < 1 or (self.size is not None and self.size < self.rank):
            raise ValueError(f"rank must be in [1, size], got {self.rank} for a size of {self.size}")

    def solve(self, solver: Solver | None = None) -> Arm:
        """A contestant; without one, least squares with a penalty on the nuclear norm."""
        return self.arm(solver=solver)

    def run(self, trial: Trial, **options: Any) -> Result:
        solver: Solver = options.get("solver", nuclear_norm)
        truth, instance = self.instance(trial)
        trial.report(0.1)
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")  # of not having converged, which shows in the error
            # A run has one thread, NumPy's products included: its processor time is what it would take alone, also
            # where runs share the machine.
            started = time.process_time()
            solution = solver(instance)
            seconds = solution.seconds or time.process_time() - started
        trial.report(0.9)
        scored = torch.ones(instance.shape, dtype=torch.bool)
        if self.seen == "digits" and instance.entries is not None:
            scored[instance.entries] = False
        error = (solution.matrix - truth)[scored].norm() / truth[scored].norm()
        steps = max(1, solution.iterations)
        losses = list(solution.losses)
        return Result(
            {
                "error": float(error),
                "seconds": seconds,
                "iterations": float(solution.iterations),
                "seconds_per_iteration": seconds / steps,
            },
            {"loss": Curve(list(range(1, len(losses) + 1)), losses)} if losses else {},
        )

    def instance(self, trial: Trial) -> tuple[Tensor, Instance]:
        """The true matrix and what a solver may see of it, drawn by the trial's seed."""
        generator = trial.generator()
        truth = self._truth(trial, generator)
        m, n = truth.shape
        samples = trial.pick(smoke=max(self.samples, 0.5), laptop=self.samples, paper=self.samples)
        entries: tuple[Tensor, Tensor] | None = None
        if self.seen == "sensing":
            sensing = torch.randn(round(samples * m * n), m, n, generator=generator, dtype=torch.float64)
            operator = matrix_operator(sensing)
            values = operator[0](truth)
        else:
            rows, cols = (torch.rand(m, n, generator=generator) < samples).nonzero(as_tuple=True)
            entries = rows, cols
            values = truth[entries]
            operator = entry_operator(rows, cols, n) if m == n else _table_operator(rows, cols, (m, n))
        unit = values.square().mean().sqrt()
        values = values + self.noise * unit * _normal(len(values), generator)
        wrong = torch.rand(len(values), generator=generator) < self.outliers
        values = values + wrong * self.magnitude * unit * _normal(len(values), generator)
        steps = trial.pick(smoke=100, laptop=500, paper=2000)
        rank = trial.pick(smoke=min(self.rank, 3), laptop=self.rank, paper=self.rank)
        return truth, Instance(values, operator, entries, (m, n), rank, self.psd and m == n, steps)

    def _truth(self, trial: Trial, generator: torch.Generator) -> Tensor:
        if self.seen == "digits":
            data = load("digits")
            images = torch.cat([data.x_train, data.x_test]).flatten(1).double()
            return images[: trial.pick(smoke=200, laptop=len(images), paper=len(images))]
        size = self.size or trial.pick(smoke=30, laptop=60, paper=300)
        size = trial.pick(smoke=min(size, 30), laptop=size, paper=size)
        rank = trial.pick(smoke=min(self.rank, 3), laptop=self.rank, paper=self.rank)
        left = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        right = left if self.psd else torch.randn(size, rank, generator=generator, dtype=torch.float64)
        truth: Tensor = left @ right.T / torch.linalg.svdvals(left)[0] / torch.linalg.svdvals(right)[0]
        return truth


def tuned(solver: Callable[..., Solution], settings: Sequence[Mapping[str, Any]], instance: Instance) -> Solution:
    """The solver with those of its settings that predict a fifth of the measurements best, then on all of them.

    The score is the mean absolute error: an outlier adds about as much for every setting, however large it is, while a
    median says nothing where half of the measurements are wrong.
    """
    order = torch.randperm(len(instance.values), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    part = instance.part(kept)

    def score(setting: Mapping[str, Any]) -> float:
        predicted = instance.operator[0](solver(part, **setting).matrix)[held]
        error = float((predicted - instance.values[held]).abs().mean())
        return error if error == error else float("inf")

    best = min(settings, key=score)
    started = time.process_time()
    solution = solver(instance, **best)
    return replace(solution, seconds=time.process_time() - started)


def factored_descent(
    instance: Instance, *, lr: float, delta: float | None = None, decay: float | None = None, init_scale: float = 1e-6
) -> Solution:
    """Gradient descent on a factor with as many columns as the matrix has, for the squared or Huber's loss.

    Args:
        instance: of a positive semidefinite matrix.
        lr: step size; where the loss is squared and `decay` None, stable up to about one.
        delta: where Huber's loss turns linear, in units of the median measurement; None for the squared loss.
        decay: normalise the gradient and shrink the step by this every time, as the subgradient method does.
        init_scale: size of the start, which is the subgradient method's.
    """
    forward, adjoint = instance.operator
    y, count = instance.values, len(instance.values)
    factor = init_scale * sign_spectral_start(y, adjoint, instance.shape[0])
    bound = None if delta is None else delta * float(y.abs().median())
    gain = _gain(instance)
    losses = []
    for step in range(instance.steps):
        residual = forward(factor @ factor.T) - y
        losses.append(float(residual.abs().mean()))
        pull = residual if bound is None else residual.clamp(-bound, bound)
        slope = adjoint(pull) / count
        slope = (slope + slope.T) / 2
        length = lr / gain if decay is None else lr * decay**step / float(slope.norm())
        factor = factor - 2 * length * (slope @ factor)
    return Solution(factor @ factor.T, instance.steps, losses)


def penalised(instance: Instance, *, penalty: float, delta: float | None = None) -> Solution:
    """A penalty on the nuclear norm by accelerated proximal steps: soft-impute, where entries are seen.

    Args:
        instance: of any kind; a positive semidefinite matrix is kept so.
        penalty: its weight, as a share of the least one for which the solution is zero.
        delta: Huber's loss instead of the squared one, as in `factored_descent`.
    """
    forward, adjoint = instance.operator
    y = instance.values
    bound = None if delta is None else delta * float(y.abs().median())

    def pull(residual: Tensor) -> Tensor:
        return residual if bound is None else residual.clamp(-bound, bound)

    step = 1 / _largest_gain(instance)
    threshold = penalty * step * float(torch.linalg.matrix_norm(adjoint(pull(y)), 2))
    found = ahead = torch.zeros(instance.shape, dtype=y.dtype)
    momentum = 1.0
    losses: list[float] = []
    for _ in range(instance.steps):
        residual = forward(ahead) - y
        losses.append(float(residual.abs().mean()))
        before, found = found, _shrink(ahead - step * adjoint(pull(residual)), threshold, instance.psd)
        if float((found - before).norm()) <= 1e-7 * float(found.norm()):
            break
        after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = found + (momentum - 1) / after * (found - before)
        momentum = after
    return Solution(found, len(losses), losses)


_PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
_DELTAS = (0.003, 0.03, 0.3, 3.0)
_LRS, _DECAYS = (0.1, 0.3), (None, 0.985)


def nuclear_norm(instance: Instance) -> Solution:
    """Least squares with the penalty that predicts held-out measurements best."""
    return tuned(penalised, [{"penalty": penalty} for penalty in _PENALTIES], instance)


def huber_nuclear_norm(instance: Instance) -> Solution:
    """The same with Huber's loss, whose threshold is searched too."""
    grid = [{"penalty": penalty, "delta": delta} for penalty in _PENALTIES[::2] for delta in _DELTAS]
    return tuned(penalised, grid, instance)


def squared_descent(instance: Instance) -> Solution:
    """Gradient descent on the squared loss of a full-width factor, from the subgradient method's start."""
    return tuned(factored_descent, [{"lr": lr, "decay": decay} for lr in _LRS for decay in _DECAYS], instance)


def huber_descent(instance: Instance) -> Solution:
    """The same on Huber's loss. As the pull of a measurement is bounded by the threshold, steps are larger for it."""
    grid = [
        {"delta": delta, "decay": decay, "lr": lr if decay else lr / min(1.0, delta)}
        for delta in _DELTAS
        for lr in _LRS
        for decay in _DECAYS
    ]
    return tuned(factored_descent, grid, instance)


def imputer(make: Callable[..., Any], settings: Sequence[Mapping[str, Any]], instance: Instance) -> Solution:
    """A scikit-learn imputer on the table with gaps."""

    def impute(instance: Instance, **setting: Any) -> Solution:
        filled = make(**setting).fit_transform(instance.table)
        return Solution(torch.as_tensor(filled), 1)

    return tuned(impute, settings, instance) if len(settings) > 1 else impute(instance, **settings[0])


def iterative_imputer(instance: Instance) -> Solution:
    """scikit-learn's round of Bayesian ridge regressions, one for each column on all others."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    rounds = 1 if instance.steps <= 100 else 10  # its default, but for the smoke budget
    return imputer(IterativeImputer, [{"max_iter": rounds, "random_state": 0, "keep_empty_features": True}], instance)


def knn_imputer(instance: Instance) -> Solution:
    """scikit-learn's mean over the nearest rows that know the entry."""
    from sklearn.impute import KNNImputer

    grid = [{"n_neighbors": count, "weights": "distance", "keep_empty_features": True} for count in (5, 10, 20)]
    return imputer(KNNImputer, grid, instance)


def _shrink(matrix: Tensor, threshold: float, psd: bool) -> Tensor:
    if psd:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        shrunk: Tensor = (vectors * (values - threshold).clamp_min(0)) @ vectors.T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        shrunk = (left * (values - threshold).clamp_min(0)) @ right
    return shrunk


def _gain(instance: Instance) -> float:
    """Mean square of a measurement of a random matrix with entries of variance one, as a share of the entries."""
    probe = torch.randn(instance.shape, generator=torch.Generator().manual_seed(0), dtype=instance.values.dtype)
    return float(instance.operator[0](probe).square().mean() / probe.square().sum())


def _largest_gain(instance: Instance) -> float:
    """The largest eigenvalue of the operator's square, by power iteration and with a margin."""
    probe = torch.randn(instance.shape, generator=torch.Generator().manual_seed(0), dtype=instance.values.dtype)
    for _ in range(30):
        probe = instance.operator[1](instance.operator[0](probe / probe.norm()))
    return 1.05 * float(probe.norm())


def _table_operator(rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Operator:
    return lambda x: x[rows, cols], lambda w: w.new_zeros(shape).index_put_((rows, cols), w)


def _normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator, dtype=torch.float64)
