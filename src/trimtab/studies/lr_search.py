"""The learning rate of a contestant, chosen on validation data from a grid that is as long for every arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def best_learning_rate(grid: Sequence[float], score: Callable[[float], float]) -> float:
    """The rate with the highest score, the smaller one of equals; a score that is not a number loses.

    Args:
        grid: rates to try.
        score: trains with a rate and returns, say, the validation accuracy.

    Raises:
        ValueError: the grid is empty or holds a rate that is not positive.

    Example:
        >>> best_learning_rate([1.0, 0.1, 0.01], {1.0: float("nan"), 0.1: 0.9, 0.01: 0.9}.get)
        0.01
    """
    if not grid or not all(0 < rate < math.inf for rate in grid):
        raise ValueError(f"grid: {list(grid)}; it must hold positive rates, and at least one")
    scores = {rate: score(rate) for rate in sorted(grid)}
    return max(scores, key=lambda rate: -math.inf if math.isnan(scores[rate]) else scores[rate])
