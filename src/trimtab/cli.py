"""The command `trimtab`: find papers, see what is known of them, re-run their claims, build the site.

Every command imports what it needs when it runs, so that those that only read the catalogue answer at once.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Never

import click
import typer

from trimtab import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from trimtab.catalog import Catalog, Paper
    from trimtab.studies.store import Store
    from trimtab.studies.study import Task

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
    **{"holds": "green", "partly": "yellow", "fails": "red", "not shown": "magenta"},
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
    except BrokenPipeError:
        # The reader (`head`, a pager) has gone; what is left in the buffer has nowhere to go.
        sys.stdout = None
        sys.exit(141)
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
    state: Annotated[str | None, typer.Option(help="Only papers that are planned, partial or works.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the papers, with the state of each."""
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
    _print_papers([paper for paper in papers if state in (None, states[paper.slug])], states, as_json)


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


def _print_papers(papers: Sequence[Paper], states: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        keys = ("slug", "area", "title", "year", "arxiv", "summary", "keywords", "use")
        print_json([{key: getattr(p, key) for key in keys} | {"state": states[p.slug]} for p in papers])
    elif papers:
        rows = ((p.slug, p.area, states[p.slug], p.title) for p in papers)
        print_table(("slug", "area", "state", "title"), rows, _COLOURS)


@app.command()
def show(slug: Annotated[str, typer.Argument(help="The paper's short name.")], as_json: AsJson = False) -> None:
    """Show what a paper does, where its parts are, and whether its claim holds."""
    from trimtab.catalog import UnknownPaperError

    catalog = _catalog()
    try:
        paper = catalog[slug]
    except UnknownPaperError as error:
        fail(str(error) if error.nearest else f"{error}; `trimtab search {slug}` may find it")
    card = _card(catalog, paper)
    if as_json:
        print_json(card)
    else:
        _print_card(card)


def _card(catalog: Catalog, paper: Paper) -> dict[str, Any]:
    from dataclasses import asdict

    from trimtab.catalog import CatalogError

    status = catalog.status(paper.slug)
    try:
        result = catalog.result(paper.slug)
    except CatalogError:
        result = None  # the status says so
    unjudged = {"text": paper.claim, **dict.fromkeys(("verdict", "effect", "interval", "seeds", "budget"))}
    return {
        **{"slug": paper.slug, "area": paper.area, "title": paper.title, "state": status.state},
        **asdict(paper),
        "url": paper.url,
        "missing": status.missing,
        "verdict": result["verdict"] if result else None,
        "stale": bool(result) and not catalog.is_fresh(result or {}),
        "claims": result["claims"] if result else [unjudged],
        "notes": result.get("notes", "") if result else "",
        "machine": result.get("machine") if result else None,
        "created": result.get("created") if result else None,
    }


def _print_card(card: Mapping[str, Any]) -> None:
    """The card as paragraphs of text; `typer.echo` leaves the colours out where the output is not a terminal."""
    import textwrap

    def line(text: str, indent: int = 0, **style: Any) -> None:
        room = " " * indent
        wrapped = textwrap.fill(text, 100, initial_indent=room, subsequent_indent=room, break_on_hyphens=False)
        typer.echo(typer.style(wrapped, **style))

    line(card["title"], bold=True)
    line(", ".join(filter(None, (*card["authors"], card["venue"] or str(card["year"]), card["url"]))), dim=True)
    line(f"{card['slug']} · {card['area']} · {card['state']}", fg=_COLOURS[card["state"]])
    for reason in card["missing"]:
        line(f"- {reason}", 2, dim=True)
    typer.echo()
    line(card["summary"])
    verdict = card["verdict"]
    typer.echo()
    line("Claim" + (f": {verdict}" if verdict else ""), bold=True, fg=_COLOURS.get(verdict))
    line(card["claim"], 2)
    for claim in card["claims"] if verdict else ():
        line(f"{claim['verdict']}: {claim['text']}", 2, fg=_COLOURS.get(claim["verdict"]))
        line(_numbers(claim), 4, dim=True)
    if card["notes"]:
        line(card["notes"], 2, dim=True)
    if card["use"]:
        typer.echo()
        line("Use", bold=True)
        for name in card["use"]:
            line(name, 2)
    for heading in ("related", "keywords", "peers"):
        if card[heading]:
            typer.echo()
            line(f"{heading.capitalize()}", bold=True)
            line(", ".join(card[heading]), 2)


def _numbers(claim: Mapping[str, Any]) -> str:
    """The measured effect of a judged claim, in one line."""
    effect, interval = claim["effect"], claim["interval"]
    parts = [] if effect is None else [f"effect {effect:.4g}"]
    if interval and None not in interval:
        parts.append(f"95 % interval {interval[0]:.4g} to {interval[1]:.4g}")
    parts.append(f"{claim['seeds']} seeds at budget {claim['budget']}")
    return ", ".join(parts) + (f" ({claim['reason']})" if claim.get("reason") else "")


Budgets = Annotated[
    str, typer.Option("--budget", help="smoke (seconds), laptop (minutes) or paper (the authors' scale).")
]
Seeds = Annotated[int | None, typer.Option("--seeds", help="Number of seeds; by default what each study asks for.")]
Jobs = Annotated[int | None, typer.Option("--jobs", help="Parallel runs; by default one for each core.")]
Backends = Annotated[str, typer.Option("--backend", help="loky (this machine), dask or ray.")]
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
    from trimtab.studies.library import NoStudyError
    from trimtab.studies.runner import BackendError, RunError
    from trimtab.studies.store import StoreError

    expected = (UnknownNameError, NoStudyError, StoreError, RunError, BackendError, ImportError, ValueError)
    try:
        yield
    except (DataNotFoundError, DataCorruptError, *expected) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {error.filename}: {error.strerror}")
    except KeyboardInterrupt as error:
        # typer would end without a word
        raise _Interrupted(str(error) or "interrupted") from None


def _console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for every column in a file or a pipe."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=180)


def _open_store(path: Path | None) -> Store:
    from trimtab.studies.store import Store, default_path

    return Store(path or default_path())


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

        from trimtab.studies import library, report
        from trimtab.studies.outcome import write_json
        from trimtab.studies.runner import Plan, RunError, run_studies

        if sum((bool(slugs), area is not None, everything)) != 1:
            raise ValueError("name studies to run, or give --area or --all")
        names = slugs or [
            s for s in library.slugs() if everything or s in {p.slug for p in _catalog().area(area or "")}
        ]
        studies = [library.find_study(name) for name in dict.fromkeys(names)]
        if not studies:
            raise ValueError(f"area {area} has no study yet")
        plan = Plan(budget, seeds, jobs, backend, address, device, rerun)  # type: ignore[arg-type]
        _must_be_writable(results)
        outcomes, failed = [], list[RunError]()
        # One by one where results are written, so that each is there as soon as it can be, whatever comes after it.
        groups = [studies] if results is None else [[study] for study in studies]
        with _open_store(store) as kept:
            for group in groups:
                try:
                    outcomes += run_studies(group, kept, plan, Console(stderr=True))
                except RunError as error:
                    failed.append(error)
                    continue
                if results is not None:
                    write_json(outcomes[-1].as_json(), results / f"{group[0].paper}.json")
        if failed:
            raise RunError("\n".join(map(str, failed)))
        if as_json:
            print_json([outcome.as_json() for outcome in outcomes])
            return
        console = _console()
        for outcome in outcomes:
            console.print(report.outcome_table(outcome))
            for table in report.task_tables(outcome):
                console.print(table)


@app.command()
def compare(
    task: Annotated[str, typer.Argument(help="The task, such as label-noise.")],
    methods: Annotated[str | None, typer.Option(help="Only these papers, separated by commas.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the task, such as rate=0.2; may be repeated.")
    ] = None,
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

        from trimtab.studies import library, report
        from trimtab.studies.figure import draw
        from trimtab.studies.outcome import write_json
        from trimtab.studies.runner import Plan, run_arms

        plan = Plan(budget, seeds, jobs, backend, address, device, rerun)  # type: ignore[arg-type]
        work = library.variant(library.find_task(task), _settings(settings or []))
        work = _with_data_at_hand(work, chosen=any(s.startswith("dataset=") for s in settings or []))
        arms = library.contestants(work, methods.split(",") if methods else None)
        if not arms:
            raise ValueError(f"no study has an arm on task {task} yet")
        for path in (results, figure.parent if figure else None):
            _must_be_writable(path)
        with _open_store(store) as kept:
            runs = run_arms({n: arm for n, (_, arm) in arms.items()}, kept, plan, Console(stderr=True), work.name)
        board = report.leaderboard_json(work, arms, runs, budget)
        if figure is not None:
            draw(board, figure)
        if results is not None:
            write_json(board, results / "leaderboards" / f"{work.name}.json")
        if as_json:
            print_json(board)
            return
        _console().print(report.arms_table(runs, work.metrics, f"{work.name}: {work!r}"))
        print("± is the half-width of the 95 % interval over seeds" + (f"; figure saved in {figure}" if figure else ""))


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--set wants NAME=VALUE, got {pair!r}")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def _with_data_at_hand(task: Task, chosen: bool) -> Task:
    """The task on digits, which need no file, where its usual data cannot be had; a data set asked for stays."""
    from trimtab.data import available

    name = getattr(task, "dataset", None)
    if name is None or chosen or available(name):
        return task
    print(f"{name} cannot be had on this machine: running on scikit-learn's digits instead", file=sys.stderr)
    return dataclasses.replace(task, dataset="digits")  # type: ignore[call-arg]


@app.command()
def report(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers; by default all that have stored runs.")] = None,
    budget: Budgets = "laptop",
    store: StorePath = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="File to write every stored number into.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder to save a figure of each study in.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is stored, without running anything; results of earlier code are shown as stale."""
    with _evidence():
        import csv as csv_format

        from trimtab.studies import library
        from trimtab.studies import report as reports
        from trimtab.studies.figure import draw

        studies = [library.find_study(name) for name in slugs or library.slugs()]
        with _open_store(store) as kept:
            runs = kept.all()
        held = {study.paper: reports.stored(study, runs, budget) for study in studies}
        held = {slug: part for slug, part in held.items() if slugs or part.fresh or part.stale}
        outcomes = [part.outcome for part in held.values() if part.outcome is not None]
        if csv is not None:
            _must_be_writable(csv.parent)
            arms = {f"{study.paper}: {name}": arm for study in studies for name, arm in study.arms.items()}
            table = reports.rows(runs, arms)
            with csv.open("w", newline="", encoding="utf-8") as file:
                writer = csv_format.DictWriter(file, fieldnames=list(table[0]) if table else ["arm"])
                writer.writeheader()
                writer.writerows(table)
        if figures is not None:
            _must_be_writable(figures)
            for outcome in outcomes:
                draw(outcome.as_json(), figures / f"{outcome.study.paper}.png")
        if as_json:
            print_json([outcome.as_json() | {"stale_runs": held[outcome.study.paper].stale} for outcome in outcomes])
            return
        console = _console()
        for slug, part in held.items():
            if part.outcome is not None:
                console.print(reports.outcome_table(part.outcome))
            state = f"{part.fresh} fresh runs" + (
                f", {part.stale} stale (the code has changed since)" if part.stale else ""
            )
            console.print(f"{slug}: {state}" + ("" if part.outcome else "; no seed is complete"), highlight=False)
        if not held:
            console.print(f"nothing is stored at budget {budget}; `trimtab run` stores runs")


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
