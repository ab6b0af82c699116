"""How contestants are run: settings are tried first, then every seed runs with the chosen one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console

from trimtab.studies.engine.contestants import Contestant, Job
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.pool import RunError, run_jobs
from trimtab.studies.engine.ran import Ran
from trimtab.studies.engine.recorded import NOTHING, Held, Records
from trimtab.studies.engine.store import Run, RunKey, Store
from trimtab.studies.engine.study import SEARCH_SEED, Setting


def search_jobs(who: Contestant, plan: Plan) -> list[Job]:
    """The runs that try its settings; none where there is nothing to choose."""
    settings = who.grid(plan.budget)
    if len(settings) == 1:
        return []
    return [who.job(SEARCH_SEED, setting, plan.budget, plan.device, searching=True) for setting in settings]


def choose(who: Contestant, plan: Plan, runs: Sequence[Run]) -> tuple[Setting, tuple[str, ...]]:
    """The setting of the best score, the first of equals, and the names that sit at the edge of their grid."""
    settings = who.grid(plan.budget)
    if len(settings) == 1:
        return settings[0], ()
    given = (run.result.score for run in runs)
    scores = [-math.inf if score is None or math.isnan(score) else score for score in given]
    best = max(range(len(settings)), key=scores.__getitem__)
    return settings[best], tuple(who.edge(settings[best]))


def seed_jobs(who: Contestant, setting: Setting, plan: Plan) -> list[Job]:
    """Its runs with the chosen setting, one a seed."""
    seeds = plan.seeds or who.venue.seeds[plan.budget]
    return [who.job(seed, setting, plan.budget, plan.device) for seed in range(seeds)]


def run_contestants(
    contestants: Sequence[Contestant],
    store: Store,
    plan: Plan,
    console: Console | None = None,
    title: str = "runs",
    records: Records = NOTHING,
) -> list[Held]:
    """Try settings, then run every seed; a contestant that several studies share runs once.

    Who is on record already is not run again.

    Raises:
        RunError: some runs failed. The others were done and stored first.
    """
    problems: list[str] = []

    def run_what_can(jobs: Sequence[Job], title: str) -> dict[RunKey, Run]:
        try:
            return run_jobs(jobs, store, plan, console, title)
        except RunError as error:
            problems.append(str(error))
            return error.done

    known = NOTHING if plan.rerun else records
    recorded = {place: found for place, who in enumerate(contestants) if (found := known.find(who, plan))}
    searches = {place: search_jobs(who, plan) for place, who in enumerate(contestants) if place not in recorded}
    tried = run_what_can([job for held in searches.values() for job in held], f"{title}, search")
    chosen = {
        place: choose(contestants[place], plan, [tried[job.key] for job in held])
        for place, held in searches.items()
        if all(job.key in tried for job in held)
    }
    jobs = {place: seed_jobs(contestants[place], setting, plan) for place, (setting, _) in chosen.items()}
    runs = run_what_can([job for held in jobs.values() for job in held], title)
    if problems:
        raise RunError("\n".join(problems), runs)
    ran = {i: Ran(contestants[i], tuple(runs[job.key] for job in held), *chosen[i]) for i, held in jobs.items()}
    return [(recorded | ran)[place] for place in range(len(contestants))]


def stored(who: Contestant, store: Store, plan: Plan, records: Records = NOTHING) -> Held | None:
    """What is held of a contestant with the code and data as they stand, in the store or else on record.

    None unless every seed is there.
    """
    if who.obstacle(plan.budget):
        return None
    return _in_store(who, store, plan) or records.find(who, plan)


def _in_store(who: Contestant, store: Store, plan: Plan) -> Ran | None:
    found = [store.get(job.key) for job in search_jobs(who, plan)]
    if any(run is None for run in found):
        return None
    setting, edge = choose(who, plan, [run for run in found if run is not None])
    runs = [store.get(job.key) for job in seed_jobs(who, setting, plan)]
    if any(run is None for run in runs):
        return None
    return Ran(who, tuple(run for run in runs if run is not None), setting, edge)
