r"""Statistics of a table that are sums over its rows: marginals, prefix and halfspace queries, and any of your own.

As sums, they follow an edit of a row without a look at the other rows. A *workload* is a set of queries that is
measured together. Where every row is counted by at most one query of a workload, as in a marginal, a table's counts
are the numbers of rows in cells, $c_q = \#\{i : \text{cell}(x_i) = q\}$, and one row moved from cell $a$ to cell $b$
changes the squared distance to a target $t$, with $e = c - t$, by

$$
\lVert e' \rVert^2 - \lVert e \rVert^2 = 2 (e_b - e_a) + 2 \qquad (a \ne b)
$$

in a time that does not depend on the number of cells: a candidate edit costs a few operations for each workload.

Domains, thresholds and directions must be public: nothing here is private by itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike, NDArray

from trimtab.ops.arguments import integer
from trimtab.solvers.private_gsd.domain import Domain, Table, read_domain, real_bounds


class Tracker(Protocol):
    """The distance of a table's sums to their targets, and how it changes with edits of rows."""

    def squared_error(self) -> float:
        """Sum of squares over all queries, in counts."""
        ...

    def gains(
        self, removed: Float[Table, "edits rows d"], added: Float[Table, "edits rows d"]
    ) -> Float[Table, " edits"]:
        """What each edit would add to `squared_error`; negative where it helps."""
        ...

    def accept(self, removed: Float[Table, "rows d"], added: Float[Table, "rows d"]) -> None:
        """Makes an edit."""
        ...


class RowStatistic(Protocol):
    """A vector of queries, each a sum over rows.

    Attributes:
        sizes: number of queries of each workload; they stand one after another.
        sensitivities: the most that replacing one row changes each workload's sums by, in Euclidean norm.
    """

    @property
    def sizes(self) -> tuple[int, ...]: ...

    @property
    def sensitivities(self) -> tuple[float, ...]: ...

    def counts(self, X: Float[Table, "n d"]) -> Float[Table, " queries"]:
        """The sums over the rows of X."""
        ...

    def track(self, X: Float[Table, "n d"], target: Float[Table, " queries"]) -> Tracker:
        """The distance of X's sums to these."""
        ...


@dataclass(frozen=True)
class CellCounts:
    """Numbers of rows in cells, where a row is in at most one cell of each workload.

    Attributes:
        cells: from rows (n, d) to the query that counts each row, (n, workloads) integers; -1 where none does.
        sizes: number of cells of each workload.

    Example:
        >>> halves = CellCounts(lambda X: (X >= 0.5).astype(int), sizes=(2,))
        >>> halves.counts(np.array([[0.1], [0.7], [0.9]]))
        array([1., 2.])
    """

    cells: Callable[[Float[Table, "n d"]], Int[NDArray[np.int64], "n workloads"]]
    sizes: tuple[int, ...]

    @property
    def sensitivities(self) -> tuple[float, ...]:
        """A replaced row leaves one cell and enters another; where there is but one, it can only do either."""
        return tuple(math.sqrt(2) if size > 1 else 1.0 for size in self.sizes)

    def counts(self, X: Float[Table, "n d"]) -> Float[Table, " queries"]:
        found = self.cells(X)
        return np.bincount(found[found >= 0], minlength=sum(self.sizes)).astype(np.float64)

    def track(self, X: Float[Table, "n d"], target: Float[Table, " queries"]) -> CellTracker:
        return CellTracker(self, X, target)


class CellTracker:
    """Tracks the counts of cells; see `Tracker`. Counts are whole numbers, so that nothing drifts.

    Args:
        statistic: what is counted.
        X: (n, d) the table to start from.
        target: (queries,) counts to come near to.
    """

    def __init__(self, statistic: CellCounts, X: Float[Table, "n d"], target: Float[Table, " queries"]) -> None:
        self.cells = statistic.cells
        # The last entry stands for "no cell", which index -1 finds; it never costs or gains.
        self.counts = np.append(statistic.counts(X), 0.0)
        self.target = np.append(target, 0.0)
        self.enter, self.leave = np.zeros((2, len(self.target)))
        self._refresh(np.arange(len(target)))

    def squared_error(self) -> float:
        return float(np.square(self.counts - self.target)[:-1].sum())

    def gains(
        self, removed: Float[Table, "edits rows d"], added: Float[Table, "edits rows d"]
    ) -> Float[Table, " edits"]:
        edits, rows, d = removed.shape
        # Rows first, so that those of all edits lie side by side.
        both = np.stack([removed, added]).swapaxes(1, 2).reshape(-1, d)
        old, new = self.cells(both).reshape(2, rows, -1)
        changed = old != new  # in few workloads, and only these matter
        workloads = old.shape[1] // edits
        gain = np.zeros(edits)
        for i in range(rows):
            at = changed[i].nonzero()[0]
            gain += np.bincount(at // workloads, self.enter[new[i, at]] + self.leave[old[i, at]], edits)
        for i, j in itertools.combinations(range(rows), 2):
            # Rows of one edit may share cells: twice the product of what they change there.
            at = (changed[i] & changed[j]).nonzero()[0]
            pairs = [(one[i, at], other[j, at]) for one in (new, old) for other in (new, old)]
            into, across, back, out = [(one == other) & (one >= 0) for one, other in pairs]
            shared = 2.0 * into + 2.0 * out - 2.0 * across - 2.0 * back
            gain += np.bincount(at // workloads, shared, edits)
        return gain

    def accept(self, removed: Float[Table, "rows d"], added: Float[Table, "rows d"]) -> None:
        old, new = self.cells(removed).ravel(), self.cells(added).ravel()
        np.subtract.at(self.counts, old, 1.0)
        np.add.at(self.counts, new, 1.0)
        changed = np.concatenate([old, new])
        self._refresh(changed[changed >= 0])

    def _refresh(self, where: Int[NDArray[np.int64], " some"]) -> None:
        """What a row that enters or leaves these cells adds to the squared error: (e +- 1)^2 - e^2."""
        twice = 2 * (self.counts[where] - self.target[where])
        self.enter[where], self.leave[where] = 1 + twice, 1 - twice


@dataclass(frozen=True)
class RowSums:
    """Sums of any numbers computed from a row.

    Attributes:
        values: from rows (n, d) to (n, queries) finite numbers.
        sizes: number of queries of each workload.
        sensitivities: the most that replacing one row changes each workload's sums by, in Euclidean norm.

    Example:
        >>> moments = RowSums(lambda X: np.concatenate([X, X**2], 1), sizes=(1, 1), sensitivities=(1.0, 1.0))
        >>> moments.counts(np.array([[0.5], [1.0]]))
        array([1.5 , 1.25])
    """

    values: Callable[[Float[Table, "n d"]], Float[Table, "n queries"]]
    sizes: tuple[int, ...]
    sensitivities: tuple[float, ...]

    def counts(self, X: Float[Table, "n d"]) -> Float[Table, " queries"]:
        total: Table = np.asarray(self.values(X), dtype=np.float64).sum(0)
        return total

    def track(self, X: Float[Table, "n d"], target: Float[Table, " queries"]) -> SumTracker:
        return SumTracker(self, X, target)


class SumTracker:
    """Tracks sums of numbers; see `Tracker`. A candidate costs a few operations for each query.

    Args:
        statistic: what is summed.
        X: (n, d) the table to start from.
        target: (queries,) sums to come near to.
    """

    def __init__(self, statistic: RowSums, X: Float[Table, "n d"], target: Float[Table, " queries"]) -> None:
        self.values = statistic.values
        self.error = statistic.counts(X) - target

    def squared_error(self) -> float:
        return float(self.error @ self.error)

    def gains(
        self, removed: Float[Table, "edits rows d"], added: Float[Table, "edits rows d"]
    ) -> Float[Table, " edits"]:
        edits, rows, d = removed.shape
        old, new = self.values(np.concatenate([removed, added]).reshape(-1, d)).reshape(2, edits, rows, -1)
        change = (new - old).sum(1)
        gain: Table = 2 * change @ self.error + np.square(change).sum(1)
        return gain

    def accept(self, removed: Float[Table, "rows d"], added: Float[Table, "rows d"]) -> None:
        self.error += (self.values(added) - self.values(removed)).sum(0)


def marginals(
    domain: Domain,
    k: int = 2,
    *,
    edges: Mapping[int, Sequence[float]] | None = None,
    depth: int = 3,
    columns: Sequence[Sequence[int]] | None = None,
) -> CellCounts:
    """All k-way marginals: how many rows have each combination of values in each choice of k columns.

    Real columns are cut at edges; a marginal with one is measured `depth` times, with every edge, every second, every
    fourth and so on, so that long ranges are not sums of many noisy numbers.

    Args:
        domain: of the columns.
        k: columns of a marginal, between 1 and the number of columns.
        edges: inner edges of real columns, by column, increasing; a value equal to an edge lies above it. Where there
            are none, fifteen evenly spaced ones.
        depth: levels of marginals with real columns, at least 1.
        columns: choices of columns, instead of all of k.

    Raises:
        ValueError: the domain is malformed, or an argument is out of its range.

    Example:
        >>> pairs = marginals([2, 3, (0.0, 1.0)], edges={2: [0.5]}, depth=1)
        >>> pairs.sizes
        (6, 4, 6)
        >>> pairs.cells(np.array([[1, 2, 0.7]]))
        array([[ 5,  9, 15]])
    """
    domain = read_domain(domain)
    k, depth = integer("k", k, 1, len(domain)), integer("depth", depth)
    if columns is not None:
        if not len(columns):
            raise ValueError("columns must be one choice of columns or more, got none")
        for place, group in enumerate(columns):
            for j in group:
                integer(f"columns[{place}]", j, 0, len(domain) - 1)
            if not len(group) or len(set(group)) < len(group):
                raise ValueError(f"columns[{place}] must be different columns, at least one, got {list(group)}")
    if not set(edges or {}) <= {j for j, column in enumerate(domain) if isinstance(column, tuple)}:
        raise ValueError(f"edges must be of real columns of the domain, got those of columns {sorted(edges or {})}")
    real = [j for j, column in enumerate(domain) if isinstance(column, tuple)]
    cuts = {j: _inner_edges(domain, j, (edges or {}).get(j)) for j in real}
    chosen = list(itertools.combinations(range(len(domain)), k)) if columns is None else list(map(tuple, columns))
    # One column of codes for every column of the table at every level that it is cut at.
    code_of: dict[tuple[int, int], int] = {}
    sizes_of_codes: list[int] = []
    for j, column in enumerate(domain):
        for level in range(depth if j in cuts else 1):
            code_of[j, level] = len(sizes_of_codes)
            sizes_of_codes.append(column if isinstance(column, int) else len(cuts[j][:: 2**level]) + 1)

    sizes, strides = [], []
    for group in chosen:
        for level in range(depth if any(j in cuts for j in group) else 1):
            stride, size = np.zeros(len(sizes_of_codes)), 1
            for j in reversed(group):
                code = code_of[j, level if j in cuts else 0]
                stride[code], size = size, size * sizes_of_codes[code]
            strides.append(stride)
            sizes.append(size)
    # A cell's number is linear in the codes; the product is exact, as all numbers are whole and far below 2^53.
    weights, offsets = np.stack(strides, 1), np.cumsum([0, *sizes[:-1]]).astype(np.float64)

    def cells(X: Float[Table, "n d"]) -> Int[NDArray[np.int64], "n workloads"]:
        if not cuts:
            codes = X
        else:
            codes = np.empty((len(X), len(sizes_of_codes)))
            for (j, level), place in code_of.items():
                codes[:, place] = np.searchsorted(cuts[j][:: 2**level], X[:, j], "right") if j in cuts else X[:, j]
        return (codes @ weights + offsets).astype(np.int64)

    return CellCounts(cells, tuple(sizes))


def prefixes(
    domain: Domain,
    columns: Int[ArrayLike, "queries c"],
    thresholds: Float[ArrayLike, "queries c"],
    *,
    within: Sequence[int] = (),
) -> CellCounts:
    """How many rows lie below thresholds in some real columns, for each value of a categorical column.

    A workload is one set of thresholds with one categorical column: the marginal of the rows below the thresholds.

    Args:
        domain: of the columns.
        columns: real columns of each query.
        thresholds: what values in these must not exceed, one for each of them.
        within: categorical columns; without any, rows are counted whatever their categories.

    Raises:
        TypeError: columns are no integers.
        ValueError: shapes differ, or a column is not of the wanted kind.

    Example:
        >>> young = prefixes([2, (0.0, 100.0)], columns=[[1]], thresholds=[[30.0]], within=[0])
        >>> young.counts(np.array([[0, 20.0], [1, 25.0], [1, 26.0], [1, 50.0]]))
        array([1., 2.])
    """
    domain = read_domain(domain)
    where, below = np.asarray(columns), np.asarray(thresholds, dtype=np.float64)
    if where.ndim != 2 or where.shape != below.shape or not where.size:
        raise ValueError(f"thresholds must be of shape (queries, c) as columns, {where.shape}, got {below.shape}")
    if not np.isfinite(below).all():
        raise ValueError("thresholds must be finite, got NaN or infinity")
    if where.dtype.kind not in "iu":
        raise TypeError(f"columns must be integers, got {where.dtype}")
    if any(not (0 <= j < len(domain) and isinstance(domain[j], tuple)) for j in where.flat):
        raise ValueError(f"columns must be real columns of the domain, got {sorted(set(where.flat))}")

    def holds(X: Float[Table, "n d"]) -> Bool[NDArray[np.bool_], "n queries"]:
        return np.asarray((X[:, where] <= below).all(2))

    return _where(domain, holds, len(where), within)


def halfspaces(
    domain: Domain,
    directions: Float[ArrayLike, "queries real"],
    offsets: Float[ArrayLike, " queries"],
    *,
    within: Sequence[int] = (),
) -> CellCounts:
    """How many rows lie in halfspaces of the real columns, for each value of a categorical column.

    With z the real columns, scaled by the domain to between 0 and 1: rows with `directions[q] @ z > offsets[q]`.

    Args:
        domain: of the columns.
        directions: a normal for each query, over the domain's real columns in their order.
        offsets: of the halfspaces.
        within: categorical columns; without any, rows are counted whatever their categories.

    Raises:
        ValueError: shapes do not fit the domain's real columns, or a column of `within` is not categorical.

    Example:
        >>> upper = halfspaces([(0.0, 10.0), (0.0, 1.0)], directions=[[1.0, 1.0]], offsets=[1.0])
        >>> upper.counts(np.array([[2.0, 0.5], [8.0, 0.5]]))
        array([1.])
    """
    domain = read_domain(domain)
    normal, offset = np.asarray(directions, dtype=np.float64), np.asarray(offsets, dtype=np.float64)
    real = [j for j, column in enumerate(domain) if isinstance(column, tuple)]
    if normal.ndim != 2 or normal.shape[1] != len(real) or not normal.size:
        raise ValueError(f"directions must be of shape (queries, {len(real)}), got shape {normal.shape}")
    if offset.shape != normal.shape[:1]:
        raise ValueError(f"offsets must be of shape ({len(normal)},), got shape {offset.shape}")
    for name, array in (("directions", normal), ("offsets", offset)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    low, high = real_bounds(domain)

    def holds(X: Float[Table, "n d"]) -> Bool[NDArray[np.bool_], "n queries"]:
        return ((X[:, real] - low) / (high - low)) @ normal.T > offset

    return _where(domain, holds, len(normal), within)


def _where(
    domain: Domain,
    holds: Callable[[Table], Bool[NDArray[np.bool_], "n queries"]],
    num: int,
    within: Sequence[int],
) -> CellCounts:
    """The marginals of categorical columns over the rows for which each of some conditions holds."""
    sizes = []
    for j in within:
        if isinstance(j, bool) or not isinstance(j, int | np.integer):
            raise TypeError(f"within must be integers, got {j!r}")
        size = domain[j] if 0 <= j < len(domain) else None
        if not isinstance(size, int):
            raise ValueError(f"within must be categorical columns of the domain, got {j}")
        sizes.append(size)
    per_column = np.repeat(sizes or [1], num)
    offsets = (np.cumsum(per_column) - per_column).reshape(-1, num)

    def cells(X: Float[Table, "n d"]) -> Int[NDArray[np.int64], "n workloads"]:
        codes = X[:, list(within)].astype(np.int64)[:, :, None] if sizes else 0
        return np.where(holds(X)[:, None], codes + offsets, -1).reshape(len(X), -1)

    return CellCounts(cells, tuple(per_column.tolist()))


def _inner_edges(domain: Domain, j: int, given: Sequence[float] | None) -> Float[Table, " edges"]:
    column = domain[j]
    low, high = column if isinstance(column, tuple) else (0.0, 1.0)
    edges = np.linspace(low, high, 17)[1:-1] if given is None else np.asarray(given, dtype=np.float64)
    if edges.ndim != 1 or not len(edges) or not (np.diff(edges) > 0).all() or edges[0] <= low or edges[-1] >= high:
        raise ValueError(f"edges[{j}] must be increasing and strictly between {low} and {high}, got {edges}")
    return edges
