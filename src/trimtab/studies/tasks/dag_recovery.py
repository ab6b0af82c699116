"""Finding the graph of a linear structural equation model from observations of it."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from trimtab.solvers import graph_distance, to_dag, topological_order
from trimtab.solvers.order_scores import LeastSquares, covariance
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Setting, Task, Trial

Matrix = NDArray[np.float64]
Noise = Literal["equal", "unequal"]

THRESHOLD = 0.3


@dataclass(frozen=True)
class Observations:
    """What a contestant is given.

    Attributes:
        X: (n, d) samples of the model, columns in random order.
        warm_iter, max_iter: iterations that methods on the log-determinant's path may spend on each stage but the last,
            and on the last.
        seed: for random starts.
        setting: the values that the search chose, or tries.
    """

    X: Matrix
    warm_iter: int
    max_iter: int
    seed: int
    setting: Setting = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GraphLearner(Entrant):
    """What a contestant of graph recovery brings.

    Attributes:
        learn: weights (d, d) of the edges i -> j, not thresholded.
    """

    learn: Callable[[Observations], Matrix]


@dataclass(frozen=True)
class DagRecovery(Task[GraphLearner]):
    """Recover a random graph (Erdős-Rényi, four edges a node expected) from 1,000 samples.

    A seed is a graph, with its weights and noise. Edges weigh between 0.5 and 2, of either sign. Estimates are cut at
    0.3, and at the weakest edges while there is a cycle. Who has a penalty may choose its weight among five on three
    other graphs of the same kind, by the structural Hamming distance.

    The score is half the mean squared residuals, that of an order with the weights that are best for it.

    Attributes:
        nodes: number of variables; at most 6 at the smoke budget.
        noise: "equal" variances, or "unequal": for each node uniform between 0.095 and 1.905 times the level, as
            from 0.5 to 10 at level 5.25.
        level: mean variance of the noise.
    """

    nodes: int = 20
    noise: Noise = "equal"
    level: float = 1.0

    name: ClassVar[str] = "dag-recovery"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "shd": Metric("structural Hamming distance", best="min"),
        "tpr": Metric("true edges found (%)", percent=True),
        "fdr": Metric("false among edges found (%)", best="min", percent=True),
        "score_excess": Metric("excess of the score over the true order's (%)", best="min", percent=True),
        "order_excess": Metric("excess of the order's score over the true order's (%)", best="min", percent=True),
        "seconds": Metric("time of a fit (s)", best="min"),
    }
    accepts: ClassVar[type[GraphLearner]] = GraphLearner
    tries: ClassVar[int] = 5
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 10, "paper": 10}
    cost: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, got {self.noise!r}")
        if self.nodes < 3:
            raise ValueError(f"nodes must be at least 3, got {self.nodes}")
        if not 0 < self.level < float("inf"):
            raise ValueError(f"level must be a positive number, got {self.level}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"equal noise": equal, "unequal noise": unequal}

    @classmethod
    def references(cls) -> Mapping[str, GraphLearner]:
        return {
            "DAGMA": GraphLearner(learn=dagma, search=LAMBDAS, requires=("dagma",)),
            "DAGMA, default penalty": GraphLearner(learn=dagma, requires=("dagma",)),
            "regressions by variance": GraphLearner(learn=by_variance),
            "no edges": GraphLearner(learn=lambda seen: np.zeros((seen.X.shape[1],) * 2)),
        }

    def run(self, trial: Trial, entrant: GraphLearner) -> Result:
        if trial.searching:
            graphs = trial.pick(smoke=1, laptop=3, paper=3)
            tried = [self._learned(trial, entrant, stream)["shd"] for stream in range(graphs)]
            return Result(score=-sum(tried) / len(tried))
        return Result(self._learned(trial, entrant))

    def _learned(self, trial: Trial, entrant: GraphLearner, stream: int = 0) -> dict[str, float]:
        seen, truth = self.problem(trial, stream)
        # A run has one thread: its processor time is what it would take alone, also where runs share the machine.
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # at the smoke budget there is no time to settle
            estimate = entrant.learn(seen)
        seconds = time.process_time() - started
        return {**judge(estimate, truth, seen.X), "seconds": seconds}

    def problem(self, trial: Trial, stream: int = 0) -> tuple[Observations, Matrix]:
        """The samples and the true weights; those of all noise levels have one graph, and one noise in their unit."""
        d = trial.pick(smoke=min(self.nodes, 6), laptop=self.nodes, paper=self.nodes)
        n = trial.pick(smoke=200, laptop=1000, paper=1000)
        generator = trial.generator(stream)
        truth = random_graph(d, generator)
        spread = torch.rand(d, generator=generator, dtype=torch.float64).numpy()
        variances = np.ones(d) if self.noise == "equal" else 0.095 + 1.81 * spread
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64).numpy() * np.sqrt(self.level * variances)
        X = np.linalg.solve(np.eye(d) - truth.T, noise.T).T
        warm, last = trial.pick(smoke=(600, 1200), laptop=(20_000, 70_000), paper=(20_000, 70_000))
        return Observations(X, warm, last, trial.seed, trial.setting), truth


LAMBDAS: Mapping[str, Sequence[float]] = {"lambda1": (0.003, 0.01, 0.03, 0.1, 0.3)}
equal = DagRecovery()
unequal = DagRecovery(noise="unequal", level=5.25)


def random_graph(d: int, generator: torch.Generator) -> Matrix:
    """Weights (d, d) of an Erdős-Rényi graph of four edges a node expected, its nodes in random order."""

    def uniform(*shape: int) -> Matrix:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).numpy()

    edges = np.triu(uniform(d, d) < 8 / (d - 1), 1)
    weights = edges * (0.5 + 1.5 * uniform(d, d)) * np.where(uniform(d, d) < 0.5, -1, 1)
    mixed = np.zeros((d, d))
    order = torch.randperm(d, generator=generator).numpy()
    mixed[np.ix_(order, order)] = weights
    return mixed


def judge(estimate: Matrix, truth: Matrix, X: Matrix) -> dict[str, float]:
    """What of the graph is right, and its least-squares scores relative to the true order's."""
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


def dagma(seen: Observations) -> Matrix:
    """DAGMA (Bello et al. 2022) by its authors' package, with its default penalty of 0.03 if none was chosen.

    Learning rate and path are its defaults, the numbers of iterations the task's.
    """
    from dagma.linear import DagmaLinear

    # The package centres its input in place, writes into its list of sizes, and shows a progress bar.
    with contextlib.redirect_stderr(io.StringIO()):
        found = DagmaLinear("l2").fit(
            seen.X.copy(),
            lambda1=seen.setting.get("lambda1", 0.03),
            w_threshold=0.0,
            T=4,
            s=[1.0, 0.9, 0.8, 0.7],
            warm_iter=seen.warm_iter,
            max_iter=seen.max_iter,
        )
    return np.asarray(found, dtype=np.float64)


def by_variance(seen: Observations) -> Matrix:
    """Every variable regressed on those of smaller variance (Reisach, Seiler and Weichwald 2021): it learns nothing of
    an order but what the scale of simulated data gives away.
    """
    S = covariance(seen.X)
    weights: Matrix = LeastSquares(S).fit(np.argsort(S.diagonal()).astype(np.int64))[0]
    return weights


def _order(W: Matrix) -> NDArray[np.int64]:
    order = topological_order(W)
    if order is None:
        raise ValueError("W must be acyclic")
    return order
