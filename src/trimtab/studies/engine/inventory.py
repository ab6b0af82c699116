"""What a store holds: which runs belong to the code and data as they stand, and whose they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.studies.engine.contestants import Contestant
from trimtab.studies.engine.outcome import title
from trimtab.studies.engine.store import Run
from trimtab.studies.engine.study import SEARCH_SEED, Budget, Task


@dataclass(frozen=True)
class Held:
    """The stored runs of some contestants.

    Attributes:
        fresh: number of runs with the code and data as they stand.
        stale: number of runs of earlier code or data.
    """

    fresh: int
    stale: int


class Inventory:
    """Stored runs by whose they are.

    Args:
        runs: what the store holds.
        device: the device that they are asked for on.
    """

    def __init__(self, runs: Sequence[Run], device: str = "cpu") -> None:
        self.runs, self.device = runs, device
        self._by_arm: dict[str, list[Run]] = {}
        for run in runs:
            self._by_arm.setdefault(run.key.arm, []).append(run)

    def _of(self, who: Contestant, budget: Budget) -> Iterable[tuple[Run, bool]]:
        """A contestant's runs at a budget, with whether each is fresh; tries of settings included."""
        if who.obstacle(budget):
            return
        for setting in who.grid(budget):
            for searching in (True, False):
                # The code of those without runs, which takes a while to hash, is not looked at.
                runs = self._by_arm.get(who.described(setting, searching=searching)[1])
                if not runs:
                    continue
                key = who.job(SEARCH_SEED, setting, budget, self.device, searching=searching).key
                for run in runs:
                    if run.key.budget == budget:
                        yield run, run.key.sources == key.sources

    def held(self, contestants: Iterable[Contestant], budget: Budget) -> Held:
        """How many runs of some contestants are fresh and how many are stale."""
        found = {run.key: fresh for who in contestants for run, fresh in self._of(who, budget)}
        return Held(sum(found.values()), sum(not fresh for fresh in found.values()))

    def rows(self, contestants: Iterable[Contestant]) -> list[dict[str, Any]]:
        """One flat row a run and metric; runs of nobody known are named by their identity, and stale."""
        rows, seen = [], set()
        budgets = {run.key.budget for run in self.runs}
        for who in contestants:
            for budget in budgets:
                for run, fresh in self._of(who, budget):  # type: ignore[arg-type]
                    if (run.key, who.paper) not in seen:
                        seen |= {(run.key, who.paper), run.key}
                        rows += _rows(run, who, fresh)
        for run in self.runs:
            if run.key not in seen:
                rows += _rows(run, None, fresh=False)
        return rows


def _rows(run: Run, who: Contestant | None, fresh: bool) -> list[dict[str, Any]]:
    task = who.venue if who and isinstance(who.venue, Task) else None
    place = {
        "paper": who.paper if who else "",
        "task": task.name if task else "",
        "variant": task.label if task else title(who.venue) if who else "",
        "arm": who.name if who else run.identity,
        "seed": run.key.seed,
    }
    end = {"budget": run.key.budget, "state": "fresh" if fresh else "stale"}
    return [{**place, "metric": name, "value": value, **end} for name, value in run.result.metrics.items()]
