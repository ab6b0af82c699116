"""Rows of a table as tokens, one a column, and some that belong to none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import floating_tensor, indices, integer, tensor_problem


class TabularTokenizer(nn.Module):
    """A token for each column of a row: a number times a learned vector, or a learned vector for each category.

    Args:
        num_numerical: columns of numbers; standardise them.
        cardinalities: for each column of categories, how many there are.
        dim: width of a token.
        num_extra: learned tokens that belong to no column, in front.

    Raises:
        ValueError: a number is too small, or there are no columns.

    Example:
        >>> TabularTokenizer(2, [3], 8)(torch.zeros(5, 2), torch.tensor([[0], [1], [2], [0], [1]])).shape
        torch.Size([5, 4, 8])
    """

    offsets: Tensor

    def __init__(self, num_numerical: int, cardinalities: Sequence[int], dim: int, num_extra: int = 1) -> None:
        super().__init__()
        self.num_numerical = integer("num_numerical", num_numerical, 0)
        self.cardinalities = tuple(integer("cardinalities", count) for count in cardinalities)
        self.num_features = num_numerical + len(self.cardinalities)
        self.num_extra = integer("num_extra", num_extra, 0)
        if self.num_features == 0:
            raise ValueError("num_numerical and cardinalities must make at least one column, got none")
        bound = integer("dim", dim) ** -0.5
        self.extra = nn.Parameter(torch.empty(num_extra, dim).uniform_(-bound, bound))
        self.weight = nn.Parameter(torch.empty(num_numerical, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(self.num_features, dim).uniform_(-bound, bound))
        self.categories = nn.Parameter(torch.empty(sum(self.cardinalities), dim).uniform_(-bound, bound))
        starts = torch.tensor([0, *itertools.accumulate(self.cardinalities)][:-1], dtype=torch.int64)
        self.register_buffer("offsets", starts, persistent=False)

    def check(self, x_num: Tensor | None, x_cat: Tensor | None) -> int:
        """The number of rows, once they are known to suit the columns.

        Raises:
            TypeError: `x_num` is not floating point or `x_cat` not int64.
            ValueError: a part is missing or has other columns, there is no row, or a category is out of range.
        """
        if problem := tensor_problem(x_num=x_num, x_cat=x_cat):
            raise TypeError(problem)
        rows = set()
        for name, part, width in (("x_num", x_num, self.num_numerical), ("x_cat", x_cat, len(self.cardinalities))):
            if part is None:
                if width:
                    raise ValueError(f"{name} must be of shape (batch, {width}), got None")
                continue
            if part.ndim != 2 or part.shape[1] != width or len(part) == 0:
                raise ValueError(
                    f"{name} must be of shape (batch, {width}) with at least one row, got {tuple(part.shape)}"
                )
            rows.add(len(part))
        if len(rows) != 1:
            raise ValueError(f"x_num and x_cat must have as many rows, got {sorted(rows)}")
        if x_num is not None:
            floating_tensor("x_num", x_num)
        if x_cat is not None and self.cardinalities:
            if x_cat.dtype != torch.int64:
                raise TypeError(f"x_cat must be int64 (codes of categories), got {x_cat.dtype}")
            for column, count in enumerate(self.cardinalities):
                indices(f"x_cat[:, {column}]", x_cat[:, column], count)
        return rows.pop()

    def forward(
        self, x_num: Float[Tensor, "batch numbers"] | None, x_cat: Int[Tensor, "batch codes"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens: those of no column, then those of the numbers, then those of the categories.

        Raises:
            TypeError, ValueError: as `check`.
        """
        batch = self.check(x_num, x_cat)
        parts = []
        if x_num is not None:
            parts.append(x_num.to(self.weight)[:, :, None] * self.weight)
        if x_cat is not None and self.cardinalities:
            parts.append(self.categories[x_cat + self.offsets])
        return torch.cat([self.extra.expand(batch, -1, -1), torch.cat(parts, 1) + self.bias], 1)
