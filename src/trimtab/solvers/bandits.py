"""Finding the best of several noisy arms with a fixed number of pulls.

Algorithms are plain functions of `pull(arms, count)`, which returns `count` rewards of each arm as (arms, count). All
of them judge an arm by the mean of all its rewards so far.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import integer

Pull: TypeAlias = Callable[[Int[Tensor, " arms"], int], Float[Tensor, "arms count"]]

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class BanditResult:
    """The arm chosen.

    Attributes:
        arm: the choice.
        n_used: pulls made, never more than the budget.
        history: how many arms were left before each round.
    """

    arm: int
    n_used: int
    history: tuple[int, ...]


def unimodal_elimination(
    pull: Pull, n_arms: int, budget: int, *, generator: torch.Generator | None = None
) -> BanditResult:
    """Finds the peak of means that rise to it and fall after it, a third of the arms at a time.

    Each round pulls the ends of what is left and two arms that split it in thirds, equally often. If the best of the
    four is one of the two on the left, the peak cannot be right of the right inner arm, and if not, it cannot be left
    of the left one. Rounds get budgets that grow by 3/2, as arms become harder to tell apart; the last one is for the
    at most four arms that remain.

    Args:
        pull: rewards of arms.
        n_arms: number of arms, in the order in which their means have one peak.
        budget: most pulls, at least four for each round.
        generator: not used, as nothing is drawn.

    Raises:
        ValueError: the budget is too small.

    Example:
        >>> means = -(torch.arange(21.0) - 14).abs()
        >>> unimodal_elimination(lambda arms, count: means[arms, None].expand(-1, count), 21, budget=50)
        BanditResult(arm=14, n_used=48, history=(21, 15, 11, 8, 6, 5, 4))
    """
    n_arms, budget = integer("n_arms", n_arms), integer("budget", budget)
    widths = [n_arms - 1]
    while widths[-1] > 3:
        widths.append(widths[-1] - widths[-1] // 3)
    arms_each = [4] * (len(widths) - 1) + [widths[-1] + 1]
    counts = _shares(budget, arms_each, growth=1.5)
    tally, left, right = Tally(pull, n_arms), 0, n_arms - 1
    for count in counts[:-1]:
        third = (right - left) // 3
        probes = torch.tensor([left, left + third, right - third, right])
        if int(tally.pull(probes, count).argmax()) < 2:
            right -= third
        else:
            left += third
    last = torch.arange(left, right + 1)
    chosen = int(last[tally.pull(last, counts[-1]).argmax()])
    return BanditResult(chosen, tally.used, tuple(width + 1 for width in widths))


def line_search_elimination(
    pull: Pull, n_arms: int, budget: int, *, generator: torch.Generator | None = None
) -> BanditResult:
    """Finds the peak of unimodal means by golden sections with equal budgets, after Yu and Mannor (ICML 2011).

    Args:
        pull: rewards of arms.
        n_arms: number of arms, in the order in which their means have one peak.
        budget: most pulls, at least two for each round and three in the last.
        generator: not used, as nothing is drawn.

    Raises:
        ValueError: the budget is too small.
    """
    n_arms, budget = integer("n_arms", n_arms), integer("budget", budget)
    widths = [n_arms - 1]
    while widths[-1] > 2:
        widths.append(max(round(_GOLDEN * widths[-1]), widths[-1] // 2 + 1))  # so that the two arms differ
    counts = _shares(budget, [2] * (len(widths) - 1) + [widths[-1] + 1], growth=1.0)
    tally, left, right = Tally(pull, n_arms), 0, n_arms - 1
    for width, count in zip(widths[1:], counts[:-1], strict=True):
        first, second = tally.pull(torch.tensor([right - width, left + width]), count).tolist()
        if first >= second:
            right = left + width
        else:
            left = right - width
    last = torch.arange(left, right + 1)
    chosen = int(last[tally.pull(last, counts[-1]).argmax()])
    return BanditResult(chosen, tally.used, tuple(width + 1 for width in widths))


def sequential_halving(
    pull: Pull, n_arms: int, budget: int, *, generator: torch.Generator | None = None
) -> BanditResult:
    """Pulls all arms that are left equally often and drops the worse half, after Karnin, Koren and Somekh (ICML 2013).

    Args:
        pull: rewards of arms.
        n_arms: number of arms.
        budget: most pulls. Where it does not allow a pull of each arm in every round, only some arms, drawn at random,
            take part.
        generator: of that draw.

    Raises:
        ValueError: the budget is not positive.
    """
    n_arms, budget = integer("n_arms", n_arms), integer("budget", budget)
    size = n_arms
    while size > 1 and size * _halvings(size) > budget:
        size -= 1
    arms, tally = _drawn(n_arms, size, generator), Tally(pull, n_arms)
    history = [size]
    for rounds_left in range(_halvings(size), 0, -1):
        means = tally.pull(arms, (budget - tally.used) // (len(arms) * rounds_left))
        arms = arms[means.argsort(descending=True, stable=True)[: math.ceil(len(arms) / 2)]]
        history.append(len(arms))
    return BanditResult(int(arms[0]), tally.used, tuple(history))


def successive_rejects(
    pull: Pull, n_arms: int, budget: int, *, generator: torch.Generator | None = None
) -> BanditResult:
    """Drops the worst arm after each of `n_arms - 1` phases, after Audibert, Bubeck and Munos (COLT 2010).

    Args:
        pull: rewards of arms.
        n_arms: number of arms.
        budget: most pulls. Where there are fewer than two for an arm, only half as many arms as pulls, drawn at random,
            take part.
        generator: of that draw.

    Raises:
        ValueError: the budget is not positive.
    """
    n_arms, budget = integer("n_arms", n_arms), integer("budget", budget)
    size = max(1, min(n_arms, budget // 2))
    arms, tally = _drawn(n_arms, size, generator), Tally(pull, n_arms)
    norm = 0.5 + sum(1 / i for i in range(2, size + 1))
    ends = [0, *(math.ceil((budget - size) / (norm * (size + 1 - phase))) for phase in range(1, size))]
    for before, after in itertools.pairwise(ends):
        means = tally.pull(arms, after - before)
        arms = torch.cat([arms[: (worst := int(means.argmin()))], arms[worst + 1 :]])
    return BanditResult(int(arms[0]), tally.used, tuple(range(size, 0, -1)))


class Tally:
    """Means of all rewards so far, arm by arm, and how many pulls they took."""

    def __init__(self, pull: Pull, n_arms: int) -> None:
        self._pull = pull
        self._sums = torch.zeros(n_arms, dtype=torch.float64)
        self._counts = torch.zeros(n_arms, dtype=torch.long)
        self.used = 0

    def pull(self, arms: Int[Tensor, " arms"], count: int) -> Float[Tensor, " arms"]:
        """Pulls each arm `count` times more, those given twice too; the means of what each has given in all.

        Raises:
            TypeError: `pull` returned no real tensor.
            ValueError: `pull` returned the wrong number of rewards, or one that is not finite.
        """
        if count:
            rewards = self._pull(arms, count)
            if not isinstance(rewards, Tensor) or rewards.is_complex():
                raise TypeError(f"pull must return a real tensor, got {type(rewards).__name__}")
            if rewards.shape != (len(arms), count):
                raise ValueError(f"pull must return shape {(len(arms), count)}, got shape {tuple(rewards.shape)}")
            if not bool(torch.isfinite(rewards).all()):
                raise ValueError("pull must return finite rewards, got NaN or infinity")
            self._sums.index_add_(0, arms, rewards.sum(1).to(self._sums))
            self._counts.index_add_(0, arms, torch.full_like(arms, count))
            self.used += count * len(arms)
        return self._sums[arms] / self._counts[arms]


def _shares(budget: int, arms: list[int], growth: float) -> list[int]:
    """Pulls of each arm in rounds with so many arms: one, and the rest of the budget in shares that grow."""
    left = budget - sum(arms)
    if left < 0:
        raise ValueError(f"budget must be at least {sum(arms)} for this number of arms, got {budget}")
    parts, counts = [growth**i for i in range(len(arms))], []
    for i, number in enumerate(arms):
        more = int(left * parts[i] / sum(parts[i:]) / number)
        left -= more * number
        counts.append(1 + more)
    return counts


def _halvings(size: int) -> int:
    return math.ceil(math.log2(size))


def _drawn(n_arms: int, size: int, generator: torch.Generator | None) -> Int[Tensor, " size"]:
    return torch.arange(n_arms) if size == n_arms else torch.randperm(n_arms, generator=generator)[:size]
