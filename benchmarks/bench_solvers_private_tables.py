"""Private synthetic tables: candidates scored a second, and a whole search.

The authors' package (JAX) does not install beside this library's versions, so that its way of scoring stands here in
NumPy: every query's bounds against every edited row, then the norm over all queries. The straightforward way counts
each candidate's whole table again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from benchmarks.timing import medians
from trimtab.solvers import genetic_search, marginals
from trimtab.solvers.private_gsd import CellCounts, Table, mutate, random_rows, swap

POPULATION = 50
AIM = 10
# As many categories as Adult's columns have, numbers in bins.
ADULT = [10, 9, 16, 7, 15, 6, 5, 2, 6, 5, 8, 42, 2]


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Times of a generation of candidates and of a search, on all pairs of columns."""
    domain = ADULT[:5] if quick else ADULT
    pairs = marginals(domain)
    for n in (200,) if quick else (1000, 30_000):
        rng = np.random.default_rng(0)
        X, target = random_rows(domain, n, rng), pairs.counts(random_rows(domain, n, rng))
        for name in ("mutate", "swap"):
            at = rng.integers(n, size=(POPULATION, 1 if name == "mutate" else 2))
            added = (
                mutate(X, at[:, 0], 2, rng.integers(domain[2], size=POPULATION).astype(float))
                if name == "mutate"
                else swap(X, at, 2)
            )
            yield from _generation(
                domain, pairs, X, target, at, added, f"{name}, {n:,} rows", 2 if quick else 5 if n < 10_000 else 2
            )
    yield _search(domain, pairs, 200 if quick else 1000, 300 if quick else 20_000)


def _generation(
    domain: list[int],
    pairs: CellCounts,
    X: Table,
    target: Table,
    at: np.ndarray,
    added: Table,
    what: str,
    repeats: int,
) -> Iterator[dict[str, object]]:
    tracker, removed = pairs.track(X, target), X[at]
    counts = pairs.counts(X)
    columns, low = _bounds(domain)

    def again() -> Table:
        scores, edited = np.empty(len(at)), X.copy()
        for i in range(len(at)):
            edited[at[i]] = added[i]
            scores[i] = np.square(pairs.counts(edited) - target).sum()
            edited[at[i]] = removed[i]
        return scores

    def every_query() -> Table:
        def held(rows_: Table) -> Table:
            values = rows_[:, :, columns]  # (candidates, rows, queries, 2)
            return ((values >= low) & (values < low + 1)).all(3).sum(1)

        return np.square(counts + held(added) - held(removed) - target).sum(1)

    calls = {"ours": lambda: tracker.gains(removed, added), "again": again, "every query": every_query}
    scored = {name: call() for name, call in calls.items()}
    for name in ("again", "every query"):
        if not np.allclose(scored["ours"] + tracker.squared_error(), scored[name], atol=1e-6):
            raise RuntimeError(f"{name} scores candidates otherwise")
    seconds = medians(calls, repeats, warmup=1)
    for name, peer in (("again", "counting all rows again"), ("every query", "the authors' way in NumPy")):
        ratio = seconds[name] / seconds["ours"]
        yield {
            "what": f"candidates a second against {peer}, {what}",
            "ours": len(at) / seconds["ours"],
            "peer": len(at) / seconds[name],
            "ratio": ratio,
            "unit": "1/s",
            "aim": f"at least {AIM}",
            "met": ratio >= AIM,
            "note": f"{len(pairs.sizes)} pairs of columns, {sum(pairs.sizes):,} queries",
        }


def _bounds(domain: list[int]) -> tuple[np.ndarray, Table]:
    """Both columns of each query, and the value that it asks for in each."""
    columns, values = [], []
    for a in range(len(domain)):
        for b in range(a + 1, len(domain)):
            i, j = np.mgrid[: domain[a], : domain[b]]
            columns.append(np.tile([a, b], (i.size, 1)))
            values.append(np.stack([i.ravel(), j.ravel()], 1))
    return np.concatenate(columns), np.concatenate(values).astype(float)


def _search(domain: list[int], pairs: CellCounts, n: int, generations: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    # Uneven, so that there is something to learn.
    answers = pairs.counts(np.floor(0.7 * random_rows(domain, 5 * n, rng))) / (5 * n)

    def search() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            genetic_search([pairs], [answers], domain, n, max_generations=generations, tol=0.0)

    seconds = medians({"ours": search}, 1, warmup=0)["ours"]
    return {
        "what": f"generations a second of a whole search, {n:,} rows",
        "ours": generations / seconds,
        "unit": "1/s",
        "note": f"{POPULATION} candidates each, at most {generations:,}",
    }
