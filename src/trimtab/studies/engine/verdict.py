"""How a claim is judged: paired differences over seeds, with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtrit

from trimtab.studies.engine.study import Claim

Word = Literal["holds", "fails", "not shown"]


@dataclass(frozen=True)
class Verdict:
    """What was found about a claim.

    Attributes:
        claim: the claim.
        word: "holds" (the whole interval is at or beyond the margin), "fails" (the whole interval is short of it) or
            "not shown" (undecided).
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
    half = float(stdtrit(count - 1, 0.975)) * spread
    return mean, mean - half, mean + half


def judge(claim: Claim, values: Mapping[str, Sequence[float]]) -> Verdict:
    """The verdict on a claim.

    Args:
        claim: what is claimed.
        values: for each contestant of the claim, the metric `claim.on` of each seed, in the same order.
    """
    mine = values[claim.arm]
    others = values[claim.other] if claim.other else None
    count = len(mine)
    if not all(math.isfinite(value) for value in [*mine, *(others or [])]):
        return Verdict(claim, "not shown", None, None, count, "a run diverged or has no such number")
    if others is None:
        mean, low, high = interval(mine)
        least, most = claim.at_least, claim.at_most
        ahead, short = (low >= least, high < least) if least is not None else (high <= (most or 0), low > (most or 0))
    elif claim.times is not None:
        if min(*mine, *others) <= 0:
            return Verdict(claim, "not shown", None, None, count, "a ratio needs positive numbers")
        sign = 1.0 if claim.beats else -1.0
        logs = interval([sign * math.log(a / b) for a, b in zip(mine, others, strict=True)])
        mean, low, high = (math.exp(max(-700.0, min(value, 700.0))) for value in logs)
        ahead, short = low >= claim.times, high < claim.times
    else:
        sign = 1.0 if claim.beats else -1.0
        mean, low, high = interval([sign * (a - b) for a, b in zip(mine, others, strict=True)])
        # Without a margin the claim is of a difference, so that equals do not keep it.
        ahead = low >= claim.by and (claim.by != 0 or low > 0)
        short = high < claim.by or (claim.by == 0 and low == high == 0)
    if count == 1:
        # One pair has no interval: it can show that the code runs, never that a claim holds.
        return Verdict(claim, "not shown", mean, None, count, "one seed gives no interval")
    word: Word = "holds" if ahead else "fails" if short else "not shown"
    reason = f"the interval over {count} seeds is too wide to tell" if word == "not shown" else ""
    return Verdict(claim, word, mean, (low, high), count, reason)
