"""`trimtab show`: what is known of one paper."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import catalogue
from trimtab.cli.errors import fail
from trimtab.cli.options import AsJson
from trimtab.cli.printing import COLOURS, page_width, print_heading, print_json, print_paragraph

if TYPE_CHECKING:
    from trimtab.catalog import Catalog, Paper


def show(
    name: Annotated[str, typer.Argument(help="A paper's short name, or a public name such as ELR or losses.ELR.")],
    as_json: AsJson = False,
) -> None:
    """Show what is known of a paper.

    What it does and when not to use it, whether its claim holds, where it stands, and how its parts are called.
    """
    from trimtab.catalog import UnknownPaperError

    catalog = catalogue.read_catalog()
    try:
        paper = catalog.find(name)
    except UnknownPaperError as error:
        fail(str(error) if error.nearest or ";" in str(error) else f"{error}; nothing here is near to it in meaning")
    card = _card(catalog, paper)
    if as_json:
        print_json(card)
    else:
        _print_card(card)


def _card(catalog: Catalog, paper: Paper) -> dict[str, Any]:
    from trimtab.site.boards import judged_first
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
        "standing": list(reports.standing_sentences(judged_first(boards, result), paper.slug)),
    }


def _print_code(code: str) -> None:
    for line in code.splitlines():
        typer.echo(f"  {line}".rstrip())


_BUILT_FROM = {"paper": "built from the paper", "abstract": "built from the abstract alone"}
# Standings shown; --json has all.
_SHOWN = 3


def _print_card(card: Mapping[str, Any]) -> None:
    """The card as paragraphs of text, what one asks first at the top."""
    from trimtab.site.fitting import WIDTH, fitted, wrapped

    room = min(WIDTH, page_width() - 2)
    print_paragraph(card["title"], bold=True)
    origin = (*card["authors"], card["venue"] or str(card["year"]), card["url"])
    print_paragraph(", ".join(filter(None, origin)), dim=True)
    flags = [card["slug"], card["area"], card["state"], *filter(None, [_BUILT_FROM.get(card["source"])])]
    print_paragraph(" · ".join(flags), fg=COLOURS[card["state"]])
    for reason in card["missing"]:
        print_paragraph(f"- {reason}", 2, dim=True)
    typer.echo()
    print_paragraph(card["summary"])
    if card["avoid"]:
        print_paragraph(f"Not when {card['avoid']}.", dim=True)
    verdict, claims = card["verdict"], card["claims"]
    print_heading("Claim" + (f": {verdict}" if verdict else ", not measured yet"), fg=COLOURS.get(verdict))
    if verdict:
        print_paragraph(card["headline"]["text"], 2)
        print_paragraph(card["measured"], 2, bold=True)
        if claims:
            print_paragraph(f"{card['further']} (below)", 2)
    else:
        print_paragraph(card["claim"], 2)
    if card["standing"]:
        print_heading("Standing")
        for sentence in card["standing"][:_SHOWN]:
            print_paragraph(sentence, 2)
        if (others := len(card["standing"]) - _SHOWN) > 0:
            print_paragraph(f"and {others} more (--json)", 2, dim=True)
    if card["signatures"]:
        print_heading("Use")
        for text in card["signatures"]:
            _print_code(wrapped(text, room))
    if card["example"]:
        print_heading("Example")
        _print_code(fitted(card["example"], room))
    if claims:
        print_heading("Further claims")
        venues = {held["venue"] for held in (card["headline"], *claims)}
        for claim in claims:
            where = f", {claim['venue']}" if len(venues) > 1 else ""
            print_paragraph(f"{claim['verdict']}: {claim['text']}{where} ({claim['measured']})", 2)
    if card["notes"]:
        print_heading("Notes")
        print_paragraph(card["notes"], 2)
    for heading in ("related", "keywords", "peers"):
        if card[heading]:
            print_heading(heading.capitalize())
            print_paragraph(", ".join(card[heading]), 2)
