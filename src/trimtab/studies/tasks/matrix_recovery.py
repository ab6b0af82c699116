"""Low-rank matrices from a sample of their entries, some of which may be grossly wrong, and tables with gaps."""

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
from trimtab.solvers.subgradient_recovery import Operator, entry_operator, matrix_operator
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Setting, Task, Trial

Kind = Literal["outliers", "similarities", "digits"]


@dataclass(frozen=True)
class Instance:
    """What a solver is given, in float64.

    Attributes:
        values: (m,) measurements.
        operator: the pair of functions from a matrix to its measurements and back.
        entries: rows and columns of the measurements where they are entries.
        shape: of the matrix.
        psd: whether the matrix is known to be positive semidefinite.
        steps: how many steps a first-order method may make.
        setting: the values that the search chose, or tries.
    """

    values: Tensor
    operator: Operator
    entries: tuple[Tensor, Tensor] | None
    shape: tuple[int, int]
    psd: bool
    steps: int
    setting: Setting = field(default_factory=dict)

    def parted(self) -> tuple[Instance, Tensor]:
        """The instance with four fifths of its measurements, and which are held out."""
        order = torch.randperm(len(self.values), generator=torch.Generator().manual_seed(0))
        held, kept = order[: len(order) // 5], order[len(order) // 5 :]
        forward, adjoint = self.operator
        count = len(self.values)

        def back(weights: Tensor) -> Tensor:
            return adjoint(weights.new_zeros(count).index_copy_(0, kept, weights))

        entries = None if self.entries is None else (self.entries[0][kept], self.entries[1][kept])
        pair = (lambda x: forward(x)[kept], back)
        return replace(self, values=self.values[kept], operator=pair, entries=entries), held

    def error(self, matrix: Tensor, held: Tensor) -> float:
        """Mean absolute error on held-out measurements; infinite where it is no number.

        An outlier adds about as much to it for every matrix, however large it is, while a median says nothing where
        half of the measurements are wrong.
        """
        error = float((self.operator[0](matrix)[held] - self.values[held]).abs().mean())
        return error if error == error else float("inf")

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
    """What was found, in how many steps or sweeps, and a number for each of them of the solver's own kind, if any."""

    matrix: Tensor
    iterations: int
    losses: Sequence[float] = field(default=())


@dataclass(frozen=True, kw_only=True)
class Recovery(Entrant):
    """What a contestant of matrix recovery brings.

    Attributes:
        recover: the matrix, from what is seen of it.
    """

    recover: Callable[[Instance], Solution]


@dataclass(frozen=True)
class MatrixRecovery(Task[Recovery]):
    """Fill in a matrix from the entries that are seen; a seed is an instance.

    Contestants choose among at most twenty settings by the mean absolute error on a fifth of the seen entries of
    another instance, held out; grids were extended once, at both ends, when most had chosen an end. None is told the
    rank. The error is that of the whole matrix, for images that of what was not seen.

    Attributes:
        kind: "outliers" (a positive semidefinite matrix of 60 x 60 and rank 3, of which 60 % of the entries are seen
            with 1 % of noise, a tenth of them off by ten times their size), "similarities" (the correlations of 200
            images of digits, 60 % of them seen) or "digits" (the 1,797 images as rows of 64 pixels, 70 % of them seen).
    """

    kind: Kind = "outliers"

    name: ClassVar[str] = "matrix-recovery"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "error": Metric("relative error of the matrix", best="min"),
        "seconds": Metric("time of the fit (s)", best="min"),
        "iterations": Metric("steps or sweeps", best=None),
    }
    accepts: ClassVar[type[Recovery]] = Recovery
    tries: ClassVar[int] = 20
    cost: ClassVar[float] = 1.5

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"outliers": outliers, "similarities": similarities, "digits": digits}

    @classmethod
    def references(cls) -> Mapping[str, Recovery]:
        penalties = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
        neighbours, ranks = {"n_neighbors": (2, 5, 10, 20, 40)}, {"rank": (1, 3, 5, 10, 20, 40)}
        return {
            "soft-impute": Recovery(recover=nuclear_norm, search={"penalty": penalties}),
            "robust PCA": Recovery(
                recover=nuclear_norm,
                search={"penalty": (1e-4, 1e-3, 1e-2, 0.1, 1.0), "delta": (0.001, 0.003, 0.03, 0.3)},
            ),
            "truncated SVD, repeated": Recovery(recover=repeated_svd, search=ranks),
            "nearest rows": Recovery(recover=knn_imputer, search=neighbours),
            "ridge regressions": Recovery(recover=iterative_imputer),
            "means of columns": Recovery(recover=mean_imputer),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return () if self.kind == "outliers" else ("digits",)

    def run(self, trial: Trial, entrant: Recovery) -> Result:
        truth, instance = self.instance(trial)
        if trial.searching:
            part, held = instance.parted()
            return Result(score=-instance.error(fitted(entrant.recover, part)[0].matrix, held))
        solution, seconds = fitted(entrant.recover, instance)
        scored = torch.ones(instance.shape, dtype=torch.bool)
        if self.kind != "outliers" and instance.entries is not None:
            scored[instance.entries] = False
        error = float((solution.matrix - truth)[scored].norm() / truth[scored].norm())
        return Result({"error": error, "seconds": seconds, "iterations": float(solution.iterations)})

    def instance(self, trial: Trial) -> tuple[Tensor, Instance]:
        """The true matrix and what a solver may see of it, drawn by the trial's seed."""
        generator = trial.generator()
        if self.kind == "outliers":
            truth = low_rank(trial.pick(smoke=30, laptop=60, paper=300), 3, generator)
            drawn = seen_entries(truth, 0.6, generator, noise=0.01, outliers=0.1)
        else:
            data = load("digits")
            truth = torch.cat([data.x_train, data.x_test]).flatten(1).double()
            if self.kind == "similarities":
                count = trial.pick(smoke=40, laptop=200, paper=1000)
                truth = torch.corrcoef(truth[torch.randperm(len(truth), generator=generator)[:count]])
            elif trial.budget == "smoke":
                truth = truth[:200]
            mirrored = self.kind == "similarities"  # what is hidden is seen nowhere else
            drawn = seen_entries(truth, 0.6 if mirrored else 0.7, generator, mirrored=mirrored)
        steps = trial.pick(smoke=100, laptop=500, paper=2000)
        return truth, replace(drawn, psd=self.kind != "digits", steps=steps, setting=trial.setting)


outliers = MatrixRecovery()
similarities = MatrixRecovery("similarities")
digits = MatrixRecovery("digits")


def low_rank(size: int, rank: int, generator: torch.Generator, *, psd: bool = True) -> Tensor:
    """A square matrix whose largest singular value is about one."""
    left = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    right = left if psd else torch.randn(size, rank, generator=generator, dtype=torch.float64)
    truth: Tensor = left @ right.T / torch.linalg.svdvals(left)[0] / torch.linalg.svdvals(right)[0]
    return truth


def seen_entries(
    truth: Tensor,
    share: float,
    generator: torch.Generator,
    *,
    noise: float = 0.0,
    outliers: float = 0.0,
    mirrored: bool = False,
) -> Instance:
    """A sample of the entries, with their mirror images if `mirrored`; for `noise` and `outliers` see `disturbed`."""
    m, n = truth.shape
    seen = torch.rand(m, n, generator=generator) < share
    if mirrored:
        seen = seen.triu() | seen.triu().T
    rows, cols = seen.nonzero(as_tuple=True)
    operator = entry_operator(rows, cols, n) if m == n else _table_operator(rows, cols, (m, n))
    values = disturbed(truth[rows, cols], generator, noise=noise, outliers=outliers)
    return Instance(values, operator, (rows, cols), (m, n), psd=False, steps=500)


def seen_through_gaussians(truth: Tensor, count: int, generator: torch.Generator, **wrong: float) -> Instance:
    """Inner products with Gaussian matrices."""
    sensing = torch.randn(count, *truth.shape, generator=generator, dtype=torch.float64)
    operator = matrix_operator(sensing)
    values = disturbed(operator[0](truth), generator, **wrong)
    return Instance(values, operator, None, (truth.shape[0], truth.shape[1]), psd=True, steps=500)


def disturbed(
    values: Tensor, generator: torch.Generator, *, noise: float = 0.0, outliers: float = 0.0, magnitude: float = 10.0
) -> Tensor:
    """Measurements with noise, and a share of them grossly wrong, all in units of their root mean square."""
    unit, count = values.square().mean().sqrt(), len(values)
    values = values + noise * unit * _normal(count, generator)
    wrong = torch.rand(count, generator=generator) < outliers
    return values + wrong * magnitude * unit * _normal(count, generator)


def fitted(recover: Callable[[Instance], Solution], instance: Instance) -> tuple[Solution, float]:
    """The solution, and the processor time it took."""
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # of not having converged, which shows in the error
        # A run has one thread, NumPy's products included: its processor time is what it would take alone, also
        # where runs share the machine.
        started = time.process_time()
        solution = recover(instance)
        return solution, time.process_time() - started


def penalised(instance: Instance, *, penalty: float, delta: float | None = None) -> Solution:
    """A penalty on the nuclear norm by accelerated proximal steps: soft-impute, where entries are seen.

    Args:
        instance: of any kind; a positive semidefinite matrix is kept so.
        penalty: its weight, as a share of the least one for which the solution is zero.
        delta: Huber's loss instead of the squared one, its threshold in units of the median measurement.
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


def nuclear_norm(instance: Instance) -> Solution:
    """A penalty on the nuclear norm with the chosen weight, and Huber's loss where a threshold was chosen."""
    return penalised(instance, **instance.setting)


def repeated_svd(instance: Instance) -> Solution:
    """The gaps filled by the means of the columns, and then a hundred times by the truncated SVD of what results."""
    if instance.entries is None:
        raise ValueError("only a sample of entries makes a table")
    found = mean_imputer(instance).matrix
    rank, rounds = min(int(instance.setting["rank"]), *instance.shape), 100
    for _ in range(rounds):
        found[instance.entries] = instance.values
        left, values, right = torch.linalg.svd(found, full_matrices=False)
        found = (left[:, :rank] * values[:rank]) @ right[:rank]
    return Solution(found, rounds)


def imputed(imputer: Any, instance: Instance) -> Solution:
    """What a scikit-learn imputer makes of the table with gaps."""
    return Solution(torch.as_tensor(imputer.fit_transform(instance.table)), 1)


def iterative_imputer(instance: Instance) -> Solution:
    """scikit-learn's rounds of Bayesian ridge regressions, one for each column on the twenty most like it."""
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    rounds = 1 if instance.steps <= 100 else 5
    imputer = IterativeImputer(max_iter=rounds, random_state=0, keep_empty_features=True, n_nearest_features=20)
    return imputed(imputer, instance)


def knn_imputer(instance: Instance) -> Solution:
    """scikit-learn's mean over the nearest rows that know the entry."""
    from sklearn.impute import KNNImputer

    return imputed(KNNImputer(**instance.setting, weights="distance", keep_empty_features=True), instance)


def mean_imputer(instance: Instance) -> Solution:
    """The mean of the column."""
    from sklearn.impute import SimpleImputer

    return imputed(SimpleImputer(keep_empty_features=True), instance)


def _shrink(matrix: Tensor, threshold: float, psd: bool) -> Tensor:
    if psd:
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        shrunk: Tensor = (vectors * (values - threshold).clamp_min(0)) @ vectors.T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        shrunk = (left * (values - threshold).clamp_min(0)) @ right
    return shrunk


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
