"""Timing several contestants so that a machine whose speed drifts treats them alike, and the rows of the tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(calls: Mapping[str, Callable[[], object]], repeats: int = 30, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(held) for name, held in seconds.items()}


def compiling(call: Callable[[], object]) -> str:
    """Makes the first of the calls of something compiled, and says for a note how long that took."""
    started = time.perf_counter()
    call()
    return f"compiled in {time.perf_counter() - started:.2g} s"


_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}


def compared(
    what: str,
    found: Mapping[str, float],
    aim: float | None = None,
    note: str = "",
    *,
    ours: str = "ours",
    peer: str = "peer",
    unit: str = "ms",
    met: bool = True,
) -> dict[str, object]:
    """A row of a table: ours beside a peer.

    Args:
        what: what was measured.
        found: name -> seconds, as `medians` gives them; another number where the unit is none of time.
        aim: the largest ratio that is good enough; None where there is none.
        note: sizes, and what else a reader must know.
        ours, peer: the names in `found`.
        unit: of the two numbers that are shown.
        met: whether what else was asked for holds, such as equal results.
    """
    ratio, factor = found[ours] / found[peer], _UNITS.get(unit, 1.0)
    return {
        "what": what,
        "ours": factor * found[ours],
        "peer": factor * found[peer],
        "ratio": ratio,
        "unit": unit,
        "aim": "" if aim is None else f"at most {aim:g}",
        "met": None if aim is None else ratio <= aim and met,
        "note": note,
    }
