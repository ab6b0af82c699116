"""The leaderboards, and which method for which data; both read the files that the command line writes."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trimtab import sources
from trimtab.catalog import Catalog, Paper
from trimtab.site.text import badge, figure, front_matter, plain, table
from trimtab.studies.engine.report import (
    effect_sentence,
    mean_and_interval,
    ranked,
    setting_text,
    shown_metrics,
    venue_heading,
)
from trimtab.studies.engine.wording import label

Data = Mapping[str, Any]

# Of those who are surely better, as many are named: the first by rank.
_NAMED = 3


def linked(name: str, arm: Data, catalog: Catalog, base: str) -> str:
    """A contestant, with links to the papers that it stands for."""
    slugs = [slug for slug in arm["paper"].split("+") if slug in catalog.papers]
    links = ", ".join(f"[{plain(slug)}]({base}{catalog[slug].area}/{slug}.md)" for slug in slugs)
    return plain(name) + (f" <small>{links}</small>" if links else "")


def _unbroken(number: str) -> str:
    """A number that stays on one line with its interval and its unit."""
    return plain(number).replace(" ", "&nbsp;")


def venue_table(venue: Data, catalog: Catalog | None = None, base: str = "") -> str:
    """Contestants by their numbers, the best first; with ranks and who is surely ahead on a leaderboard."""
    standing = venue.get("standing")
    names = list(standing) if standing else ranked(venue)
    shown = shown_metrics(venue)
    chosen = any(arm["setting"] for arm in venue["arms"].values())
    heads = ["contestant", *(plain(venue["metrics"][name]["label"]) for name in shown)]
    heads = ["rank"] * bool(standing) + heads + ["chosen setting"] * chosen + ["surely behind"] * bool(standing)
    rows = []
    for name in names:
        arm = venue["arms"][name]
        cells = [linked(name, arm, catalog, base) if catalog else plain(name)]
        cells += [_unbroken(mean_and_interval(arm["metrics"].get(m, ()), venue["metrics"][m])) for m in shown]
        cells += [plain(setting_text(arm))] if chosen else []
        if standing:
            cells = [str(standing[name]["rank"]), *cells, plain(_some(standing[name]["behind"]))]
        rows.append(cells)
    return table(heads, rows)


def _some(names: Sequence[str]) -> str:
    """Who is surely ahead of a contestant: the first by name, the others by number."""
    others = len(names) - _NAMED
    return ("; ".join(names[:_NAMED]) or "nobody") + (f" and {others} more" if others > 0 else "")


def file_of(board: Data) -> str:
    """The name of a leaderboard's picture, without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", f"{board['task']} {board['variant']}".lower()).strip("-")


def _anchor(board: Data) -> str:
    """Where a variant stands on the page of its task."""
    return re.sub(r"[^a-z0-9]+", "-", board["variant"].lower()).strip("-") or "variant"


def page_of(task: str) -> str:
    """The name of a task's page, without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", task.lower()).strip("-")


def by_task(boards: Iterable[Data]) -> dict[str, list[Data]]:
    """Task -> its leaderboards that have somebody on them."""
    found: dict[str, list[Data]] = {}
    for board in boards:
        if board["arms"] and shown_metrics(board):
            found.setdefault(board["task"], []).append(board)
    return found


def over_bytes(board: Data) -> Data | None:
    """A leaderboard with its curves over megabytes, or None where nobody counts them."""
    # It loads NumPy and torch, which the command line's cards do without.
    from trimtab.studies.engine.figure import against

    weighed = [name for name, metric in board["metrics"].items() if label(metric)[1] == "MB"]
    return against(board, weighed[0]) if weighed else None


def judged_first(boards: Iterable[Data], result: Data | None) -> list[Data]:
    """The leaderboard of a study's headline first, then those that it claims most about.

    On each, the contestant that a claim is about stands before the others.
    """
    claims = [result["headline"], *result["claims"]] if result else []
    arms = list(dict.fromkeys(claim["arm"] for claim in claims))
    counts = Counter(claim["venue"] for claim in claims[1:])
    first = [claim["venue"] for claim in claims[:1]]
    venues = list(dict.fromkeys([*first, *(venue for venue, _ in counts.most_common())]))

    def place(names: Sequence[str], name: str) -> int:
        return names.index(name) if name in names else len(names)

    return [
        {**board, "arms": dict(sorted(board["arms"].items(), key=lambda held: place(arms, held[0])))}
        for board in sorted(boards, key=lambda board: place(venues, board["title"]))
    ]


def about(task: str) -> str:
    """What a task is, from the first line of its module."""
    path = sources.module_file(f"trimtab.studies.tasks.{re.sub('[^a-z0-9]+', '_', task)}")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path else None
    return (text or "").partition("\n")[0]


def leaderboards(boards: Sequence[Data]) -> Iterator[str]:
    """The page that lists the tasks."""
    yield front_matter("Leaderboards", hide=["toc"])
    yield "# Leaderboards"
    yield (
        "One for each task and variant. Every method that can enter does, on the same seeds, at the setting that the "
        "same search on validation data found for it. `trimtab compare TASK` runs them on your machine, with "
        "`--data mine.npz` on your data."
    )
    tasks = by_task(boards)
    if not tasks:
        yield "Nothing is measured yet."
        return
    rows = []
    for task, held in tasks.items():
        leaders = "; ".join(f"{plain(b['variant'])}: {plain(next(iter(b['standing'])))}" for b in held)
        rows.append((f"[**{plain(task)}**]({page_of(task)}.md)", plain(about(task)), leaders))
    yield table(("task", "what it is", "first on each variant"), rows)


def task_page(task: str, boards: Sequence[Data], catalog: Catalog) -> Iterator[str]:
    """The leaderboards of a task."""
    # The tables are wide: the links to variants stand above them and not beside.
    yield front_matter(task, hide=["toc"])
    yield f"# {plain(task)}"
    yield plain(about(task))
    if len(boards) > 1:
        places = [f"[{plain(board['variant'])}](#{_anchor(board)})" for board in boards]
        yield f"Variants: {', '.join(places)}."
    for board in boards:
        yield f"## {plain(board['variant'])} {{ #{_anchor(board)} }}"
        yield plain(venue_heading(board, board["budget"])) + "."
        yield figure(f"{file_of(board)}.svg", f"{task}, {board['variant']}", "Mean and 95 % interval over seeds.")
        if over_bytes(board):
            yield figure(
                f"{file_of(board)}-bytes.svg",
                f"{task}, {board['variant']}, by data sent",
                "The same over what clients and server had sent by then: the first eight by rank, measured over a "
                "whole run and spread evenly over its rounds.",
            )
        yield venue_table(board, catalog, "../")
        if board["skipped"]:
            skipped = "; ".join(f"{name}: {why}" for name, why in board["skipped"].items())
            yield plain(f"Not there: {skipped}") + "."
    yield (
        "± is the half-width of the 95 % interval over seeds. A contestant is surely behind those who are better with "
        "the whole 95 % interval of the paired difference; the first three are named.\n{ .byline }"
    )


def choose(catalog: Catalog, results: Mapping[str, Data], boards: Sequence[Data]) -> Iterator[str]:
    """The methods by what a user has to deal with, ranked by where they stand on shared work."""
    yield front_matter("Which method for my data?", hide=["navigation"])
    yield "# Which method for my data?"
    yield (
        "Methods by what they are for. Where they meet on a shared task they are ranked by it, among the references "
        "that everyone would try first, with one result and its cost. The last two columns say when to look "
        "elsewhere: who is surely better on that task, and what a method is not made for."
    )
    situations: dict[str, list[Paper]] = {}
    for paper in catalog:
        for words in paper.helps:
            situations.setdefault(words, []).append(paper)
    for words in sorted(situations):
        measured = {paper.slug: paper for paper in situations[words] if paper.slug in results}
        if not measured:
            continue
        yield f"## {plain(words.capitalize())}"
        shown = _shared(boards, {slug: results[slug] for slug in measured})
        for board in shown:
            where = f"[leaderboard](leaderboards/{page_of(board['task'])}.md)"
            yield f"{plain(venue_heading(board, board['budget']))}, {where}:"
            yield _ranked(board, set(measured), catalog)
        there = {arm["paper"] for board in shown for arm in board["arms"].values()}
        rows = [
            (
                f"[**{plain(slug)}**]({paper.area}/{slug}.md)",
                plain(paper.summary),
                f"{badge(results[slug]['headline']['verdict'])} "
                + plain(effect_sentence(results[slug], results[slug]["headline"])),
                plain(paper.avoid),
            )
            for slug, paper in measured.items()
            if slug not in there
        ]
        if rows:
            yield "Judged on work of their own:" if there else "Judged each on its own work:"
            yield table(("method", "what it does", "what was found", "not when"), rows)


def _shared(boards: Sequence[Data], results: Mapping[str, Data]) -> list[Data]:
    """The fewest leaderboards on which some papers meet, at least two that are on no other; the fullest first.

    Of boards that are equally full the one counts on which most headlines of these papers are judged, then most claims.
    """
    found, left = list[Data](), set(results)
    judged = Counter((slug, claim["venue"]) for slug, result in results.items() for claim in result["claims"])
    headlines = Counter((slug, result["headline"]["venue"]) for slug, result in results.items())

    def fullness(board: Data) -> tuple[int, int, int]:
        there = left & {arm["paper"] for arm in board["arms"].values()}
        places = [(slug, board["title"]) for slug in there]
        return len(there), sum(headlines[place] for place in places), sum(judged[place] for place in places)

    while left:
        board = max(boards, key=fullness, default=None)
        if board is None or fullness(board)[0] < 2:
            break
        found.append(board)
        left -= {arm["paper"] for arm in board["arms"].values()}
    return found


def _ranked(board: Data, slugs: set[str], catalog: Catalog) -> str:
    """Some papers' entrants and the references by rank: one result, its cost, and when to leave each."""
    first = next(name for name in shown_metrics(board) if board["metrics"][name]["best"])
    timed = [name for name in shown_metrics(board) if label(board["metrics"][name])[1] in ("s", "ms") and name != first]
    rows = []
    for name, held in board["standing"].items():
        arm = board["arms"][name]
        if arm["paper"] and arm["paper"] not in slugs:
            continue
        result = mean_and_interval(arm["metrics"].get(first, ()), board["metrics"][first])
        # Where a task has no time among its metrics, that of a whole run stands for the cost.
        cost = arm["metrics"].get(timed[0], ()) if timed else arm.get("seconds", ())
        avoid = catalog[arm["paper"]].avoid if arm["paper"] in catalog.papers else ""
        rows.append(
            (
                str(held["rank"]),
                linked(name, arm, catalog, ""),
                *map(_unbroken, (result, mean_and_interval(cost))),
                *map(plain, (_some(held["behind"]), avoid)),
            )
        )
    heads = [board["metrics"][first]["label"], board["metrics"][timed[0]]["label"] if timed else "time of a run (s)"]
    return table(("rank", "method", *map(plain, heads), "surely better", "not when"), rows)
