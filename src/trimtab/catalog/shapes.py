"""What a result and a leaderboard look like, so that a file that does not is set aside by name."""

from __future__ import annotations

from typing import Any

VERDICTS = ("holds", "fails", "not shown")
"""What a headline or a claim can be found to do."""

_NUMBER = (int, float)
_OPTIONAL = (int, float, type(None))
_NUMBERS = [_OPTIONAL]

_CLAIM = {
    "text": str,
    "venue": str,
    "arm": str,
    "other": (str, type(None)),
    "on": str,
    "relation": str,
    "margin": _NUMBER,
    "ratio": bool,
    "verdict": VERDICTS,
    "effect": _OPTIONAL,
    "interval": ([_OPTIONAL], type(None)),
    "seeds": int,
    "reason": str,
}
_CURVE = {"x": _NUMBERS, "y": _NUMBERS, "x_label": str}
_ARM = {
    "paper": str,
    "setting": {"*": object},
    "edge": [str],
    "metrics": {"*": _NUMBERS},
    "curves": {"*": _CURVE},
    "pictures?": {"*": {"height": int, "width": int, "data": str}},
}
_METRIC = {"label": str, "best": ("max", "min", type(None)), "percent": bool}
_VENUE = {
    "title": str,
    "data": [str],
    "seeds": int,
    "log": str,
    "metrics": {"*": _METRIC},
    "arms": {"*": _ARM},
    "skipped": {"*": str},
}
RESULT = {
    "paper": str,
    "area": str,
    "budget": str,
    "headline": _CLAIM,
    "claims": [_CLAIM],
    "notes": str,
    "venues": [_VENUE],
    "machine": str,
    "created": str,
    "versions": {"*": str},
}
_STANDING = {"rank": int, "ahead": [str], "behind": [str], "level": [str]}
BOARD = {**_VENUE, "task": str, "variant": str, "budget": str, "standing": {"*": _STANDING}}


def misfit(value: object, shape: Any, place: str = "") -> str:
    """Where a value from a file departs from a shape, in words; empty where it does not.

    A shape is a type, a value, a list (each item has its one shape), a dictionary (these keys; "*" stands for any,
    one with "?" at its end may be missing), or a tuple of shapes of which one must fit.

    Example:
        >>> misfit({"seeds": "five"}, {"seeds": int})
        "seeds must be an int, got 'five'"
    """
    if isinstance(shape, tuple):
        problems = [misfit(value, one, place) for one in shape]
        fits = any(not problem for problem in problems)
        return "" if fits else f"{place} must be {' or '.join(map(_name, shape))}, got {value!r}"[:200]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{place} must be a list, got {value!r}"[:200]
        return next(filter(None, (misfit(item, shape[0], place) for item in value)), "")
    if isinstance(shape, dict):
        return _misfit_of_keys(value, shape, place)
    fits = isinstance(value, shape) if isinstance(shape, type) else value == shape
    if shape in (int, float) and isinstance(value, bool):
        fits = False
    return "" if fits else f"{place} must be {_name(shape)}, got {value!r}"[:200]


def _misfit_of_keys(value: object, shape: dict[str, Any], place: str) -> str:
    if not isinstance(value, dict):
        return f"{place or 'it'} must be a table, got {value!r}"[:200]
    for name, one in shape.items():
        key = name.removesuffix("?")
        if key == "*":
            inside = (misfit(held, one, f"{place}.{entry}" if place else entry) for entry, held in value.items())
            if problem := next(filter(None, inside), ""):
                return problem
        elif key not in value:
            if name != key:
                continue
            return f"{f'{place}.' if place else ''}{key} is missing"
        elif problem := misfit(value[key], one, f"{place}.{key}" if place else key):
            return problem
    return ""


def _name(shape: Any) -> str:
    if isinstance(shape, list):
        return "a list"
    if not isinstance(shape, type):
        return repr(shape)
    return "nothing" if shape is type(None) else f"a{'n' * (shape.__name__[0] in 'aeiou')} {shape.__name__}"
