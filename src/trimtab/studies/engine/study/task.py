"""Shared work: what is measured on it, what a contestant brings to it, and how many settings everyone may try."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, Literal, TypeVar

from trimtab.studies.engine.study.trial import Budget, Result, Setting, Trial


@dataclass(frozen=True)
class Metric:
    """How a number is read and shown.

    Attributes:
        label: words for tables and axes, with the unit.
        best: whether larger or smaller is better; None where it is neither.
        percent: show a fraction as per cent.
    """

    label: str
    best: Literal["max", "min"] | None = "max"
    percent: bool = False


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """What a contestant brings to a task. Each kind of task has its own subclass, a frozen dataclass.

    Attributes:
        search: name -> values to choose from; all combinations are tried, at most `Task.tries` of them. None takes
            the task's own grid, an empty mapping chooses nothing.
        requires: import names of packages it needs beside the base install; where one is missing it is skipped by
            name.
        unfit: says why it cannot enter a variant of the task, in words, or nothing where it can; skipped by name too.
    """

    search: Mapping[str, Sequence[Any]] | None = field(default=None, compare=False)
    requires: tuple[str, ...] = field(default=(), compare=False)
    unfit: Callable[[Any], str] | None = field(default=None, compare=False)


E = TypeVar("E", bound=Entrant)


def settings_of(grid: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """All combinations of a grid, in order; one empty setting for an empty grid.

    Example:
        >>> settings_of({"lr": (0.1, 0.01)})
        [{'lr': 0.1}, {'lr': 0.01}]
    """
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def at_edge(setting: Setting, grid: Mapping[str, Sequence[Any]]) -> list[str]:
    """The names whose chosen value is the smallest or the largest of three or more numbers.

    Example:
        >>> at_edge({"lr": 0.1}, {"lr": (0.001, 0.01, 0.1)})
        ['lr']
    """
    numbers = {name: v for name, v in grid.items() if len(v) > 2 and all(isinstance(x, int | float) for x in v)}
    return [name for name, values in numbers.items() if setting[name] in (min(values), max(values))]


@dataclass(frozen=True)
class Task(Generic[E]):
    """Shared work that two or more papers meet on.

    A subclass is a frozen dataclass whose fields make its variants (data set, noise rate …). It names what it accepts
    and measures, and says how one entrant runs.

    Class attributes:
        name: for the command line.
        metrics: the numbers of a run; the first one orders the leaderboard.
        accepts: the kind of entrant.
        needs_images: whether a user's own samples must be images; rows of numbers are refused then.
        tries: how many settings an entrant may try.
        search: the settings of entrants that bring none.
        seeds: how many seeds a run takes at each budget, fixed before looking.
        cost: seconds of one core that a run takes at the laptop budget, about.
    """

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Metric]]
    accepts: ClassVar[type[Entrant]]
    needs_images: ClassVar[bool] = False
    tries: ClassVar[int] = 1
    search: ClassVar[Mapping[str, Sequence[Any]]] = {}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 5}
    cost: ClassVar[float] = 20.0

    def run(self, trial: Trial, entrant: E) -> Result:
        """One run of an entrant, with `trial.setting`; while searching, only the score on validation data."""
        raise NotImplementedError(f"{type(self).__name__} must define run(trial, entrant)")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        """Label -> the variants that have a leaderboard of their own."""
        return {}

    @classmethod
    def references(cls) -> Mapping[str, Entrant]:
        """What everyone would want to see beside a method."""
        return {}

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        """The data sets that a run reads at a budget."""
        dataset = getattr(self, "dataset", None)
        if dataset is None:
            return ()
        return ("digits",) if budget == "smoke" and not str(dataset).endswith(".npz") else (dataset,)

    @property
    def label(self) -> str:
        """The variant in words: its name among `variants()`, or its fields that differ from the defaults."""
        for label, variant in self.variants().items():
            if variant == self:
                return label
        changed = (f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(changed) or "default"

    def grid(self, entrant: Entrant) -> Mapping[str, Sequence[Any]]:
        """What an entrant may choose from.

        Raises:
            ValueError: it is more than the task allows anyone.
        """
        grid = self.search if entrant.search is None else entrant.search
        if (count := len(settings_of(grid))) > self.tries:
            raise ValueError(f"search must be at most {self.tries} settings on {self.name}, got {count}")
        return grid
