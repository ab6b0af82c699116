"""Bounds of inputs: two finite numbers in order, of Python's or NumPy's, and nothing else."""

import math

import numpy as np
import pytest

from trimtab.robust.bounds import in_order


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0, 255), [-1, 1], (np.float32(0), np.int64(1))])
def test_two_numbers_in_order_are_bounds(bounds) -> None:
    assert in_order(bounds)


@pytest.mark.parametrize(
    "bounds",
    [(1.0, 0.0), (0.5, 0.5), (0.0,), (0.0, 0.5, 1.0), (0.0, math.nan), (-math.inf, 1.0), ("a", "b"), 1.0, None, "01"],
)
def test_everything_else_is_not(bounds) -> None:
    assert not in_order(bounds)
