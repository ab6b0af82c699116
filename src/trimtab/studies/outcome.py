"""A study together with its finished runs: the verdicts, and the JSON that is committed and shown."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trimtab import fingerprint
from trimtab.catalog import Catalog
from trimtab.studies.identity import modules
from trimtab.studies.store import Run
from trimtab.studies.study import Metric, Study, Task
from trimtab.studies.verdict import Verdict, interval, judge, overall


@dataclass(frozen=True)
class Outcome:
    """What a study found.

    Attributes:
        study: the study.
        budget: the budget of all its runs.
        runs: arm name -> finished runs, one a seed, in the order of the seeds.
    """

    study: Study
    budget: str
    runs: Mapping[str, Sequence[Run]]

    @property
    def seeds(self) -> list[int]:
        """The seeds, the same for every arm."""
        return [run.key.seed for run in next(iter(self.runs.values()))]

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics of the study's tasks, the claimed ones at least."""
        known: dict[str, Metric] = {}
        for arm in self.study.arms.values():
            if arm.task is not None:
                known.update(arm.task.metrics)
        return known | {c.on: Metric(c.on.replace("_", " ")) for c in self.study.claims if c.on not in known}

    @property
    def tasks(self) -> list[Task]:
        """The tasks the arms run on, each once."""
        return list(dict.fromkeys(arm.task for arm in self.study.arms.values() if arm.task is not None))

    def values(self, metric: str) -> dict[str, list[float]]:
        """Arm -> the metric of each seed, NaN where an arm does not have it."""
        return {
            name: [float(run.result.metrics.get(metric, math.nan)) for run in runs] for name, runs in self.runs.items()
        }

    def verdicts(self) -> list[Verdict]:
        """One verdict a claim."""
        return [judge(claim, self.values(claim.on)) for claim in self.study.claims]

    def as_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        verdicts = self.verdicts()
        paper = Catalog()[self.study.paper]
        sources: set[str] = set()
        for arm in self.study.arms.values():
            sources |= modules(arm)
        newest = max((run for runs in self.runs.values() for run in runs), key=lambda run: run.finished)
        return {
            "paper": paper.slug,
            "area": paper.area,
            "task": self.tasks[0].name if self.tasks else "",
            "budget": self.budget,
            "seeds": self.seeds,
            "verdict": overall([verdict.word for verdict in verdicts]),
            "notes": self.study.notes,
            "claims": [claim_json(verdict, self.budget) for verdict in verdicts],
            "arms": {name: _arm_json(self.study.arms[name].task, runs) for name, runs in self.runs.items()},
            "leaderboard": list(self.study.leaderboard or self.study.arms),
            "metrics": {n: {"label": m.label, "best": m.best, "percent": m.percent} for n, m in self.metrics.items()},
            "plot": None if self.study.plot is None else list(self.study.plot),
            "log": self.study.log,
            "sources": fingerprint.describe_sources(fingerprint.import_closure(sources)),
            "test": f"tests/{paper.area}/test_{paper.slug}.py",
            "versions": {k: v for k, v in newest.environment.items() if k != "machine"},
            "machine": newest.environment.get("machine", ""),
            "created": datetime.fromtimestamp(newest.finished, UTC).isoformat(timespec="seconds"),
        }


def claim_json(verdict: Verdict, budget: str) -> dict[str, Any]:
    """A verdict as plain data."""
    claim = verdict.claim
    return {
        "text": claim.sentence(),
        "arm": claim.arm,
        "other": claim.other,
        "on": claim.on,
        "verdict": verdict.word,
        "effect": verdict.effect,
        "interval": None if verdict.interval is None else [_finite(end) for end in verdict.interval],
        "seeds": verdict.seeds,
        "budget": budget,
        "reason": verdict.reason,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _arm_json(task: Task | None, runs: Sequence[Run]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for run in runs for name in run.result.metrics))
    curves = list(dict.fromkeys(name for run in runs for name in run.result.curves))
    return {
        "task": task.name if task else "",
        "variant": repr(task) if task else "",
        "metrics": {n: [_finite(float(run.result.metrics.get(n, math.nan))) for run in runs] for n in names},
        "curves": {name: mean_curve([run for run in runs if name in run.result.curves], name) for name in curves},
        "seconds": [round(run.seconds, 3) for run in runs],
    }


def mean_curve(runs: Sequence[Run], name: str) -> dict[str, list[float | None]]:
    """Mean over seeds and the 95 % band, over the points that all seeds have."""
    held = [run.result.curves[name] for run in runs]
    length = min(len(curve.x) for curve in held)
    columns = [interval([float(curve.y[point]) for curve in held]) for point in range(length)]
    return {
        "x": [float(value) for value in held[0].x[:length]],
        "y": [_short(mean) for mean, _, _ in columns],
        "low": [_short(low) for _, low, _ in columns],
        "high": [_short(high) for _, _, high in columns],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as part:
        part.write(text)
    Path(part.name).chmod(0o644)
    Path(part.name).replace(path)
