"""Learning causal graphs: CoLiDE's iterations beside DAGMA's package, and swaps beside a regression for every node.

The reference for swaps is what the authors' release does: after each candidate swap, scikit-learn's regression of every
node between the two positions.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterator

import numpy as np
from dagma.linear import DagmaLinear
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LinearRegression

from benchmarks.timing import medians
from trimtab.solvers import CoLiDE, TopoSwaps
from trimtab.solvers.order_scores import LeastSquares, covariance, lasso_score, swap
from trimtab.studies.study import Trial
from trimtab.studies.tasks.dag_recovery import DagRecovery

SWAPS_AIM = 20


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Time of an iteration on the log-determinant's path, and of scoring all swaps of an order."""
    trial = Trial(budget="smoke" if quick else "laptop")
    for d in (6,) if quick else (10, 20, 30, 100):
        seen, _ = DagRecovery(nodes=d, degree=2, noise="unequal").problem(trial, 1.0)
        yield from _iterations(seen.X, 200 if quick else 2000 if d < 100 else 200, 1 if quick else 3)
    for d in (6,) if quick else (10, 30):
        seen, _ = DagRecovery(nodes=d).problem(trial, 1.0)
        yield from _swaps(seen.X, 1 if quick else 3)


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
