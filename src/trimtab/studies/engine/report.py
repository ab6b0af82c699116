"""How outcomes and stored runs are shown: tables for the terminal, rows for CSV, leaderboards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from trimtab.studies.identity import identity, sources_hash
from trimtab.studies.outcome import Outcome, mean_curve
from trimtab.studies.store import Run
from trimtab.studies.study import Arm, Metric, Study, Task
from trimtab.studies.verdict import interval

VERDICT_STYLE = {"holds": "green", "partly": "yellow", "fails": "red", "not shown": "dim"}


def number(value: float, metric: Metric | None = None) -> str:
    """A number as tables show it.

    Example:
        >>> number(0.8123, Metric("accuracy (%)", percent=True))
        '81.2'
    """
    if not math.isfinite(value):
        return "–"
    if metric is not None and metric.percent:
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def mean_and_interval(values: Sequence[float], metric: Metric | None = None) -> str:
    """`mean ± half-width` of the 95 % interval; the mean alone where there is one value."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    mean, low, high = interval(finite)
    return number(mean, metric) if len(finite) == 1 else f"{number(mean, metric)} ± {number((high - low) / 2, metric)}"


def outcome_table(outcome: Outcome) -> Table:
    """The claims of a study with their verdicts."""
    seeds = len(outcome.seeds)
    table = Table(
        title=f"{outcome.study.paper} ({outcome.budget}, {seeds} seed{'s' * (seeds > 1)})", title_justify="left"
    )
    for heading in ("claim", "effect", "95 % interval", "verdict"):
        table.add_column(heading, overflow="fold")
    for verdict in outcome.verdicts():
        bounds = "–" if verdict.interval is None else " … ".join(f"{end:.4g}" for end in verdict.interval)
        effect = "–" if verdict.effect is None else f"{verdict.effect:.4g}"
        word = f"[{VERDICT_STYLE[verdict.word]}]{verdict.word}[/]" + (f" ({verdict.reason})" if verdict.reason else "")
        table.add_row(verdict.claim.sentence(), effect, bounds, word)
    return table


def task_tables(outcome: Outcome) -> list[Table]:
    """The arms of a study by their numbers: a table for each variant of each task."""
    groups: dict[Task | None, dict[str, Sequence[Run]]] = {}
    for name, runs in outcome.runs.items():
        groups.setdefault(outcome.study.arms[name].task, {})[name] = runs
    return [
        arms_table(runs, outcome.metrics if task is None else task.metrics, "" if task is None else repr(task))
        for task, runs in groups.items()
    ]


def arms_table(runs: Mapping[str, Sequence[Run]], metrics: Mapping[str, Metric], title: str = "") -> Table:
    """Arms by metrics, mean and 95 % interval, the best first."""
    shown = [name for name in metrics if any(name in run.result.metrics for held in runs.values() for run in held)]
    table = Table(title=title, title_justify="left")
    table.add_column("arm", overflow="fold")
    for name in shown:
        table.add_column(metrics[name].label, justify="right")
    for arm in ranked(runs, metrics):
        table.add_row(arm, *(mean_and_interval(_values(runs[arm], name), metrics[name]) for name in shown))
    return table


def _values(runs: Sequence[Run], metric: str) -> list[float]:
    return [float(run.result.metrics.get(metric, math.nan)) for run in runs]


def ranked(runs: Mapping[str, Sequence[Run]], metrics: Mapping[str, Metric]) -> list[str]:
    """The arms by the mean of the first metric that has a direction, the best first."""
    first = next((name for name, metric in metrics.items() if metric.best), None)
    if first is None:
        return list(runs)

    def score(arm: str) -> float:
        finite = [value for value in _values(runs[arm], first) if math.isfinite(value)]
        mean = math.fsum(finite) / len(finite) if finite else math.inf
        return mean if metrics[first].best == "min" or not finite else -mean

    return sorted(runs, key=score)


def leaderboard_json(
    task: Task, arms: Mapping[str, tuple[str, Arm]], runs: Mapping[str, Sequence[Run]], budget: str
) -> dict[str, Any]:
    """A comparison as plain data, in the form of a study's result but without claims; the best arm first."""
    curves = {
        arm: list(dict.fromkeys(name for run in held for name in run.result.curves)) for arm, held in runs.items()
    }
    return {
        "task": task.name,
        "variant": repr(task),
        "budget": budget,
        "seeds": [run.key.seed for run in next(iter(runs.values()))],
        "metrics": {n: {"label": m.label, "best": m.best, "percent": m.percent} for n, m in task.metrics.items()},
        "arms": {
            arm: {
                "paper": arms[arm][0],
                "metrics": {name: _finite(_values(runs[arm], name)) for name in task.metrics},
                "curves": {name: mean_curve(runs[arm], name) for name in curves[arm]},
                "seconds": [round(run.seconds, 3) for run in runs[arm]],
            }
            for arm in ranked(runs, task.metrics)
        },
        "claims": [],
        "plot": None,
        "log": "",
    }


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


@dataclass(frozen=True)
class Stored:
    """What the store holds of one study at one budget.

    Attributes:
        outcome: over the seeds that every arm has, with the code as it stands; None where there is no such seed.
        fresh: number of runs that belong to the code as it stands.
        stale: number of runs of earlier code.
    """

    outcome: Outcome | None
    fresh: int
    stale: int


def stored(study: Study, runs: Sequence[Run], budget: str) -> Stored:
    """Sort the stored runs of a study into those of the present code and those of earlier code."""
    fresh: dict[str, dict[int, Run]] = {name: {} for name in study.arms}
    stale = 0
    for name, arm in study.arms.items():
        who, code = identity(arm), sources_hash(arm)
        for run in runs:
            if run.identity == who and run.key.budget == budget:
                if run.key.sources == code:
                    fresh[name][run.key.seed] = run
                else:
                    stale += 1
    seeds = sorted(set.intersection(*(set(held) for held in fresh.values())))
    outcome = (
        Outcome(study, budget, {name: [held[s] for s in seeds] for name, held in fresh.items()}) if seeds else None
    )
    return Stored(outcome, sum(map(len, fresh.values())), stale)


def rows(runs: Sequence[Run], arms: Mapping[str, Arm]) -> list[dict[str, Any]]:
    """One flat row a run and metric, for CSV and JSON.

    Args:
        runs: stored runs.
        arms: what to call an arm -> the arm; runs of others are named by their identity.
    """
    names = {identity(arm): name for name, arm in arms.items()}
    code = {identity(arm): sources_hash(arm) for arm in arms.values()}
    return [
        {
            "arm": names.get(run.identity, run.identity),
            "seed": run.key.seed,
            "budget": run.key.budget,
            "device": run.key.device,
            "metric": metric,
            "value": value,
            "seconds": run.seconds,
            "state": "fresh" if code.get(run.identity) == run.key.sources else "stale",
        }
        for run in runs
        for metric, value in run.result.metrics.items()
    ]
