"""The time that parts of a run take."""

from __future__ import annotations

import time
from typing import Self

import torch


class Stopwatch:
    """Adds up the seconds for which it runs: `with watch: ...`.

    A run has one thread, so that its processor time is what it would take alone, also where runs share the machine; on
    other devices than the processor it is the time that goes by.

    Attributes:
        seconds: so far.

    Example:
        >>> watch = Stopwatch()
        >>> for _ in range(2):
        ...     with watch:
        ...         _ = sum(range(1000))
        >>> watch.seconds > 0
        True
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.clock = time.process_time if torch.device(device).type == "cpu" else time.perf_counter
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._started = self.clock()
        return self

    def __exit__(self, *raised: object) -> None:
        self.seconds += self.clock() - self._started
