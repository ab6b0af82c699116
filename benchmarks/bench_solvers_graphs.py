"""Learning causal graphs: CoLiDE beside DAGMA's package and NOTEARS, and swaps beside a regression for every node.

NOTEARS is written here as in its paper, with its release's settings. The reference for swaps is what the authors'
release does: after each candidate swap, scikit-learn's regression of every node between the two positions.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterator

import numpy as np
from dagma.linear import DagmaLinear
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LinearRegression

from benchmarks.timing import medians
from trimtab.solvers import CoLiDE, TopoSwaps, graph_distance, h_expm, to_dag
from trimtab.solvers.order_scores import LeastSquares, covariance, lasso_score, swap

SWAPS_AIM = 20


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Time of an iteration on the log-determinant's path, and of scoring all swaps of an order."""
    n = 200 if quick else 1000
    for d in (6,) if quick else (10, 20, 30, 100):
        X, _ = _sampled(d, n, edges=2, equal=False)
        yield from _iterations(X, 200 if quick else 2000 if d < 100 else 200, 1 if quick else 5)
    for d in (6,) if quick else (10, 20):
        yield _whole_fit(*_sampled(d, n), quick)
    for d in (6,) if quick else (10, 30):
        yield from _swaps(_sampled(d, n)[0], 1 if quick else 3)


def _sampled(d: int, n: int, edges: int = 4, equal: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Samples of a linear model on an Erdős-Rényi graph with as many expected edges a node, and its weights."""
    rng = np.random.default_rng(0)
    chosen = np.triu(rng.random((d, d)) < 2 * edges / (d - 1), 1)
    weights = chosen * rng.uniform(0.5, 2, (d, d)) * rng.choice([-1, 1], (d, d))
    order = rng.permutation(d)
    weights = weights[np.ix_(order, order)]
    noise = rng.normal(size=(n, d)) * np.sqrt(1.0 if equal else rng.uniform(0.5, 10, d))
    return np.linalg.solve(np.eye(d) - weights.T, noise.T).T, weights


def _iterations(X: np.ndarray, steps: int, repeats: int) -> Iterator[dict[str, object]]:
    """Two stages with equally many iterations and no rule that would stop either earlier."""

    def ours(noise: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            CoLiDE(noise, mu=(1, 0.1), s=(1, 0.9), warm_iter=steps, max_iter=steps, tol=0).fit(X)

    def peer() -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            DagmaLinear("l2").fit(
                X.copy(), lambda1=0.05, T=2, s=[1, 0.9], warm_iter=steps, max_iter=steps, checkpoint=10**9
            )

    calls = {"CoLiDE-EV": lambda: ours("equal"), "CoLiDE-NV": lambda: ours("unequal"), "dagma": peer}
    seconds = medians(calls, repeats, warmup=1)
    for name in ("CoLiDE-EV", "CoLiDE-NV"):
        ratio = seconds[name] / seconds["dagma"]
        yield {
            "what": f"iteration of {name} against DAGMA, {X.shape[1]} nodes",
            "ours": 1e6 * seconds[name] / (2 * steps),
            "peer": 1e6 * seconds["dagma"] / (2 * steps),
            "ratio": ratio,
            "unit": "µs",
            "aim": "at most 1",
            "met": ratio <= 1,
            "note": f"{2 * steps} iterations",
        }


def notears(X: np.ndarray, lambda1: float = 0.1, h_tol: float = 1e-8, rho_max: float = 1e16) -> np.ndarray:
    """Zheng et al. (2018): an augmented Lagrangian of the matrix exponential's constraint, by L-BFGS-B."""
    X = X - X.mean(0)
    S, d = covariance(X), X.shape[1]
    rho, alpha, h, w = 1.0, 0.0, np.inf, np.zeros(2 * d * d)
    bounds = 2 * [(0, 0 if i == j else None) for i in range(d) for j in range(d)]

    def lagrangian(w: np.ndarray) -> tuple[float, np.ndarray]:
        positive, negative = w.reshape(2, d, d)
        W = positive - negative
        rest = np.eye(d) - W
        image = S @ rest
        value, slope = h_expm(W)
        gradient = -image + (rho * value + alpha) * slope
        total = 0.5 * float((rest * image).sum()) + 0.5 * rho * value**2 + alpha * value + lambda1 * float(w.sum())
        return total, np.concatenate([gradient + lambda1, -gradient + lambda1], axis=None)

    for _ in range(100):
        while True:
            found = minimize(lagrangian, w, method="L-BFGS-B", jac=True, bounds=bounds).x
            new_h, _ = h_expm(np.subtract(*found.reshape(2, d, d)))
            if new_h <= 0.25 * h or rho >= rho_max:
                break
            rho *= 10
        w, h, alpha = found, new_h, alpha + rho * new_h
        if h <= h_tol or rho >= rho_max:
            break
    return np.asarray(np.subtract(*w.reshape(2, d, d)))


def _whole_fit(X: np.ndarray, truth: np.ndarray, quick: bool) -> dict[str, object]:
    """CoLiDE with its defaults, NOTEARS with its authors'."""
    steps = {"warm_iter": 500, "max_iter": 1000} if quick else {}
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found["ours"] = CoLiDE("equal", **steps).fit(X).raw_weights_

    def peer() -> None:
        found["peer"] = notears(X)

    seconds = medians({"ours": ours, "peer": peer}, 1, warmup=0)
    ratio = seconds["ours"] / seconds["peer"]
    distances = {name: graph_distance(to_dag(W), truth).shd for name, W in found.items()}
    return {
        "what": f"whole fit of CoLiDE-EV against NOTEARS, {X.shape[1]} nodes, equal noise",
        "ours": seconds["ours"],
        "peer": seconds["peer"],
        "ratio": ratio,
        "unit": "s",
        "aim": "at most 1",
        "met": ratio <= 1,
        "note": f"structural Hamming distances {distances['ours']} and {distances['peer']}",
    }


def _swaps(X: np.ndarray, repeats: int) -> Iterator[dict[str, object]]:
    X = X - X.mean(0)
    S, d = covariance(X), X.shape[1]
    pairs = list(itertools.combinations(range(d), 2))
    order = np.random.default_rng(0).permutation(d)
    every = np.triu(np.ones((d, d), dtype=bool), 1)

    def by_regressions(regression: LinearRegression | Lasso) -> None:
        for a, b in pairs:
            changed = swap(order, a, b)
            for k in range(max(a, 1), b + 1):
                regression.fit(X[:, changed[:k]], X[:, changed[k]])

    least = medians(
        {
            "ours": lambda: LeastSquares(S).swapped(order, every),
            "peer": lambda: by_regressions(LinearRegression(fit_intercept=False)),
        },
        repeats,
        warmup=0,
    )
    results = {"least squares": least}
    if d <= 10:  # scikit-learn's takes minutes at 30 nodes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            results["lasso"] = medians(
                {
                    "ours": lambda: lasso_score(S, 0.05).swapped(order, every),
                    "peer": lambda: by_regressions(Lasso(0.05, fit_intercept=False)),
                },
                repeats,
                warmup=0,
            )
    for name, seconds in results.items():
        ratio = seconds["ours"] / seconds["peer"]
        plain = name == "least squares"
        yield {
            "what": f"scoring all swaps of an order by {name} against scikit-learn, {d} nodes",
            "ours": 1e3 * seconds["ours"],
            "peer": 1e3 * seconds["peer"],
            "ratio": ratio,
            "unit": "ms",
            "aim": f"at most 1/{SWAPS_AIM}" if plain else "",
            "met": SWAPS_AIM * ratio <= 1 if plain else None,
            "note": f"{len(pairs)} swaps"
            + ("" if plain else "; ours to rounding, scikit-learn's stopped at 1,000 iterations"),
        }
    whole = medians({"ours": lambda: TopoSwaps(random_state=0).fit(X)}, repeats, warmup=0)
    yield {"what": f"TopoSwaps from a random order, {d} nodes", "ours": 1e3 * whole["ours"], "unit": "ms"}
