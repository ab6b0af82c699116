"""The command `trimtab`: find papers, see what is known of them, re-run their claims, build the site.

Every command imports what it needs when it runs, so that those that only read the catalogue answer at once.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Never

import click
import typer

from trimtab import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from trimtab.catalog import Catalog, Paper
    from trimtab.studies.engine.library import Field
    from trimtab.studies.engine.runner import Plan, Ran
    from trimtab.studies.engine.store import Store
    from trimtab.studies.engine.study import Budget, Task

app = typer.Typer(
    name="trimtab",
    help="Published methods that steer large models, and whether their papers' claims hold.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    suggest_commands=False,  # click suggests them already
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_COLOURS = {
    **{"works": "green", "partial": "yellow", "planned": "bright_black"},
    **{"holds": "green", "fails": "red", "not shown": "magenta"},
}


def main() -> Never:
    """Runs the command line and exits; what a user can put right is one line on stderr and a non-zero exit."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        message, code = error.format_message(), error.exit_code
    except (KeyboardInterrupt, click.Abort):
        message, code = "interrupted", 130
    except (BrokenPipeError, SystemExit) as ended:
        if isinstance(ended, SystemExit) and type(sys.stdout).__name__ != "PacifyFlushWrapper":
            raise
        # The reader (`head`, a pager) has gone, which click notes by this wrapper; nobody waits for the rest.
        sys.stdout = None
        sys.exit(0)
    print(f"trimtab: {message}", file=sys.stderr)
    sys.exit(code)


class _Interrupted(click.ClickException):
    exit_code = 130


def fail(message: str) -> Never:
    """Ends the command with one line on stderr."""
    raise click.ClickException(" ".join(message.split())) from None


def print_json(value: object) -> None:
    """Prints a value as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], styles: Mapping[str, str] | None = None) -> None:
    """Prints rows: as a table on a terminal, with tabs between the cells and no heading elsewhere.

    Args:
        columns: the headings.
        rows: the cells, as many in each as there are headings.
        styles: cell -> the rich style it is shown in.
    """
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell, style=(styles or {}).get(cell, "")) for cell in row))
    Console().print(table)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of the command as a whole."""


def _catalog() -> Catalog:
    from trimtab.catalog import Catalog, CatalogError

    catalog = Catalog()
    try:
        catalog.papers  # noqa: B018  # read here, so that a broken table is reported once and for all commands
    except CatalogError as error:
        fail(str(error))
    return catalog


@app.command("list")
def list_papers(
    area: Annotated[str | None, typer.Option(help="Only this area.")] = None,
    state: Annotated[
        str | None, typer.Option(metavar="works|partial|planned", help="Only papers in this state.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those too that do not work yet.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the papers that work; with --all the planned ones too."""
    from trimtab.catalog import STATES, UnknownNameError

    catalog = _catalog()
    try:
        if state is not None and state not in STATES:
            raise UnknownNameError("state", state, STATES)
        papers = list(catalog) if area is None else catalog.area(area)
    except UnknownNameError as error:
        known = STATES if error.kind == "state" else catalog.areas
        fail(str(error) if error.nearest else f"{error}; there are {', '.join(known)}")
    states = {paper.slug: catalog.status(paper.slug).state for paper in papers}
    wanted = STATES if everything and state is None else (state or "works",)
    _print_papers([paper for paper in papers if states[paper.slug] in wanted], states, as_json)
    if sys.stderr.isatty() and wanted == ("works",):
        others = sum(found != "works" for found in states.values())
        print(f"{others} more are planned or in part there: --all lists them", file=sys.stderr)


@app.command()
def search(
    query: Annotated[list[str], typer.Argument(help="Words, such as: noisy labels")],
    limit: Annotated[int, typer.Option(min=1, help="How many papers to show at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Search the papers, best match first; misspellings are forgiven."""
    catalog = _catalog()
    words = " ".join(query)
    try:
        hits = catalog.search(words, limit)
    except ValueError as error:
        fail(str(error))
    if hits.corrections:
        replaced = ", ".join(f"{new!r} for {old!r}" for old, new in hits.corrections.items())
        print(f"searched {replaced}", file=sys.stderr)
    if not hits.papers:
        print(f"no paper matches {words!r}", file=sys.stderr)
    _print_papers(hits.papers, {paper.slug: catalog.status(paper.slug).state for paper in hits.papers}, as_json)
    if not hits.papers:
        raise typer.Exit(1)


def _print_papers(papers: Sequence[Paper], states: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        keys = ("slug", "area", "title", "year", "arxiv", "summary", "keywords", "use")
        print_json([{key: getattr(p, key) for key in keys} | {"state": states[p.slug]} for p in papers])
    elif papers:
        rows = ((p.slug, p.area, states[p.slug], p.title) for p in papers)
        print_table(("slug", "area", "state", "title"), rows, _COLOURS)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A paper's short name, or a public name such as ELR or losses.ELR.")],
    as_json: AsJson = False,
) -> None:
    """Show what a paper does, how its parts are used, whether its claim holds, and where it stands."""
    from trimtab.catalog import UnknownPaperError

    catalog = _catalog()
    try:
        paper = catalog.find(name)
    except UnknownPaperError as error:
        fail(str(error) if error.nearest or ";" in str(error) else f"{error}; `trimtab search {name}` may find it")
    card = _card(catalog, paper)
    if as_json:
        print_json(card)
    else:
        _print_card(card)


def _card(catalog: Catalog, paper: Paper) -> dict[str, Any]:
    from trimtab.site.docstrings import example, signature
    from trimtab.studies.engine import report as reports

    status = catalog.status(paper.slug)
    outcomes, _ = catalog.outcomes()
    result = outcomes.get(paper.slug)
    boards, problems = reports.read_boards(catalog.results)
    for problem in problems:
        print(f"trimtab: {problem}", file=sys.stderr)
    measured = {
        "verdict": result["headline"]["verdict"] if result else None,
        "measured": reports.effect_sentence(result, result["headline"]) if result else None,
        "headline": result["headline"] if result else None,
        "claims": [{**claim, "measured": reports.effect_sentence(result, claim)} for claim in result["claims"]]
        if result
        else [],
        "further": reports.claims_sentence(result) if result else "",
    }
    made = {key: result[key] if result else None for key in ("budget", "notes", "machine", "created")}
    return {
        **dataclasses.asdict(paper),
        "url": paper.url,
        "state": status.state,
        "missing": status.missing,
        "signatures": list(filter(None, map(signature, paper.use))),
        "example": next(filter(None, map(example, paper.use)), ""),
        **measured,
        **made,
        "standing": list(reports.standing_sentences(boards, paper.slug)),
    }


def _line(text: str, indent: int = 0, **style: Any) -> None:
    """A paragraph, wrapped to the terminal; `typer.echo` leaves the colours out where the output is not one."""
    import shutil
    import textwrap

    room, width = " " * indent, min(100, shutil.get_terminal_size((100, 24)).columns)
    wrapped = textwrap.fill(text, width, initial_indent=room, subsequent_indent=room, break_on_hyphens=False)
    typer.echo(typer.style(wrapped, **style))


_BUILT_FROM = {"paper": "built from the paper", "abstract": "built from the abstract alone"}


def _print_card(card: Mapping[str, Any]) -> None:
    """The card as paragraphs of text, what one asks first at the top."""
    _line(card["title"], bold=True)
    _line(", ".join(filter(None, (*card["authors"], card["venue"] or str(card["year"]), card["url"]))), dim=True)
    flags = [card["slug"], card["area"], card["state"], *filter(None, [_BUILT_FROM.get(card["source"])])]
    _line(" · ".join(flags), fg=_COLOURS[card["state"]])
    for reason in card["missing"]:
        _line(f"- {reason}", 2, dim=True)
    typer.echo()
    _line(card["summary"])
    verdict = card["verdict"]
    _heading("Claim" + (f": {verdict}" if verdict else ", not measured yet"), fg=_COLOURS.get(verdict))
    if verdict:
        _line(card["headline"]["text"], 2)
        _line(card["measured"], 2, bold=True)
        for claim in card["claims"]:
            where = (
                f", {claim['venue']}"
                if len({held["venue"] for held in (card["headline"], *card["claims"])}) > 1
                else ""
            )
            _line(f"{claim['verdict']}: {claim['text']}{where} ({claim['measured']})", 4, dim=True)
        if card["further"]:
            _line(card["further"], 2)
    else:
        _line(card["claim"], 2)
    if card["standing"]:
        _heading("Standing")
        for sentence in card["standing"]:
            _line(sentence, 2)
    if card["signatures"]:
        _heading("Use")
        for text in card["signatures"]:
            _line(text, 2)
    if card["example"]:
        _heading("Example")
        for line in card["example"].splitlines():
            typer.echo(f"  {line}".rstrip())
    if card["notes"]:
        _heading("Notes")
        _line(card["notes"], 2)
    for heading in ("related", "keywords", "peers"):
        if card[heading]:
            _heading(heading.capitalize())
            _line(", ".join(card[heading]), 2)


def _heading(text: str, **style: Any) -> None:
    typer.echo()
    _line(text, bold=True, **style)


Budgets = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="smoke|laptop|paper",
        help="Seconds, to see that it runs; minutes on two cores; or the authors' scale.",
    ),
]
Seeds = Annotated[int | None, typer.Option("--seeds", help="Number of seeds; by default what each task asks for.")]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Parallel runs; by default one for each core.")]
Backends = Annotated[
    str, typer.Option("--backend", metavar="loky|dask|ray", help="Processes of this machine, or a cluster.")
]
Address = Annotated[str | None, typer.Option("--address", help="Scheduler of a running Dask or Ray cluster.")]
Device = Annotated[str, typer.Option("--device", help="A torch device, such as cuda.")]
StorePath = Annotated[
    Path | None, typer.Option("--store", help="File that keeps finished runs; by default one for this user.")
]
Rerun = Annotated[bool, typer.Option("--rerun", help="Run again what is stored.")]
ResultsFolder = Annotated[Path | None, typer.Option("--results", help="Folder to write the outcome into, as JSON.")]


@contextmanager
def _evidence() -> Iterator[None]:
    """What can go wrong in running studies, each as one line."""
    from trimtab.catalog import UnknownNameError
    from trimtab.data import DataCorruptError, DataNotFoundError
    from trimtab.studies.engine.library import NoStudyError
    from trimtab.studies.engine.runner import BackendError, RunError
    from trimtab.studies.engine.store import StoreError

    expected = (UnknownNameError, NoStudyError, StoreError, RunError, BackendError, ImportError, TypeError, ValueError)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            yield
    except (DataNotFoundError, DataCorruptError, *expected) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {error.filename}: {error.strerror}")
    except KeyboardInterrupt as error:
        # typer would end without a word
        raise _Interrupted(str(error) or "interrupted") from None


def _warn(message: Warning | str, kind: type[Warning], file: str, *_: object, **__: object) -> None:
    """What the library itself warns of, in one line; others' warnings are not for the user of a command."""
    if kind is UserWarning and "trimtab" in Path(file).parts:
        print(f"trimtab: {' '.join(str(message).split())}", file=sys.stderr)


def _width() -> int | None:
    """Columns of the terminal; None for a file or a pipe, which take all there is."""
    import shutil

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _print_rich(*tables: Table) -> None:
    """Prints tables: as wide as the terminal; in a file or a pipe without a frame, each row on one line."""
    from rich import box
    from rich.console import Console

    if sys.stdout.isatty():
        for table in tables:
            table.box = box.SIMPLE_HEAD
            Console().print(table)
        return
    console = Console(width=1000)
    with console.capture() as text:
        for table in tables:
            table.box, table.pad_edge = None, False
            console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def _open_store(path: Path | None, *, read_only: bool = False) -> Store:
    from trimtab.studies.engine.store import Store, default_path

    return Store(path or default_path(), read_only=read_only)


def _must_be_writable(folder: Path | None) -> None:
    """Find out before hours of work, not after."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@app.command()
def run(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers whose studies to run.")] = None,
    area: Annotated[str | None, typer.Option(help="All studies of an area.")] = None,
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
    """Run studies and judge their claims; what is stored already is not run again."""
    with _evidence():
        from rich.console import Console

        from trimtab.studies.engine import library
        from trimtab.studies.engine.outcome import Outcome, run_study, write_json
        from trimtab.studies.engine.runner import Plan, RunError

        if sum((bool(slugs), area is not None, everything)) != 1:
            raise ValueError("name studies to run, or give --area or --all")
        plan = Plan(budget, seeds, jobs, backend, address, device, rerun)  # type: ignore[arg-type]
        inside = None if area is None else {paper.slug for paper in _catalog().area(area)}
        names = slugs or [slug for slug in library.slugs() if inside is None or slug in inside]
        studies = [library.find_study(name) for name in dict.fromkeys(names)]
        if not studies:
            raise ValueError(f"area {area} has no study yet")
        _must_be_writable(results)
        outcomes, failed = list[Outcome](), list[RunError]()
        with _open_store(store) as kept:
            for study in studies:
                try:
                    outcome = run_study(study, kept, plan, Console(stderr=True))
                except RunError as error:
                    failed.append(error)
                    continue
                outcomes.append(outcome)
                for who, why in outcome.skipped:
                    print(f"{study.paper}: {who.name} was skipped: {why}", file=sys.stderr)
                if results is not None:
                    # At once, so that each result is there as soon as it can be, whatever comes after it.
                    write_json(outcome.as_json(), results / f"{study.paper}.json")
                    for task in study.on:
                        _write_board(task, library.field_of(task, plan.budget), kept, plan, results)
        if outcomes and as_json:
            print_json([outcome.as_json() for outcome in outcomes])
        elif outcomes:
            _show_outcomes([outcome.as_json() for outcome in outcomes])
        if failed:
            raise RunError("\n".join(map(str, failed)))


def _show_outcomes(results: Sequence[Mapping[str, Any]]) -> None:
    from trimtab.studies.engine import report as reports

    for result in results:
        venues = [venue for venue in result["venues"] if venue["arms"]]
        tables = (reports.venue_table(venue, result["budget"], _width()) for venue in venues)
        _print_rich(reports.claims_table(result), *tables)
        verdict, measured = result["headline"]["verdict"], reports.effect_sentence(result, result["headline"])
        print(f"{result['paper']}: the headline {_verb(verdict)}: {measured}")


def _verb(word: str) -> str:
    return f"is {word}" if word == "not shown" else word


def _write_board(task: Task[Any], field: Field, kept: Store, plan: Plan, results: Path) -> None:
    """The leaderboard of a variant, of those whose runs are all stored; the others are not there yet."""
    from trimtab.studies.engine.outcome import board_json, board_path, write_json
    from trimtab.studies.engine.runner import stored

    ran = [found for who in field.contestants if (found := stored(who, kept, plan)) is not None]
    if ran:
        write_json(board_json(task, ran, plan.budget, field.skipped), board_path(task, results))


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks: what each is, its variants, who is on it, and how long comparing on it takes."""
    with _evidence():
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
            typer.echo(typer.style(task["name"], bold=True) + f": {task['about']}")
            for heading in ("variants", "references", "papers"):
                _line(f"{heading}: {'; '.join(task[heading])}", 2)
            minutes = max(1, round(task["minutes"]))
            time = f"{minutes} minute{'s' * (minutes > 1)}"
            _line(f"about {time} of one core for a variant at the laptop budget", 2, dim=True)


@app.command()
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
    """Run the methods of all papers on one task, side by side, and show the leaderboard."""
    with _evidence():
        from rich.console import Console

        from trimtab.studies.engine import library
        from trimtab.studies.engine.figure import draw
        from trimtab.studies.engine.outcome import board_json, board_path, write_json
        from trimtab.studies.engine.runner import Plan, RunError, run_contestants, stored

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
        fields = [
            library.mixture(work, budget, combine.split("+"))  # type: ignore[arg-type]
            if combine
            else library.field_of(work, budget, methods.split(",") if methods else None)  # type: ignore[arg-type]
            for work in works
        ]
        for path in (results, figure.parent if figure else None):
            _must_be_writable(path)
        boards, failed = [], list[RunError]()
        with _open_store(store) as kept:
            for work, field in zip(works, fields, strict=True):
                for name, why in field.skipped.items():
                    print(f"{name} was skipped: {why}", file=sys.stderr)
                if not field.contestants:
                    print(f"{work.label}: nobody can run here", file=sys.stderr)
                    continue
                title = f"{work.name}, {work.label}"
                try:
                    ran = run_contestants(field.contestants, kept, plan, Console(stderr=True), title)
                except RunError as error:
                    failed.append(error)
                    held = [stored(who, kept, plan) for who in field.contestants]
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


def _show_boards(task: str, boards: Sequence[tuple[Task[Any], Mapping[str, Any], Sequence[Ran]]], all_of: bool) -> None:
    from trimtab.studies.engine import report as reports
    from trimtab.studies.engine.standing import overall

    _print_rich(*(reports.venue_table(board, board["budget"], _width()) for _, board, _ in boards))
    if all_of:
        first, best = next((n, m.best) for n, m in boards[0][0].metrics.items() if m.best)
        values = [{held.who.name: held.values(first) for held in ran} for *_, ran in boards]
        _print_rich(reports.overall_table(task, overall(values, best or "max")))
    print("± is the half-width of the 95 % interval over seeds; surely: the whole interval of the paired difference")


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
        load(str(own.resolve()))  # what is wrong with the file is found before anything runs
        settings = [*settings, f"dataset={own.resolve()}"]
    chosen = _settings(settings)
    found = library.variant(work, chosen)
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


@app.command()
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
    """Show what is stored, without running anything; runs of earlier code or data are counted as stale."""
    with _evidence():
        from trimtab.studies.engine import library
        from trimtab.studies.engine.figure import draw
        from trimtab.studies.engine.inventory import Inventory
        from trimtab.studies.engine.outcome import contestants, stored_outcome
        from trimtab.studies.engine.runner import Plan

        plan = Plan(budget, seeds, device=device)  # type: ignore[arg-type]
        studies = [library.find_study(name) for name in slugs or library.slugs()]
        found, held = [], {}
        with _open_store(store, read_only=True) as kept:
            inventory = Inventory(kept.all(), device)
            for study in studies:
                count = inventory.held(contestants(study), plan.budget)
                if slugs or count.fresh or count.stale:
                    held[study.paper] = count
                    if (outcome := stored_outcome(study, kept, plan)).ran:
                        found.append(outcome.as_json() | {"stale_runs": count.stale})
        if csv is not None:
            _write_csv(csv, inventory.rows(library.everybody(studies)))
        if figures is not None:
            _must_be_writable(figures)
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
            print(f"nothing is stored at budget {budget}; `trimtab run` stores runs")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import csv

    _must_be_writable(path.parent)
    columns = ("paper", "task", "variant", "arm", "seed", "metric", "value", "budget", "state")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@app.command()
def site(
    out: Annotated[Path, typer.Option(help="Folder of the built site.")] = Path("site"),
    results: Annotated[
        Path | None, typer.Option(help="Folder of results; by default the committed ones.", show_default=False)
    ] = None,
) -> None:
    """Build the site: a card per paper, a page per area, the leaderboards."""
    from trimtab.catalog import Catalog, CatalogError

    catalog = _catalog() if results is None else Catalog(results)
    try:
        from trimtab.site import build

        build(out, catalog)
    except (ImportError, OSError, CatalogError) as error:
        fail(f"the site cannot be built in {out}: {error}" if isinstance(error, OSError) else str(error))
    print(f"{out / 'index.html'}\nread it with: python -m http.server --bind 127.0.0.1 --directory {out}")


if __name__ == "__main__":
    main()
