"""Words and numbers as people write them: a value, a metric's name and unit, and a claim as one sentence.

Everything here works on plain data, as result files hold it, and needs neither PyTorch nor NumPy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

Data = Mapping[str, Any]

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_UNIT = re.compile(
    r" \((%|dB|m?s|m?m|[kMG]B|bytes|degrees|deviations|points|thousands|millions|(?:bits|nats)(?: (?:per|an?) \w+)?)\)$"
)
_COUNTING = {"thousands": "thousand", "millions": "million"}


def number(value: float, digits: int = 3) -> str:
    """A number to some significant digits, as one would write it.

    Example:
        >>> [number(v) for v in (0.81234, 12345.6, 16_212_891.5, 0.000021, 0, 3.0)]
        ['0.812', '12,300', '16.2 million', '2.1 × 10⁻⁵', '0', '3']
    """
    if not math.isfinite(value):
        return "–"
    size, minus = abs(value), "−" * (value < 0)
    if size == 0:
        return "0"
    if size < 1e-4:
        mantissa, _, exponent = f"{size:.{digits - 1}e}".partition("e")
        times = "" if _trimmed(mantissa) == "1" else f"{_trimmed(mantissa)} × "
        return f"{minus}{times}10{_raised(exponent)}"
    for unit, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if size >= unit:
            return f"{minus}{_trimmed(_rounded(size / unit, digits))}{word}"
    return minus + _trimmed(_rounded(size, digits))


def _raised(exponent: str) -> str:
    return str(int(exponent)).translate(_RAISED)


def _rounded(size: float, digits: int) -> str:
    decimals = digits - 1 - math.floor(math.log10(size))
    return f"{round(size, decimals):,.{max(0, decimals)}f}"


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def amount(value: float, metric: Data) -> str:
    """A metric's value without its unit: per cents with one decimal where that says something."""
    if not math.isfinite(value):
        return "–"
    if metric["percent"]:
        # What rounding alone leaves of a difference is none.
        value = 0.0 if abs(value) < 1e-7 else 100 * value
        return f"{value:.1f}".replace("-", "−") if abs(value) >= 0.05 or value == 0 else number(value, 2)
    return number(value)


def together(value: float, ends: tuple[float, float] | None, metric: Data) -> tuple[str, tuple[str, str] | None]:
    """A value and the ends of its interval to the same place, which shows on which side of zero each end is.

    Example:
        >>> together(0.0214, (-0.00019, 0.043), {"percent": True})
        ('2.14', ('−0.02', '4.30'))
        >>> together(0.42, (0.19, 0.6554), {"percent": False})
        ('0.42', ('0.19', '0.66'))
        >>> together(1.0, (1.0, 1.0), {"percent": True})
        ('100', ('100', '100'))
    """
    if ends is None or not all(map(math.isfinite, ends)):
        return amount(value, metric), None if ends is None else (amount(ends[0], metric), amount(ends[1], metric))
    scale = 100 if metric["percent"] else 1
    # What rounding alone leaves of a difference is none.
    told = [0.0 if abs(one) < 1e-9 else scale * one for one in (value, *ends)] if scale == 100 else [value, *ends]
    largest, half = max(map(abs, told)), abs(told[2] - told[1]) / 2
    if half <= 1e-9 * largest:
        same = number(told[0])
        return same, (same, same)
    if not metric["percent"] and (largest < 1e-4 or largest >= 1e6):
        first, low, high = map(number, told)
        return first, (low, high)
    decimals = 1 if scale == 100 else min(1 - math.floor(math.log10(half)), 5 - math.floor(math.log10(largest)))
    while decimals < 4 and any(end and not round(end, decimals) for end in told[1:]):
        decimals += 1
    if decimals == 1 and told[0] and not round(told[0], 1):
        decimals = 2
    first, low, high = (fixed(one, decimals) for one in told)
    return first, (low, high)


def fixed(value: float, decimals: int) -> str:
    """A number with so many decimals; zero has no sign."""
    rounded = round(value, decimals)
    return f"{rounded or 0.0:,.{max(0, decimals)}f}".replace("-", "−")


def label(metric: Data) -> tuple[str, str]:
    """The words of a metric and its unit; brackets that hold something else are words.

    Example:
        >>> label({"label": "training time (s)"})
        ('training time', 's')
        >>> label({"label": "kurtosis of the weights (normal: 3)"})
        ('kurtosis of the weights (normal: 3)', '')
    """
    words = re.sub(r"\b1e(-?\d+)", lambda power: f"10{_raised(power[1])}", str(metric["label"]))
    found = _UNIT.search(words)
    return (words[: found.start()], found[1]) if found else (words, "")


def in_unit(text: str, metric: Data, *, difference: bool = False) -> str:
    """A number with the unit of a metric behind it; a difference of two per cents is told in points.

    Example:
        >>> in_unit("1", {"label": "loss (nats per token)", "percent": False})
        '1 nat per token'
        >>> in_unit("5", {"label": "accuracy (%)", "percent": True}, difference=True)
        '5 points'
    """
    unit = label(metric)[1]
    if metric["percent"] or unit == "%":
        unit = "points" if difference or unit == "points" else "%"
    unit = _COUNTING.get(unit, unit)
    if text.lstrip("+−") == "1":
        unit = re.sub(r"^(point|nat|bit|byte|degree|deviation)s", r"\1", unit)
    return f"{text} {unit}".strip()


# Where the noun that a metric's name is about ends.
_AFTER_THE_NOUN = re.compile(
    r",| (?:a|above|accepted|after|against|and|as|at|before|believed|below|between|beyond|by|changed|for|found|from|in"
    r"|into|is|left|lost|memorised|needed|of|on|over|per|run|saved|sent|taken|that|through|times|to|told|trained|under"
    r"|until|used|where|which|whose|with|within|without)\b"
)
_PLURAL = re.compile(r"(?<![siu'])s$")


def subject(metric: Data) -> tuple[str, bool]:
    """What a metric measures as a noun phrase without its article, and whether that is a plural.

    Things that are counted become their number, and in per cent their share.

    Example:
        >>> subject({"label": "wrong labels memorised (%)", "percent": True})
        ('share of wrong labels memorised', False)
        >>> subject({"label": "iterations until solved", "percent": False})
        ('number of iterations until solved', False)
    """
    words, unit = label(metric)
    noun = words[: found.start()] if (found := _AFTER_THE_NOUN.search(words)) else words
    if unit in ("s", "ms") and "time" not in words:
        return f"time of {words}", False
    if not _PLURAL.search(noun):
        return words, False
    if metric["percent"] or unit == "%":
        return f"share of {words}", False
    if not unit or unit in _COUNTING:
        return f"number of {words}", False
    return words, True


def closed(phrase: str) -> str:
    """A phrase with a comma behind what it says after a comma.

    Example:
        >>> closed("test accuracy, mean of the last 3 rounds")
        'test accuracy, mean of the last 3 rounds,'
    """
    return phrase + "," * (", " in re.sub(r"\([^()]*\)", "", phrase))


def directions(metric: Data) -> tuple[str, str]:
    """What more and less of a metric are called."""
    words, unit = label(metric)
    return ("longer", "shorter") if unit in ("s", "ms") or words.endswith("length") else ("higher", "lower")


_NO_NAME = re.compile(
    r"(?:without|with|as|at|by|and|cut|never|not|either|every second)\b"
    r"|[a-z-]+(?:ed|en) (?:alone|apart|at|by|in|longer|on|once|without)\b"
)


def in_sentence(name: str) -> str:
    """A contestant's name as it reads in a sentence: what stands after a comma in brackets, no name in quotation marks.

    Example:
        >>> in_sentence("SGD, twice the rate"), in_sentence("without the margin")
        ('SGD (twice the rate)', '“without the margin”')
    """
    first, comma, rest = name.partition(", ")
    if _NO_NAME.match(name) or (comma and "(" in name):
        return f"“{name}”"
    return f"{first} ({rest})" if comma else name


_TIMES = {"2": "twice", "0.5": "half"}


def bound_of(claim: Data, metric: Data) -> str:
    """The value that a claim without another contestant sets, in words.

    Example:
        >>> bound_of({"relation": "at_most", "margin": 0.1}, {"label": "excess error (%)", "percent": True})
        'at most 10 %'
    """
    margin = 100 * claim["margin"] if metric["percent"] else claim["margin"]
    told = in_unit(number(margin), metric)
    return told if told == "100 %" else f"{claim['relation'].replace('_', ' ')} {told}"


def claim_sentence(claim: Data, metric: Data) -> str:
    """A claim in words.

    Args:
        claim: `arm`, `other`, `relation`, `margin` and `ratio`, as a result file has them.
        metric: `label` and `percent` of the metric that it is on.

    Example:
        >>> held = {"arm": "ELR", "other": "cross-entropy", "relation": "beats", "margin": 0.05, "ratio": False}
        >>> claim_sentence(held, {"label": "final test accuracy (%)", "percent": True})
        'The final test accuracy is at least 5 points higher for ELR than for cross-entropy'
    """
    words, plural = subject(metric)
    bare = re.match(r"(the|what)\b|\S+'s ", words)
    phrase = closed(words if bare else f"the {words}")
    phrase = f"{phrase[0].upper()}{phrase[1:]} {'are' if plural else 'is'}"
    arm, other, margin = in_sentence(claim["arm"]), in_sentence(claim["other"] or ""), claim["margin"]
    amount = number(abs(100 * margin if metric["percent"] else margin))
    if claim["other"] is None:
        return f"{phrase} {bound_of(claim, metric)} for {arm}"
    more, less = directions(metric)
    direction, opposite = (more, less) if claim["relation"] == "beats" else (less, more)
    if claim["ratio"]:
        if margin >= 1:
            return f"{phrase} {direction} for {arm} than for {other} by a factor of at least {number(margin)}"
        beats = claim["relation"] == "beats"
        times = number(margin if beats else 1 / margin)
        bound = f"at {'least' if beats else 'most'} {_TIMES.get(times, f'{times} times')}"
        return f"{phrase} {bound} as {'long' if more == 'longer' else 'high'} for {arm} as for {other}"
    amount = in_unit(amount, metric, difference=True)
    if margin < 0:
        return f"{phrase} at most {amount} {opposite} for {arm} than for {other}"
    return f"{phrase} {f'at least {amount} ' * bool(margin)}{direction} for {arm} than for {other}"
