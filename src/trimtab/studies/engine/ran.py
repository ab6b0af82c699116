"""A contestant with its finished runs, and the row that tables, figures and files show of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from trimtab.studies.engine.contestants import Contestant
from trimtab.studies.engine.store import Run
from trimtab.studies.engine.study import Metric, Setting
from trimtab.studies.engine.verdict import interval

_POINTS = 200


@dataclass(frozen=True)
class Ran:
    """The finished runs of a contestant.

    Attributes:
        who: the contestant.
        runs: one a seed, in the order of the seeds.
        setting: what the search chose.
        edge: the names whose chosen value sits at the edge of its grid.
    """

    who: Contestant
    runs: tuple[Run, ...]
    setting: Setting
    edge: tuple[str, ...] = ()

    @property
    def seeds(self) -> int:
        """The number of its runs."""
        return len(self.runs)

    @property
    def pictured(self) -> bool:
        """Whether its first run made pictures."""
        return bool(self.runs[0].result.pictures)

    @property
    def made(self) -> dict[str, Any]:
        """Versions, machine and date of the newest run."""
        newest = max(self.runs, key=lambda run: run.finished)
        return {
            "versions": {name: version for name, version in newest.environment.items() if name != "machine"},
            "machine": newest.environment.get("machine", ""),
            "created": datetime.fromtimestamp(newest.finished, UTC).isoformat(timespec="seconds"),
        }

    def values(self, metric: str) -> list[float]:
        """The metric of each seed, NaN where a run does not have it."""
        return [float(run.result.metrics.get(metric, math.nan)) for run in self.runs]

    def row(self, metrics: Mapping[str, Metric], *, curves: bool = True, pictures: bool = False) -> dict[str, Any]:
        """Its numbers as plain data; the key says which code and data they came from."""
        results = [run.result for run in self.runs]
        names = [name for name in metrics if any(name in result.metrics for result in results)]
        lines = dict.fromkeys(name for result in results for name in result.curves) if curves else {}
        seen = {name: asdict(picture) for name, picture in results[0].pictures.items()} if pictures else {}
        return {
            "paper": self.who.paper,
            "setting": dict(self.setting),
            "edge": list(self.edge),
            "metrics": {name: [short(value) for value in self.values(name)] for name in names},
            "curves": {name: self.mean_curve(name) for name in lines},
            **({"pictures": seen} if seen else {}),
            "seconds": [round(run.seconds, 2) for run in self.runs],
            "key": f"{self.runs[0].key.arm} {self.runs[0].key.sources}",
        }

    def mean_curve(self, name: str) -> dict[str, Any]:
        """Mean over seeds and the 95 % band, over the points that all seeds have, at most 200 of them."""
        held = [run.result.curves[name] for run in self.runs if name in run.result.curves]
        length = min(len(curve.x) for curve in held)
        step = max(1, math.ceil(length / _POINTS))
        points = sorted({*range(0, length, step), length - 1}) if length else []
        columns = [interval([float(curve.y[point]) for curve in held]) for point in points]
        curve = {"x": [short(float(held[0].x[p])) for p in points], "y": [short(mean) for mean, _, _ in columns]}
        if len(held) > 1:
            curve |= {"low": [short(low) for _, low, _ in columns], "high": [short(high) for _, _, high in columns]}
        return {"x_label": held[0].x_label, **curve}


def short(value: float | None) -> float | None:
    """Five digits; None for what is no finite number."""
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None
