"""How a claim is judged: paired differences over seeds, with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from trimtab.studies.study import Claim

Word = Literal["holds", "partly", "fails", "not shown"]


@dataclass(frozen=True)
class Verdict:
    """What was found about a claim.

    Attributes:
        claim: the claim.
        word: "holds" (the whole interval is at or beyond the margin), "partly" (beyond zero, not surely beyond the
            margin), "fails" (short of the margin, and not beyond zero) or "not shown" (too wide to tell). A bound
            (`at_least`, `at_most`) is claimed of every run: it holds if all keep it, and fails if none does.
        effect: mean over seeds of the paired difference (of the ratio, where the claim is about one; of the value
            itself, where it is about a bound), positive in the claimed direction.
        interval: 95 % interval of the effect.
        seeds: number of pairs.
        reason: why nothing is shown; empty otherwise.
    """

    claim: Claim
    word: Word
    effect: float | None
    interval: tuple[float, float] | None
    seeds: int
    reason: str = ""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t-interval; an infinite one for a single value.

    Example:
        >>> interval([1.0, 1.0, 1.0])
        (1.0, 1.0, 1.0)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return mean, -math.inf, math.inf
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    half = float(stats.t.ppf(0.975, count - 1)) * spread
    return mean, mean - half, mean + half


def judge(claim: Claim, values: Mapping[str, Sequence[float]]) -> Verdict:
    """The verdict on a claim.

    Args:
        claim: what is claimed.
        values: for each arm of the claim, the metric `claim.on` of each seed, in the same order.
    """
    mine = values[claim.arm]
    others = values[claim.other] if claim.other else None
    count = len(mine)
    if not all(math.isfinite(value) for value in [*mine, *(others or [])]):
        return Verdict(claim, "not shown", None, None, count, "a run diverged or has no such number")
    if others is None:
        least, most = claim.at_least, claim.at_most
        kept = [value >= least if least is not None else value <= (most or 0.0) for value in mine]
        mean, low, high = interval(mine)
        bounded: Word = "holds" if all(kept) else "partly" if any(kept) else "fails"
        return Verdict(claim, bounded, mean, (low, high) if count > 1 else None, count)
    sign = 1.0 if claim.beats else -1.0
    if claim.times is not None:
        if min(*mine, *others) <= 0:
            return Verdict(claim, "not shown", None, None, count, "a ratio needs positive numbers")
        logs = [sign * math.log(a / b) for a, b in zip(mine, others, strict=True)]
        mean, low, high = (_exp(value) for value in interval(logs))
        margin, floor = claim.times, 1.0
    else:
        mean, low, high = interval([sign * (a - b) for a, b in zip(mine, others, strict=True)])
        margin, floor = claim.by, 0.0
    if low >= margin and (margin != floor or low > floor):
        word: Word = "holds"
    elif low > floor:
        word = "partly"
    elif high < margin or (margin == floor and high == floor):
        word = "fails"
    else:
        word = "not shown"
    if count == 1:
        # One pair has no interval: it can show that the code runs, never that a claim holds.
        return Verdict(claim, "not shown", mean, None, count, "one seed gives no interval")
    reason = f"the interval over {count} seeds is too wide to tell" if word == "not shown" else ""
    return Verdict(claim, word, mean, (low, high), count, reason)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def overall(words: Sequence[Word]) -> Word:
    """A study's verdict from those of its claims."""
    if all(word == "holds" for word in words):
        return "holds"
    if any(word in ("holds", "partly") for word in words):
        return "partly"
    return "fails" if "fails" in words else "not shown"
