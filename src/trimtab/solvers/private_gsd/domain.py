"""What the columns of a table are, and the reading of tables.

A domain has an entry for each column: the number of categories, whose codes are 0, 1, ..., or bounds (low, high) of a
column of real numbers. It is public: nothing about it is private.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from trimtab.ops.arguments import integer, number

Table = NDArray[np.float64]
Domain = Sequence[int | tuple[float, float]]


def read_domain(domain: Sequence[Any]) -> tuple[int | tuple[float, float], ...]:
    """The domain in Python's own integers and pairs, from NumPy's integers and from lists, too.

    Raises:
        TypeError: an entry is neither a whole number nor a pair of numbers.
        ValueError: the domain has no column, or an entry is out of range; names the column.

    Example:
        >>> read_domain([np.int64(3), [0, 1.5]])
        (3, (0.0, 1.5))
    """
    if isinstance(domain, str | bytes) or not len(domain):
        raise ValueError(f"domain must be of at least one column, got {domain!r}")
    return tuple(_read_column(f"domain[{j}]", column) for j, column in enumerate(domain))


def _read_column(name: str, column: Any) -> int | tuple[float, float]:
    if not isinstance(column, tuple | list | np.ndarray):
        return integer(name, column)
    if len(column) != 2:
        raise ValueError(f"{name} must be a number of categories or bounds low < high, got {len(column)} numbers")
    low, high = (number(f"{name}[{place}]", bound) for place, bound in enumerate(column))
    if not low < high:
        raise ValueError(f"{name} must be bounds low < high, got {low:g} and {high:g}")
    return low, high


def read_table(X: ArrayLike, domain: Domain, name: str = "X") -> Float[Table, "n d"]:
    """The table as numbers, refused where a value is not of its column's domain.

    Raises:
        ValueError: the table is empty or of another width than the domain, or a value is out of its domain; names
            the column.
    """
    table = np.array(X, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(domain) or not len(table):
        wanted = f"a table of {len(domain)} columns and at least one row"
        raise ValueError(f"{name} must be {wanted}, got shape {table.shape}")
    for j, column in enumerate(domain):
        values = table[:, j]
        if isinstance(column, tuple):
            good = (values >= column[0]) & (values <= column[1])
        else:
            good = (values >= 0) & (values < column) & (values == np.floor(values))
        if not good.all():
            wanted = f"between {column[0]} and {column[1]}" if isinstance(column, tuple) else f"codes below {column}"
            raise ValueError(f"{name}[:, {j}] must be {wanted}, got {values[~good][0]}")
    return table


def real_bounds(domain: Domain) -> tuple[Float[Table, " real"], Float[Table, " real"]]:
    """Lower and upper bounds of the real columns, in their order."""
    low, high = np.array([column for column in domain if isinstance(column, tuple)]).reshape(-1, 2).T
    return low, high
