"""`trimtab run` and `trimtab report`: what the papers' studies find, run now or stored."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import catalogue
from trimtab.cli.errors import one_line_errors
from trimtab.cli.files import must_be_writable, open_store
from trimtab.cli.options import Address, AsJson, Backends, Budgets, Device, Jobs, Rerun, ResultsFolder, Seeds, StorePath
from trimtab.cli.printing import print_json, print_rich_tables, terminal_width

if TYPE_CHECKING:
    from trimtab.studies.engine.library import Field
    from trimtab.studies.engine.plan import Plan
    from trimtab.studies.engine.recorded import Records
    from trimtab.studies.engine.store import Store
    from trimtab.studies.engine.study import Task


def run(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers whose studies to run.")] = None,
    area: Annotated[str | None, typer.Option(help="All studies of an area, such as losses.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All studies.")] = False,
    budget: Budgets = "laptop",
    seeds: Seeds = None,
    jobs: Jobs = None,
    backend: Backends = "loky",
    address: Address = None,
    device: Device = "cpu",
    store: StorePath = None,
    results: ResultsFolder = None,
    rerun: Rerun = False,
    as_json: AsJson = False,
) -> None:
    """Run studies and judge their claims.

    Runs are stored as they finish, and what is stored is not run again.
    """
    with one_line_errors():
        from rich.console import Console

        from trimtab.studies.engine import library
        from trimtab.studies.engine.outcome import Outcome, run_study, write_json
        from trimtab.studies.engine.plan import Plan
        from trimtab.studies.engine.pool import RunError
        from trimtab.studies.engine.recorded import Records

        if sum((bool(slugs), area is not None, everything)) != 1:
            raise ValueError("name studies to run, or give --area or --all: one of the three")
        plan = Plan(budget, seeds, jobs, backend, address, device, rerun)  # type: ignore[arg-type]
        inside = None if area is None else {paper.slug for paper in catalogue.read_catalog().area(area)}
        names = slugs or [slug for slug in library.slugs() if inside is None or slug in inside]
        studies = [library.find_study(name) for name in dict.fromkeys(names)]
        if not studies:
            raise ValueError(f"area {area} has no study yet")
        must_be_writable(results)
        outcomes, failed = list[Outcome](), list[RunError]()
        records = Records(results)
        with open_store(store) as kept:
            for study in studies:
                try:
                    outcome = run_study(study, kept, plan, Console(stderr=True), records)
                except RunError as error:
                    failed.append(error)
                    continue
                outcomes.append(outcome)
                for who, why in outcome.skipped:
                    print(f"{study.paper}: {who.name} was skipped: {why}", file=sys.stderr)
                if results is not None:
                    # At once, so that each result is there as soon as it can be, whatever comes after it.
                    write_json(outcome.as_json(), results / f"{study.paper}.json")
                    # A variant that its task does not list has no leaderboard.
                    for task in (task for task in study.on if task in task.variants().values()):
                        _write_board(task, library.field_of(task, plan.budget), kept, plan, records, results)
        if outcomes and as_json:
            print_json([outcome.as_json() for outcome in outcomes])
        elif outcomes:
            _show_outcomes([outcome.as_json() for outcome in outcomes])
        if failed:
            raise RunError("\n".join(map(str, failed)))


def _write_board(task: Task[Any], field: Field, kept: Store, plan: Plan, records: Records, results: Path) -> None:
    """The leaderboard of a variant, of those whose runs are all held; the others are not there yet."""
    from trimtab.studies.engine.outcome import board_json, board_path, write_json
    from trimtab.studies.engine.runner import stored

    ran = [found for who in field.contestants if (found := stored(who, kept, plan, records)) is not None]
    if ran:
        write_json(board_json(task, ran, plan.budget, field.skipped), board_path(task, results))


def report(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers; by default all that have stored runs.")] = None,
    budget: Budgets = "laptop",
    seeds: Seeds = None,
    device: Device = "cpu",
    store: StorePath = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="File to write every stored number into.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder to save a figure of each study in.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is stored, without running anything.

    Runs of earlier code or data are counted as stale.
    """
    with one_line_errors():
        from trimtab.studies.engine import library
        from trimtab.studies.engine.figure import draw
        from trimtab.studies.engine.inventory import Inventory
        from trimtab.studies.engine.outcome import contestants, stored_outcome
        from trimtab.studies.engine.plan import Plan

        plan = Plan(budget, seeds, device=device)  # type: ignore[arg-type]
        found, held = [], {}
        with open_store(store, read_only=True) as kept:
            inventory = Inventory(kept.all(), device)
            budgets = {run.key.budget for run in inventory.runs}
            # Whose runs are stored is found by trying every study, which takes its time: not where there are none.
            wanted = slugs or (library.slugs() if csv is not None or budget in budgets else [])
            studies = [library.find_study(name) for name in wanted]
            for study in studies:
                count = inventory.held(contestants(study), plan.budget)
                if slugs or count.fresh or count.stale:
                    held[study.paper] = count
                    if (outcome := stored_outcome(study, kept, plan)).ran:
                        found.append(outcome.as_json() | {"stale_runs": count.stale})
        if csv is not None:
            _write_csv(csv, inventory.rows(library.everybody(studies)))
        if figures is not None:
            must_be_writable(figures)
            for result in found:
                draw(result, figures / f"{result['paper']}.png")
        if as_json:
            print_json(found)
            return
        _show_outcomes(found)
        for slug, count in held.items():
            stale = f", {count.stale} stale (the code or the data have changed since)" if count.stale else ""
            missing = "" if any(result["paper"] == slug for result in found) else "; nobody has all seeds"
            print(f"{slug}: {count.fresh} fresh runs{stale}{missing}")
        if not held:
            others = " and ".join(sorted(budgets - {budget}))
            hint = f"there are runs at budget {others}: --budget shows them" if others else "`trimtab run` stores runs"
            print(f"nothing is stored at budget {budget}; {hint}")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import csv

    must_be_writable(path.parent)
    columns = ("paper", "task", "variant", "arm", "seed", "metric", "value", "budget", "state")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _show_outcomes(results: Sequence[Mapping[str, Any]]) -> None:
    from trimtab.studies.engine import report as reports

    for result in results:
        venues = [venue for venue in result["venues"] if venue["arms"]]
        tables = (reports.venue_table(venue, result["budget"], terminal_width()) for venue in venues)
        print_rich_tables(reports.claims_table(result), *tables)
        verdict, measured = result["headline"]["verdict"], reports.effect_sentence(result, result["headline"])
        print(f"{result['paper']}: the headline {_verb(verdict)}: {measured}")


def _verb(word: str) -> str:
    return f"is {word}" if word == "not shown" else word
