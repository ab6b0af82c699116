"""Variants of a task that one number alone sets apart, such as evaluations: an axis to draw results along."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimtab.studies.engine.verdict import interval

Data = Mapping[str, Any]

_LEAST = 3
"""Points that make a line."""


def axes_of(board: Data, boards: Sequence[Data]) -> Iterator[tuple[str, dict[float, Data]]]:
    """The numbers along which a leaderboard has neighbours: setting -> its values, each with its leaderboard.

    Neighbours are of the same task and budget and differ in that setting alone.

    Example:
        >>> boards = [{"task": "sampling", "budget": "laptop", "settings": {"evaluations": n}} for n in (50, 5, 10)]
        >>> [(name, list(found)) for name, found in axes_of(boards[0], boards)]
        [('evaluations', [5, 10, 50])]
    """
    same = [b for b in boards if (b["task"], b["budget"]) == (board["task"], board["budget"])]
    for name, value in board["settings"].items():
        if not _is_number(value):
            continue
        rest = _without(board["settings"], name)
        found = {b["settings"][name]: b for b in same if _without(b["settings"], name) == rest}
        if len(found) >= _LEAST and all(map(_is_number, found)):
            yield name, dict(sorted(found.items()))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without(settings: Data, name: str) -> dict[str, Any]:
    return {other: value for other, value in settings.items() if other != name}


def venues_along(result: Data, boards: Sequence[Data]) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """A study's contestants along the axes of its tasks, in the form of a venue with curves.

    Shown are the paper's own entrants and whom its claims face on the task, by the metric that a claim is about, over
    all leaderboards of the axis. Variants whose runs have curves of their own are left out.

    Args:
        result: a study's outcome, as the runner writes it.
        boards: leaderboards of any tasks.

    Returns:
        One venue an axis, with the titles of the variants that lie on it.
    """
    claims = [result["headline"], *result["claims"]]
    of_task = {venue["title"]: venue for venue in result["venues"] if venue.get("task")}
    by_title = {board["title"]: board for board in boards if board["budget"] == result["budget"]}
    done: set[str] = set()
    for claim in claims:
        title = claim["venue"]
        venue, board = of_task.get(title), by_title.get(title)
        if venue is None or board is None or title in done or any(arm["curves"] for arm in venue["arms"].values()):
            continue
        faced = {
            name
            for other in claims
            if other["venue"] in of_task and of_task[other["venue"]]["task"] == venue["task"]
            for name in (other["arm"], other["other"])
        }
        for setting, along in axes_of(board, boards):
            arms = {}
            for name in dict.fromkeys(name for b in along.values() for name in b["arms"]):
                held = {value: b["arms"][name] for value, b in along.items() if name in b["arms"]}
                if name in faced or any(arm["paper"] == result["paper"] for arm in held.values()):
                    curve = _curve(held, claim["on"], setting)
                    if len(curve["x"]) > 1:
                        arms[name] = {"metrics": {}, "curves": {claim["on"]: curve}, "paper": ""}
            if len(arms) > 1:
                titles = {b["title"] for b in along.values()}
                done |= titles
                yield (
                    {
                        "title": _title(board, setting, boards),
                        "metrics": {claim["on"]: board["metrics"][claim["on"]]},
                        "arms": arms,
                        "log": "x" if min(along) > 0 and max(along) >= 10 * min(along) else "",
                    },
                    titles,
                )


def _curve(held: Mapping[float, Data], metric: str, setting: str) -> dict[str, Any]:
    """A contestant's mean and interval at each value."""
    points = []
    for value, arm in held.items():
        numbers = [number for number in arm["metrics"].get(metric, ()) if number is not None and math.isfinite(number)]
        if numbers:
            points.append((float(value), *interval(numbers)))
    x, y, low, high = (list(column) for column in zip(*points, strict=True)) if points else ([], [], [], [])
    return {"x": x, "y": y, "low": low, "high": high, "x_label": setting.replace("_", " ")}


def _title(board: Data, setting: str, boards: Sequence[Data]) -> str:
    """The task, and what else sets its variants apart."""
    same = [b for b in boards if b["task"] == board["task"]]
    others = [
        f"{name.replace('_', ' ')} {value}"
        for name, value in _without(board["settings"], setting).items()
        if any(b["settings"].get(name) != value for b in same)
    ]
    return ", ".join([f"{board['task']} by {setting.replace('_', ' ')}", *others])
