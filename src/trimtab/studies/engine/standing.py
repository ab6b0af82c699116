"""Where contestants stand on shared work: computed from paired differences, never written by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trimtab.studies.engine.verdict import interval

Values = Mapping[str, Sequence[float]]
"""Contestant -> its number on each seed, in the same order of seeds."""


@dataclass(frozen=True)
class Standing:
    """Where one contestant stands on one variant of a task.

    Attributes:
        rank: 1 for the best mean.
        ahead: those it is surely ahead of (the whole 95 % interval of the paired difference is on its side).
        behind: those that are surely ahead of it.
        level: the others.
    """

    rank: int
    ahead: tuple[str, ...]
    behind: tuple[str, ...]
    level: tuple[str, ...]


def standings(values: Values, best: Literal["max", "min"]) -> dict[str, Standing]:
    """Everybody against everybody else; the best first. A number that is not finite is behind every one that is.

    Example:
        >>> found = standings({"A": [0.90, 0.91, 0.92], "B": [0.80, 0.82, 0.81], "C": [0.70, 0.90, 0.95]}, "max")
        >>> found["A"].ahead, found["A"].level
        (('B',), ('C',))
    """
    means = {name: _mean(v, best) for name, v in values.items()}
    order = sorted(values, key=lambda name: -means[name])
    found = {}
    for name in order:
        compared = {other: _compare(values[name], values[other], best) for other in order if other != name}
        found[name] = Standing(
            1 + sum(mean > means[name] for mean in means.values()),
            tuple(other for other, side in compared.items() if side > 0),
            tuple(other for other, side in compared.items() if side < 0),
            tuple(other for other, side in compared.items() if side == 0),
        )
    return found


def _mean(values: Sequence[float], best: str) -> float:
    if not all(map(math.isfinite, values)):
        return -math.inf
    mean = math.fsum(values) / len(values)
    return mean if best == "max" else -mean


def _compare(mine: Sequence[float], others: Sequence[float], best: str) -> int:
    """1 where the first is surely better, -1 where it is surely worse, 0 where that is open."""
    finite = all(map(math.isfinite, mine)), all(map(math.isfinite, others))
    if not all(finite):
        return finite[0] - finite[1]
    sign = 1 if best == "max" else -1
    _, low, high = interval([sign * (a - b) for a, b in zip(mine, others, strict=True)])
    return 1 if low > 0 else -1 if high < 0 else 0


@dataclass(frozen=True)
class Overall:
    """How a contestant does over several variants of a task.

    Attributes:
        rank: mean rank over variants and seeds, among those that entered all of the variants.
        low, high: its 95 % interval over variants.
        wins: share of the pairwise comparisons, over variants, seeds and others, that it wins; a tie is half.
    """

    rank: float
    low: float
    high: float
    wins: float


def overall(boards: Sequence[Values], best: Literal["max", "min"]) -> dict[str, Overall]:
    """Over the variants of a task, those contestants that entered all of them; the best mean rank first."""
    if not boards:
        return {}
    names = [name for name in boards[0] if all(name in board for board in boards)]
    sign = 1 if best == "max" else -1
    ranks: dict[str, list[float]] = {name: [] for name in names}
    wins: dict[str, list[float]] = {name: [] for name in names}
    for board in boards:
        seeds = min(len(board[name]) for name in names)
        scores = [
            {n: sign * board[n][s] if math.isfinite(board[n][s]) else -math.inf for n in names} for s in range(seeds)
        ]
        for name in names:
            won = [_won(score, name) for score in scores]
            wins[name].append(math.fsum(won) / len(won))
            # A rank is one more than those that are better, where a tie counts half.
            ranks[name].append(1 + (1 - wins[name][-1]) * (len(names) - 1))
    found = {}
    for name in names:
        mean, low, high = interval(ranks[name])
        found[name] = Overall(mean, low, high, math.fsum(wins[name]) / len(boards))
    return dict(sorted(found.items(), key=lambda item: item[1].rank))


def _won(score: Mapping[str, float], name: str) -> float:
    others = [value for other, value in score.items() if other != name]
    if not others:
        return 1.0
    return sum(1.0 if score[name] > v else 0.5 if score[name] == v else 0.0 for v in others) / len(others)
