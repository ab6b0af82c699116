"""Work that only one paper needs: plain arms side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.studies.engine.study.task import Metric, Task
from trimtab.studies.engine.study.trial import Budget, Result, Trial

Arm = Callable[[Trial], Result]
"""A contestant of an experiment: a function of the trial alone."""


@dataclass(frozen=True)
class Experiment:
    """What only one paper needs: plain arms side by side.

    Attributes:
        name: for tables and figures, unique in its study.
        arms: contestants by name.
        metrics: the numbers of a run; the first one orders tables.
        seeds: how many seeds a run takes at each budget, fixed before looking.
        reads: names of the data sets that the arms read; beyond the smoke budget, which has digits at most.
        requires: arm -> import names of packages it needs beside the base install; where one is missing the arm is
            skipped by name.
        alone: measure one run at a time, as speeds want it.
        log: "x", "y", "xy" or "": logarithmic axes of the figure.
        cost: seconds of one core that a run takes at the laptop budget, about.
    """

    name: str
    arms: Mapping[str, Arm] = field(compare=False)
    metrics: Mapping[str, Metric] = field(compare=False)
    seeds: Mapping[Budget, int] = field(default_factory=lambda: {"smoke": 1, "laptop": 5, "paper": 5}, compare=False)
    reads: tuple[str, ...] = ()
    requires: Mapping[str, Sequence[str]] = field(default_factory=dict, compare=False)
    alone: bool = False
    log: str = ""
    cost: float = field(default=10.0, compare=False)

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        """The data sets that its arms read at a budget."""
        return tuple(name for name in self.reads if budget != "smoke" or name == "digits")


Venue = Task[Any] | Experiment
"""Where contestants meet."""
