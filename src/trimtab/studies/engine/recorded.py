"""What result files hold already: rows whose code and data are as they stand need not be run again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.studies.engine.contestants import Contestant
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.ran import Ran
from trimtab.studies.engine.study import Metric


@dataclass(frozen=True)
class Recorded:
    """A contestant's row of a result file, in place of its runs.

    Attributes:
        who: the contestant.
        held: the row, as the runner wrote it.
        made: versions, machine and date of the file.
    """

    who: Contestant
    held: Mapping[str, Any]
    made: Mapping[str, Any]

    @property
    def seeds(self) -> int:
        """The number of its runs."""
        return len(self.held["seconds"])

    @property
    def pictured(self) -> bool:
        """Whether its first run made pictures."""
        return bool(self.held.get("pictures"))

    def values(self, metric: str) -> list[float]:
        """The metric of each seed, NaN where a run does not have it."""
        values = self.held["metrics"].get(metric, [None] * self.seeds)
        return [math.nan if value is None else float(value) for value in values]

    def row(self, metrics: Mapping[str, Metric], *, curves: bool = True, pictures: bool = False) -> dict[str, Any]:
        """The row itself, with its curves and pictures or without."""
        row = {name: value for name, value in self.held.items() if name != "pictures" or pictures}
        row["paper"] = self.who.paper
        # What lies at the edge is a matter of the grid of today, which may be wider than that of the runs.
        row["edge"] = self.who.edge(row["setting"])
        row["metrics"] = {name: values for name, values in self.held["metrics"].items() if name in metrics}
        return row if curves else row | {"curves": {}}


class Records:
    """The rows of all result files in a folder, by the identity of their runs.

    Args:
        folder: of results, as `trimtab run --results` writes it; None has no rows. Files that cannot be read are
            passed over.
    """

    def __init__(self, folder: Path | None) -> None:
        self._rows: dict[tuple[str, str], tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        for path in sorted(folder.rglob("*.json")) if folder is not None else ():
            try:
                self._read(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue

    def _read(self, file: Mapping[str, Any]) -> None:
        made = {name: file[name] for name in ("versions", "machine", "created")}
        for venue in file.get("venues", [file]):
            for row in venue["arms"].values():
                place = (file["budget"], row["key"])
                older, made_then = self._rows.get(place, ({}, made))
                # Curves and pictures stand in one of the files that show a contestant, not in all.
                merged = older | row | {name: row.get(name) or older.get(name, {}) for name in ("curves", "pictures")}
                if not merged["pictures"]:
                    del merged["pictures"]
                self._rows[place] = (merged, max(made, made_then, key=lambda held: str(held["created"])))

    def find(self, who: Contestant, plan: Plan) -> Recorded | None:
        """The row of a contestant with the code and the data as they stand and all the seeds that the plan wants."""
        if not self._rows or plan.device != "cpu":
            return None
        for setting in who.grid(plan.budget):
            key = who.job(0, setting, plan.budget, plan.device).key
            held = self._rows.get((plan.budget, f"{key.arm} {key.sources}"))
            if held is not None and len(held[0]["seconds"]) == (plan.seeds or who.venue.seeds[plan.budget]):
                return Recorded(who, *held)
        return None


Held = Ran | Recorded
"""What is known of a contestant: its runs, or its row."""

NOTHING = Records(None)
