"""Measurements of a table under differential privacy: sums over rows with Gaussian noise, and quantiles.

Two tables are neighbours if they differ in one row; the number of rows is public. Noise is drawn in floating point by
NumPy: the guarantee is the usual one of real arithmetic, and it needs a seed that nobody knows.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from trimtab.ops.arguments import integer, number, positive
from trimtab.solvers.private_gsd.accounting import gaussian_sigma
from trimtab.solvers.private_gsd.domain import Table
from trimtab.solvers.private_gsd.row_statistics import CellCounts, RowStatistic

_FINER = 4  # bins for each part


def noisy_answers(
    statistic: RowStatistic,
    X: Float[Table, "n d"],
    rho: float,
    generator: np.random.Generator,
    *,
    noise: Float[Table, " queries"] | None = None,
) -> Float[Table, " queries"]:
    """Noisy means over the rows; every workload costs `rho`, so that all cost `rho * len(statistic.sizes)`.

    Args:
        statistic: what is measured.
        X: (n, d) the private table.
        rho: zCDP of a workload, positive.
        generator: draws the noise.
        noise: standard normal numbers to use instead.

    Returns:
        Counts divided by n, with noise of standard deviation `sensitivity / (n sqrt(2 rho))`; those of cells are
        clipped to between 0 and 1.

    Raises:
        TypeError: the table or the noise holds no real numbers.
        ValueError: the table is empty or not finite, `rho` not positive, or noise or the statistic's sums of another
            shape than its sizes or not finite. Nothing has been drawn then.

    Example:
        >>> halves = CellCounts(lambda X: (X >= 0.5).astype(int), sizes=(2,))
        >>> table = np.array([[0.1], [0.7], [0.9], [0.6]])
        >>> noisy_answers(halves, table, 0.25, np.random.default_rng(), noise=np.array([1.0, -1.0])).round(3)
        array([0.75, 0.25])
    """
    X, queries = np.asarray(X), sum(statistic.sizes)
    if X.ndim != 2 or not len(X):
        raise ValueError(f"X must be a table of one row or more, got shape {X.shape}")
    if X.dtype.kind not in "biuf" or (noise is not None and np.asarray(noise).dtype.kind not in "biuf"):
        raise TypeError(f"X and noise must be real numbers, got {X.dtype}")
    if not np.isfinite(X).all():
        raise ValueError("X must be finite, got NaN or infinity")
    sigmas = [gaussian_sigma(sensitivity, rho) for sensitivity in statistic.sensitivities]
    counts = np.asarray(statistic.counts(X), dtype=np.float64)
    for name, sums in (("noise", noise), ("statistic.counts", counts)):
        if sums is not None and np.shape(sums) != (queries,):
            raise ValueError(f"{name} must be of shape ({queries},), got shape {np.shape(sums)}")
        if sums is not None and not np.isfinite(sums).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    if noise is None:
        noise = generator.standard_normal(queries)
    answers: Table = (counts + np.repeat(sigmas, statistic.sizes) * noise) / len(X)
    return answers.clip(0, 1) if isinstance(statistic, CellCounts) else answers


def private_quantiles(
    values: Float[ArrayLike, " n"],
    low: float,
    high: float,
    num: int,
    rho: float,
    generator: np.random.Generator,
    *,
    halvings: int = 10,
) -> Float[Table, " edges"]:
    """Edges between `low` and `high` that cut values into about `num` equal parts, for a zCDP of at most `rho`.

    Starts from equally wide bins, and halves those with more than a quarter of a part, again and again; each time the
    bins' noisy counts say which. Where many values are equal, there are fewer edges.

    Args:
        values: private, all between low and high.
        low: least possible value, public.
        high: largest possible value, public.
        num: number of parts, at least 2.
        rho: the budget, positive; a `halvings + 1`-th of it goes to each look at the values.
        generator: draws the noise.
        halvings: how often bins may be halved, at least 0.

    Returns:
        At most num - 1 increasing numbers strictly between low and high, and at least one.

    Raises:
        TypeError: the values are no real numbers.
        ValueError: a value is not between the bounds, or an argument out of its range.

    Example:
        >>> values = np.linspace(0.0, 1.0, 10_001) ** 2
        >>> private_quantiles(values, 0.0, 1.0, 4, rho=10.0, generator=np.random.default_rng(0)).round(2)
        array([0.06, 0.25, 0.56])
    """
    if np.iscomplexobj(values):
        raise TypeError("values must be real, got complex numbers")
    x, low, high = np.asarray(values, dtype=np.float64), number("low", low), number("high", high)
    if not low < high:
        raise ValueError(f"high must be above low = {low:g}, got {high:g}")
    if x.ndim != 1 or not len(x):
        raise ValueError(f"values must be a vector of one number or more, got shape {x.shape}")
    inside = (x >= low) & (x <= high)
    if not inside.all():
        raise ValueError(f"values must be in [{low:g}, {high:g}], got {x[~inside][0]}")
    num, halvings, rho = integer("num", num, 2), integer("halvings", halvings, 0), positive("rho", rho)
    sigma = gaussian_sigma(math.sqrt(2), rho / (halvings + 1))

    def shares(edges: Float[Table, " bins"]) -> Float[Table, " bins"]:
        counts = np.histogram(x, edges)[0] + sigma * generator.standard_normal(len(edges) - 1)
        return counts.clip(0) + 1e-9 * len(x)

    edges = np.linspace(low, high, num + 1)
    share = shares(edges)
    share /= share.sum()
    for _ in range(halvings):
        heavy = share > 1 / (_FINER * num)
        if not heavy.any():
            break
        parts = np.where(heavy, 2, 1)
        middles = (edges[:-1] + edges[1:])[heavy] / 2
        edges = np.sort(np.concatenate([edges, middles]))
        # A half's share of its whole is what is measured anew.
        parent, new = np.repeat(np.arange(len(parts)), parts), shares(edges)
        share = share[parent] * new / np.bincount(parent, new)[parent]
    # The boundary nearest to each quantile: where a narrow bin holds many values, several have the same.
    below = np.cumsum(share)[:-1]
    wanted = np.arange(1, num)[:, None] / num
    cuts: Table = np.unique(edges[1:-1][np.abs(below - wanted).argmin(1)])
    return cuts
