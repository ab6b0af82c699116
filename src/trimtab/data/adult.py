"""The Adult census table: 48,842 people of the United States in 1994, and who earned more than 50,000 dollars."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.data.files import DataCorruptError, content, require

_FILES = {
    "train.csv": "3b8a6abd697a6623ef2ccbffc3e2802e167e7fdaa853003d3bd557b0ce7f5d2a",
    "test.csv": "eb6e9f02496bed4137b1a069b8af64b90eb534ba46143948667034dddef9abd9",
}
_HINT = "the UCI Adult set as comma-separated values with a header line, missing values as ?"
# The bounds of the columns of numbers, as published with the set.
_BOUNDS: dict[str, tuple[float, float]] = {
    "age": (17.0, 90.0),
    "fnlwgt": (12285.0, 1490400.0),
    "education_num": (1.0, 16.0),
    "capital_gain": (0.0, 99999.0),
    "capital_loss": (0.0, 4356.0),
    "hours_per_week": (1.0, 99.0),
}


@dataclass(frozen=True)
class TableData:
    """A table with columns of numbers and of categories, with its own train and test part.

    Attributes:
        train, test: float64, one row a record; categories as codes, positions in `categories`.
        columns: names.
        domain: for each column, its number of categories or the bounds (low, high) of its numbers.
        categories: for each column, what its codes stand for; empty for numbers.
        source: where the table came from, for the record.
    """

    train: Float[Tensor, "train columns"]
    test: Float[Tensor, "test columns"]
    columns: tuple[str, ...]
    domain: tuple[int | tuple[float, float], ...]
    categories: tuple[tuple[str, ...], ...]
    source: str = ""

    def select(self, columns: Sequence[str]) -> TableData:
        """The table of these columns, in this order.

        Raises:
            ValueError: a name is unknown.
        """
        if unknown := sorted(set(columns) - set(self.columns)):
            raise ValueError(f"columns must be among {', '.join(self.columns)}, got {', '.join(unknown)}")
        at = [self.columns.index(name) for name in columns]
        return TableData(
            self.train[:, at],
            self.test[:, at],
            tuple(columns),
            tuple(self.domain[j] for j in at),
            tuple(self.categories[j] for j in at),
            self.source,
        )


@cache
def adult() -> TableData:
    """The Adult census income table: 32,561 and 16,281 people, 6 columns of numbers and 9 of categories.

    Barry Becker and Ronny Kohavi, "Adult", UCI Machine Learning Repository, 1996. Codes of a column are positions in
    the sorted list of its values; "?" is one of them, for what is not known.

    Raises:
        DataNotFoundError: a file is missing; says which file goes where.
        DataCorruptError: a file is truncated or altered.
    """
    paths = [require("adult", file, sha, hint=_HINT) for file, sha in _FILES.items()]
    train, test = (list(csv.reader(content(path).decode().splitlines())) for path in paths)
    if train[0] != test[0]:
        raise DataCorruptError(f"{paths[0]} and {paths[1]} have different columns")
    columns, parts = tuple(train[0]), (train[1:], test[1:])
    domain: list[int | tuple[float, float]] = []
    categories: list[tuple[str, ...]] = []
    coded: tuple[list[list[float]], list[list[float]]] = ([], [])
    for j, name in enumerate(columns):
        values = () if name in _BOUNDS else tuple(sorted({row[j] for part in parts for row in part}))
        code = {value: float(number) for number, value in enumerate(values)}
        for into, part in zip(coded, parts, strict=True):
            into.append([code[row[j]] if values else float(row[j]) for row in part])
        domain.append(len(values) if values else _BOUNDS[name])
        categories.append(values)
    first, second = (torch.from_numpy(np.array(part).T.copy()) for part in coded)
    return TableData(first, second, columns, tuple(domain), tuple(categories), source=str(paths[0].parent))
