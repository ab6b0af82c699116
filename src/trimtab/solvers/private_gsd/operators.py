"""The edits of rows that the genetic search tries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from trimtab.solvers.private_gsd.domain import Domain, Table

Operator = Literal["mutate", "continuous", "swap", "crossover"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
RowIndex = NDArray[np.int64]
# From a table and a generator to the rows to edit (population, r), and what they become (population, r, d).
Propose = Callable[[Table, np.random.Generator], tuple[RowIndex, Table]]

_QUANTILES = 32


def random_rows(domain: Domain, n: int, generator: np.random.Generator) -> Float[Table, "n d"]:
    """Rows with independent, uniformly distributed columns."""
    return np.stack([_uniform(column, n, generator) for column in domain], 1)


def mutate(
    X: Float[Table, "n d"], rows: Int[RowIndex, " p"], column: int, values: Float[Table, " p"]
) -> Float[Table, "p 1 d"]:
    """Each row with a value put into the column.

    Example:
        >>> mutate(np.zeros((3, 2)), np.array([0, 2]), 1, np.array([5.0, 7.0]))[:, 0]
        array([[0., 5.], [0., 7.]])
    """
    added = X[rows]
    added[:, column] = values
    return added[:, None]


def swap(X: Float[Table, "n d"], rows: Int[RowIndex, "p 2"], column: int) -> Float[Table, "p 2 d"]:
    """Pairs of rows with their values of the column exchanged.

    Example:
        >>> swap(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[0, 1]]), 0)[0]
        array([[2., 1.], [0., 3.]])
    """
    added = X[rows]
    added[:, :, column] = X[rows[:, ::-1], column]
    return added


def crossover(
    X: Float[Table, "n d"], rows: Int[RowIndex, " p"], donors: Int[RowIndex, " p"], columns: Int[RowIndex, "p c"]
) -> Float[Table, "p 1 d"]:
    """Each row with some columns copied from its donor.

    Example:
        >>> crossover(np.arange(6.0).reshape(2, 3), np.array([0]), np.array([1]), np.array([[1]]))[0]
        array([[0., 4., 2.]])
    """
    added = X[rows]
    added[np.arange(len(rows))[:, None], columns] = X[donors[:, None], columns]
    return added[:, None]


def between_quantiles(
    values: Float[Table, " n"], low: float, high: float, draws: Float[Table, "2 p"]
) -> Float[Table, " p"]:
    """Numbers between neighbours among 32 quantiles of the values and the bounds of their domain.

    Args:
        values: of the column as it is.
        low: bound of the domain.
        high: bound of the domain.
        draws: between 0 and 1, which two neighbours, and where between them.

    Example:
        >>> between_quantiles(np.array([0.25, 0.5]), 0.0, 1.0, np.array([[0.0, 0.99], [0.5, 0.5]]))
        array([0.125, 0.75 ])
    """
    ranks = np.linspace(0, len(values) - 1, _QUANTILES).round().astype(np.int64)
    edges = np.concatenate([[low], np.sort(values)[ranks], [high]])
    below = (draws[0] * (len(edges) - 1)).astype(np.int64)
    here: Table = edges[below] + draws[1] * (edges[below + 1] - edges[below])
    return here


def proposals_of(domain: Domain, operators: Sequence[Operator], population: int) -> dict[str, Propose]:
    """What each operator proposes; those that share a turn of columns each keep their own."""
    if not operators or set(operators) - set(OPERATORS):
        raise ValueError(f"operators must be some of {', '.join(OPERATORS)}, got {tuple(operators)}")
    d = len(domain)
    real = {j: column for j, column in enumerate(domain) if isinstance(column, tuple)}
    categorical = np.array([j for j in range(d) if j not in real], dtype=np.int64)

    def rows_of(X: Table, rng: np.random.Generator) -> RowIndex:
        return rng.integers(len(X), size=population)

    turns = [math.ceil(math.log2(column if isinstance(column, int) else _QUANTILES)) for column in domain]
    mutated = itertools.cycle([j for turn in range(max(turns) or 1) for j in range(d) if turn < max(turns[j], 1)])
    redrawn, swapped = itertools.cycle(real), itertools.cycle(range(d))

    def propose_mutate(X: Table, rng: np.random.Generator) -> tuple[RowIndex, Table]:
        rows, column = rows_of(X, rng), next(mutated)
        return rows[:, None], mutate(X, rows, column, _uniform(domain[column], population, rng))

    def propose_continuous(X: Table, rng: np.random.Generator) -> tuple[RowIndex, Table]:
        rows, column = rows_of(X, rng), next(redrawn)
        values = between_quantiles(X[:, column], *real[column], rng.random((2, population)))
        return rows[:, None], mutate(X, rows, column, values)

    def propose_swap(X: Table, rng: np.random.Generator) -> tuple[RowIndex, Table]:
        rows = rng.integers(len(X), size=(population, 2))
        return rows, swap(X, rows, next(swapped))

    def propose_crossover(num: int) -> Propose:
        def propose(X: Table, rng: np.random.Generator) -> tuple[RowIndex, Table]:
            rows, donors = rows_of(X, rng), rows_of(X, rng)
            columns = categorical[rng.integers(len(categorical), size=(population, num))]
            return rows[:, None], crossover(X, rows, donors, columns)

        return propose

    found: dict[str, Propose] = {}
    if "mutate" in operators:
        found["mutate"] = propose_mutate
    if "continuous" in operators and real:
        found["continuous"] = propose_continuous
    if "swap" in operators:
        found["swap"] = propose_swap
    if "crossover" in operators and len(categorical):
        found["crossover"] = propose_crossover(1)
        if len(categorical) > 1:
            found["crossover of two"] = propose_crossover(2)
    if not found:
        raise ValueError(f"operators must be some that suit the domain's columns, got {tuple(operators)}")
    return found


def _uniform(column: int | tuple[float, float], n: int, generator: np.random.Generator) -> Float[Table, " n"]:
    if isinstance(column, tuple):
        return generator.uniform(*column, size=n)
    return generator.integers(column, size=n).astype(np.float64)
