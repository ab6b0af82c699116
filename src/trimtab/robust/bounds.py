"""The smallest and the largest value that an input may take, of an attack or of a box."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def in_order(bounds: Any) -> bool:
    """Whether bounds are two finite numbers, the smaller one first.

    Example:
        >>> in_order((0.0, 1.0)), in_order((1.0, 0.0)), in_order((0.0, float("nan"))), in_order((0.0,))
        (True, False, False, False)
    """
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        return False
    return all(isinstance(end, float | Real) and math.isfinite(end) for end in bounds) and bool(bounds[0] < bounds[1])
