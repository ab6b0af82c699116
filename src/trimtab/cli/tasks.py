"""`trimtab tasks` and `trimtab compare`: the methods of many papers on one task."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli.errors import one_line_errors
from trimtab.cli.files import must_be_writable, open_store
from trimtab.cli.options import Address, AsJson, Backends, Budgets, Device, Jobs, Rerun, ResultsFolder, Seeds, StorePath
from trimtab.cli.printing import print_json, print_paragraph, print_rich_tables, terminal_width

if TYPE_CHECKING:
    from trimtab.studies.engine.recorded import Held
    from trimtab.studies.engine.study import Budget, Task


def tasks(as_json: AsJson = False) -> None:
    """List the tasks that methods are compared on.

    What each is, its variants, who is on it, and how long a comparison takes.
    """
    with one_line_errors():
        from trimtab.studies.engine import library

        found = []
        for name in library.task_names():
            try:
                found.append(library.about(library.find_task(name)))
            except (ImportError, ValueError) as error:  # one that is broken keeps no other from being listed
                print(f"trimtab: task {name} cannot be read: {error}", file=sys.stderr)
        if as_json:
            print_json(found)
            return
        for task in found:
            print_paragraph(task["name"], bold=True)
            print_paragraph(task["about"], 2)
            for heading in ("variants", "references", "papers"):
                print_paragraph(f"{heading}: {'; '.join(task[heading])}", 2)
            minutes = max(1, round(task["minutes"]))
            time = f"{minutes} minute{'s' * (minutes > 1)}"
            print_paragraph(f"about {time} of one core for a variant at the laptop budget", 2, dim=True)


def compare(
    task: Annotated[
        str, typer.Argument(help="The task, such as label-noise (`trimtab tasks` lists them), or my_module:my_task.")
    ],
    variant: Annotated[str | None, typer.Option(help='A variant by its name, such as "pair flip".')] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the task, such as rate=0.2; may be repeated.")
    ] = None,
    own_data: Annotated[
        Path | None,
        typer.Option("--data", help="Your data, an .npz with x_train, y_train, x_test and y_test, or x and y."),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Only these papers beside the references, separated by commas.")
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="A mixture of papers' parts beside each part, such as elr+saf+adabelief.")
    ] = None,
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="On every variant, with the mean rank over them.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="File to save the figure in (.png, .svg or .pdf).")] = None,
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
    """Run methods side by side on one task.

    All papers whose methods can enter it, or those named, beside its references; the leaderboard is shown.
    """
    with one_line_errors():
        from rich.console import Console

        from trimtab.studies.engine import library
        from trimtab.studies.engine.figure import draw
        from trimtab.studies.engine.outcome import board_json, board_path, write_json
        from trimtab.studies.engine.plan import Plan
        from trimtab.studies.engine.pool import RunError
        from trimtab.studies.engine.recorded import Records
        from trimtab.studies.engine.runner import run_contestants, stored

        plan = Plan(budget, seeds, jobs, backend, address, device, rerun)  # type: ignore[arg-type]
        if methods and combine:
            raise ValueError("methods must be left out where parts are combined")
        kind = library.find_task(task)
        if all_variants:
            if variant or settings or own_data or figure:
                raise ValueError("all-variants must stand without --variant, --set, --data and --figure")
            works = list(library.variants_of(kind).values())
        else:
            works = [_work(kind, variant, settings or [], own_data, plan.budget)]
        chosen = _papers(works[0], plan.budget, methods) if methods else None
        fields = [
            library.mixture(work, plan.budget, combine.split("+"))
            if combine
            else library.field_of(work, plan.budget, chosen)
            for work in works
        ]
        for path in (results, figure.parent if figure else None):
            must_be_writable(path)
        boards, failed, records = [], list[RunError](), Records(results)
        with open_store(store) as kept:
            for work, field in zip(works, fields, strict=True):
                for name, why in field.skipped.items():
                    print(f"{name} was skipped: {why}", file=sys.stderr)
                if not field.contestants:
                    print(f"{work.label}: nobody can run here", file=sys.stderr)
                    continue
                title = f"{work.name}, {work.label}"
                try:
                    ran = run_contestants(field.contestants, kept, plan, Console(stderr=True), title, records)
                except RunError as error:
                    failed.append(error)
                    held = [stored(who, kept, plan, records) for who in field.contestants]
                    ran = [found for found in held if found is not None]
                if not ran:
                    continue
                boards.append((work, board_json(work, ran, plan.budget, field.skipped), ran))
                if results is not None:
                    write_json(boards[-1][1], board_path(work, results))
        if not boards:
            raise failed[0] if failed else ValueError(f"nobody can enter {task} on this machine")
        if figure is not None:
            draw(boards[0][1], figure)
        if as_json:
            print_json(boards[0][1] if not all_variants else [board for _, board, _ in boards])
        else:
            _show_boards(task, boards, all_variants)
            if figure is not None:
                print(f"figure saved in {figure}")
        if failed:
            raise RunError("\n".join(map(str, failed)))


def _show_boards(
    task: str, boards: Sequence[tuple[Task[Any], Mapping[str, Any], Sequence[Held]]], all_of: bool
) -> None:
    from trimtab.studies.engine import report as reports
    from trimtab.studies.engine.standing import overall

    print_rich_tables(*(reports.venue_table(board, board["budget"], terminal_width()) for _, board, _ in boards))
    if all_of:
        first, best = next((n, m.best) for n, m in boards[0][0].metrics.items() if m.best)
        values = [{held.who.name: held.values(first) for held in ran} for *_, ran in boards]
        print_rich_tables(reports.overall_table(task, overall(values, best or "max")))
    print("± is the half-width of the 95 % interval over seeds; surely: the whole interval of the paired difference")


def _papers(work: Task[Any], budget: Budget, methods: str) -> list[str]:
    """The papers that --methods names; of all that cannot enter it is said why, and not of the first alone."""
    from trimtab.catalog import UnknownNameError
    from trimtab.studies.engine import library

    slugs, problems = [slug.strip() for slug in methods.split(",")], []
    for slug in slugs:
        try:
            library.field_of(work, budget, [slug])
        except (UnknownNameError, library.NoStudyError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return slugs


def _work(
    kind: type[Task[Any]] | Task[Any], variant: str | None, settings: Sequence[str], own: Path | None, budget: Budget
) -> Task[Any]:
    """The variant of a task that the options ask for, on data that can be had."""
    from trimtab.data import load
    from trimtab.studies.engine import library

    work: type[Task[Any]] | Task[Any] = kind
    if variant is not None:
        work = library.find_variant(kind, variant)
    elif not settings and isinstance(kind, type) and (known := library.variants_of(kind)):
        work = next(iter(known.values()))
    if own is not None:
        if own.suffix != ".npz":
            raise ValueError(f"data must be an .npz file, got {own}")
        # What is wrong with the file is found before anything runs.
        shape = load(str(own.resolve())).in_shape
        settings = [*settings, f"dataset={own.resolve()}"]
    chosen = _settings(settings)
    found = library.variant(work, chosen)
    if own is not None and found.needs_images and len(shape) == 1:
        raise ValueError(
            f"x must be images, (n, height, width) or (n, channels, height, width), for {found.name}, "
            f"got rows of {shape[0]} numbers; tabular-classification and label-noise take those"
        )
    return found if "dataset" in chosen else _with_data_at_hand(found, budget)


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set wants NAME=VALUE, got {pair!r}")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def _with_data_at_hand(task: Task[Any], budget: Budget) -> Task[Any]:
    """The task on digits, which need no file, where its usual data cannot be had."""
    from trimtab.data import available, names

    dataset = getattr(task, "dataset", None)
    if dataset not in names() or dataset not in task.datasets(budget) or available(str(dataset)):
        return task
    stand_in = dataclasses.replace(task, dataset="digits")  # type: ignore[call-arg]
    print(f"{dataset} cannot be had on this machine: running on scikit-learn's digits instead", file=sys.stderr)
    return stand_in
