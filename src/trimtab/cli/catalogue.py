"""`trimtab list` and `trimtab search`: finding papers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.errors import fail
from trimtab.cli.options import AsJson
from trimtab.cli.printing import COLOURS, print_json, print_table

if TYPE_CHECKING:
    from trimtab.catalog import Catalog, Paper


def read_catalog() -> Catalog:
    """The catalogue, its tables read; a broken one ends the command."""
    from trimtab.catalog import Catalog, CatalogError

    catalog = Catalog()
    try:
        catalog.papers  # noqa: B018  # read here, so that a broken table is reported once and for all commands
    except CatalogError as error:
        fail(str(error))
    return catalog


def list_papers(
    area: Annotated[str | None, typer.Option(help="Only this area, such as losses.")] = None,
    state: Annotated[
        str | None, typer.Option(metavar="works|partial|planned", help="Only papers in this state.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those too that do not work yet.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the papers that work; with --all the planned ones too."""
    from trimtab.catalog import STATES, UnknownNameError

    catalog = read_catalog()
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
        if others:
            verb = "is" if others == 1 else "are"
            print(f"{others} more {verb} planned or in part there: --all lists them", file=sys.stderr)


def search(
    query: Annotated[list[str], typer.Argument(help="Words, such as: noisy labels")],
    limit: Annotated[int, typer.Option(min=1, help="How many papers to show at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Search the papers, best match first; misspellings are forgiven."""
    catalog = read_catalog()
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
        print_table(("slug", "area", "state", "title"), rows, COLOURS)
