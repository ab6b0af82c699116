"""Finding the graph of a linear structural equation model from observations of it."""

from __future__ import annotations

import contextlib
import io
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from trimtab.solvers import graph_distance, to_dag, topological_order
from trimtab.solvers.order_scores import LeastSquares, covariance
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

Matrix = NDArray[np.float64]
Graph = Literal["ER", "SF"]
Noise = Literal["equal", "unequal"]

# Weights of the sparsity penalty that a contestant with a search chooses from.
LAMBDAS = (0.01, 0.03, 0.1, 0.3)
THRESHOLD = 0.3


@dataclass(frozen=True)
class Observations:
    """What a contestant is given.

    Attributes:
        X: (n, d) samples of the model, columns in random order.
        warm_iter, max_iter: iterations that methods on the log-determinant's path may spend on each stage but the last,
            and on the last.
        seed: for random starts.
    """

    X: Matrix
    warm_iter: int
    max_iter: int
    seed: int


Method = Callable[[Observations], Matrix]
"""Returns weights (d, d) of the edges i -> j, not thresholded."""
Family = Callable[[float], Method]
"""Makes a method of a penalty's weight."""


@dataclass(frozen=True)
class DagRecovery(Task):
    """Recover a random graph from 1,000 samples; a seed is a graph, with its weights and noise.

    Edges weigh between 0.5 and 2, of either sign. Estimates are cut at 0.3, and at the weakest edges while there is a
    cycle. Every noise level is a problem on the same graph, from the same noise in another unit, and metrics are means
    over them. A contestant with a search chooses its penalty on other graphs of the same kind, at the middle
    noise level, by the mean structural Hamming distance, and keeps it for all levels.

    Attributes:
        graph: "ER" (Erdős-Rényi) or "SF" (scale-free, by preferential attachment).
        nodes: number of variables; at most 6 at the smoke budget.
        degree: expected edges per node.
        noise: "equal" variances, or "unequal": for each node uniform between 0.095 and 1.905 times the level, as
            from 0.5 to 10 at level 5.25.
        levels: mean variances of the noise.
    """

    graph: Graph = "ER"
    nodes: int = 20
    degree: int = 4
    noise: Noise = "equal"
    levels: tuple[float, ...] = (1.0,)

    name: ClassVar[str] = "dag-recovery"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "shd": Metric("structural Hamming distance", best="min"),
        "shd_rise": Metric("SHD at the largest noise less that at the smallest", best="min"),
        "tpr": Metric("true edges found", percent=True),
        "fdr": Metric("false among edges found", best="min", percent=True),
        "score_excess": Metric("least-squares score above the true order's", best="min", percent=True),
        "order_excess": Metric("the same, with weights refitted on the estimate's order", best="min", percent=True),
        "seconds": Metric("time of a fit (s)", best="min"),
    }

    def __post_init__(self) -> None:
        if self.graph not in get_args(Graph):
            raise ValueError(f"graph must be one of {', '.join(get_args(Graph))}, got {self.graph!r}")
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, got {self.noise!r}")
        if self.nodes < 3 or self.degree < 1:
            raise ValueError(f"nodes must be at least 3 and degree at least 1, got {self.nodes} and {self.degree}")
        if not self.levels or not all(0 < level < math.inf for level in self.levels):
            raise ValueError(f"levels must be positive numbers, and at least one, got {self.levels}")

    def solve(self, method: Method | None = None, *, search: Family | None = None) -> Arm:
        """A contestant: a method, or a family of methods whose penalty is searched among `LAMBDAS`."""
        if (method is None) == (search is None):
            raise ValueError("solve: give either a method or a family to search")
        return self.arm(method=method, search=search)

    def run(self, trial: Trial, **options: Any) -> Result:
        method: Method = options["method"] if "method" in options else self._best(trial, options["search"])
        rows: list[dict[str, float]] = []
        for k, level in enumerate(self.levels):
            seen, truth = self.problem(trial, level)
            # A run has one thread: its processor time is what it would take alone, also where runs share the machine.
            started = time.process_time()
            estimate = _quietly(method, seen)
            seconds = time.process_time() - started
            rows.append({**self._judge(estimate, truth, seen.X), "seconds": seconds})
            trial.report((k + 1) / len(self.levels))
        shd = [row["shd"] for row in rows]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return Result({**means, "shd_rise": shd[-1] - shd[0]}, {"shd": Curve(self.levels, shd)})

    def problem(self, trial: Trial, level: float, stream: int = 0) -> tuple[Observations, Matrix]:
        """The samples at a noise level, and the true weights."""
        d = trial.pick(smoke=min(self.nodes, 6), laptop=self.nodes, paper=self.nodes)
        n = trial.pick(smoke=200, laptop=1000, paper=1000)
        generator = trial.generator(stream)
        truth = self._weights(d, generator)
        spread = torch.rand(d, generator=generator, dtype=torch.float64).numpy()
        variances = np.ones(d) if self.noise == "equal" else 0.095 + 1.81 * spread
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64).numpy() * np.sqrt(level * variances)
        X = np.linalg.solve(np.eye(d) - truth.T, noise.T).T
        warm, last = trial.pick(smoke=(600, 1200), laptop=(20_000, 70_000), paper=(20_000, 70_000))
        return Observations(X, warm, last, trial.seed), truth

    def _weights(self, d: int, generator: torch.Generator) -> Matrix:
        """Of a random graph whose nodes are in random order."""

        def uniform(*shape: int) -> Matrix:
            return torch.rand(*shape, generator=generator, dtype=torch.float64).numpy()

        edges = np.zeros((d, d), dtype=bool)
        if self.graph == "ER":
            edges = np.triu(uniform(d, d) < 2 * self.degree / (d - 1), 1)
        else:
            for node in range(1, d):
                # Children attach to nodes in proportion to their edges so far, without repetition: the least of
                # exponential times at these rates.
                rates = 1 + edges[:node].sum(1) + edges[:, :node].sum(0)
                times = -np.log1p(-uniform(node)) / rates
                edges[np.argsort(times)[: self.degree], node] = True
        weights = edges * (0.5 + 1.5 * uniform(d, d)) * np.where(uniform(d, d) < 0.5, -1, 1)
        mixed = np.zeros((d, d))
        order = torch.randperm(d, generator=generator).numpy()
        mixed[np.ix_(order, order)] = weights
        return mixed

    def _best(self, trial: Trial, family: Family) -> Method:
        """The family's member with the lowest mean distance on other graphs; the strongest penalty of equals."""
        level = sorted(self.levels)[len(self.levels) // 2]
        others = [
            self.problem(trial, level, stream=stream)
            for stream in trial.pick(smoke=(1,), laptop=(1, 2), paper=(1, 2, 3))
        ]
        mean = {
            lambda1: sum(
                graph_distance(to_dag(_quietly(family(lambda1), seen), THRESHOLD), truth).shd for seen, truth in others
            )
            for lambda1 in trial.pick(smoke=LAMBDAS[1:3], laptop=LAMBDAS, paper=LAMBDAS)
        }
        return family(min(reversed(mean), key=mean.__getitem__))

    def _judge(self, estimate: Matrix, truth: Matrix, X: Matrix) -> dict[str, float]:
        distance = graph_distance(to_dag(estimate, THRESHOLD), truth)
        S = covariance(X)
        score = LeastSquares(S)
        best = score.fit(_order(truth))[1]
        acyclic = to_dag(estimate, 0)
        rest = np.eye(len(S)) - acyclic
        return {
            "shd": float(distance.shd),
            "tpr": distance.tpr,
            "fdr": distance.fdr,
            "score_excess": float(np.vdot(rest, S @ rest)) / (2 * best) - 1,
            "order_excess": score.fit(_order(acyclic))[1] / best - 1,
        }


def dagma(
    lambda1: float = 0.03, *, warm_iter: int | None = None, max_iter: int | None = None, stages: int = 4
) -> Method:
    """DAGMA (Bello et al. 2022) by its authors' package, at the learning rate and path of its defaults.

    Args:
        lambda1: weight of the penalty; the package's default is 0.03.
        warm_iter: most iterations of a stage; by default the task's.
        max_iter: most iterations of the last stage; by default the task's.
        stages: of the path.

    Raises:
        ImportError: dagma is not installed.
    """

    def method(seen: Observations) -> Matrix:
        try:
            from dagma.linear import DagmaLinear
        except ImportError as error:
            raise ImportError('dagma needs the package dagma: pip install "trimtab[peers]"') from error
        # The package centres its input in place, writes into its list of sizes, and shows a progress bar.
        with contextlib.redirect_stderr(io.StringIO()):
            found = DagmaLinear("l2").fit(
                seen.X.copy(),
                lambda1=lambda1,
                w_threshold=0.0,
                T=stages,
                s=[1.0, 0.9, 0.8, 0.7, 0.6][:stages],
                warm_iter=warm_iter or seen.warm_iter,
                max_iter=max_iter or seen.max_iter,
            )
        return np.asarray(found, dtype=np.float64)

    return method


def _quietly(method: Method, seen: Observations) -> Matrix:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at the smoke budget there is no time to settle
        return method(seen)


def _order(W: Matrix) -> NDArray[np.int64]:
    order = topological_order(W)
    if order is None:
        raise ValueError("W must be acyclic")
    return order
