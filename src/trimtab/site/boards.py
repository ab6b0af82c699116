"""The leaderboards, and which method for which data; both read the files that the command line writes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trimtab import sources
from trimtab.catalog import Catalog, Paper
from trimtab.site.text import badge, figure, front_matter, plain, table
from trimtab.studies.engine.report import (
    effect_sentence,
    label,
    mean_and_interval,
    ranked,
    setting_text,
    shown_metrics,
    venue_heading,
)

Data = Mapping[str, Any]


def linked(name: str, arm: Data, catalog: Catalog, base: str) -> str:
    """A contestant, with links to the papers that it stands for."""
    slugs = [slug for slug in arm["paper"].split("+") if slug in catalog.papers]
    links = ", ".join(f"[{plain(slug)}]({base}{catalog[slug].area}/{slug}.md)" for slug in slugs)
    return plain(name) + (f" <small>{links}</small>" if links else "")


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
        cells += [plain(mean_and_interval(arm["metrics"].get(m, ()), venue["metrics"][m])) for m in shown]
        cells += [plain(setting_text(arm))] if chosen else []
        if standing:
            cells = [str(standing[name]["rank"]), *cells, plain("; ".join(standing[name]["behind"]) or "nobody")]
        rows.append(cells)
    return table(heads, rows)


def file_of(board: Data) -> str:
    """The name of a leaderboard's picture, without its ending."""
    return re.sub(r"[^a-z0-9]+", "-", f"{board['task']} {board['variant']}".lower()).strip("-")


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
        "One a task and variant: every method that can enter, at the setting that it chose by one and the same "
        "search on validation data, on the same seeds. `trimtab compare TASK` runs them on your machine, "
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
    yield front_matter(task)
    yield f"# {plain(task)}"
    yield plain(about(task))
    for board in boards:
        yield f"## {plain(board['variant'])}"
        yield plain(venue_heading(board, board["budget"])) + "."
        yield figure(f"{file_of(board)}.svg", f"{task}, {board['variant']}", "Mean and 95 % interval over seeds.")
        yield venue_table(board, catalog, "../")
        if board["skipped"]:
            skipped = "; ".join(f"{name}: {why}" for name, why in board["skipped"].items())
            yield plain(f"Not there: {skipped}") + "."
    yield (
        "± is the half-width of the 95 % interval over seeds. Surely behind: those whose paired difference has its "
        "whole 95 % interval on their side.\n{ .byline }"
    )


def choose(catalog: Catalog, results: Mapping[str, Data], boards: Sequence[Data]) -> Iterator[str]:
    """The methods by what a user has to deal with, ranked by where they stand on shared work."""
    yield front_matter("Which method for my data?", hide=["navigation"])
    yield "# Which method for my data?"
    yield (
        "Methods by what they are for. Where they meet on one task they stand in its order, with the effect over the "
        "plain reference and what it costs; who is surely ahead is named, for then the other one is the better choice."
    )
    situations: dict[str, list[Paper]] = {}
    for paper in catalog:
        for words in paper.helps:
            situations.setdefault(words, []).append(paper)
    for words in sorted(situations):
        papers = situations[words]
        measured = [paper for paper in papers if paper.slug in results]
        if not measured:
            continue
        yield f"## {plain(words.capitalize())}"
        board = _shared(boards, {paper.slug for paper in papers})
        there: set[str] = set()
        if board is not None:
            there = {arm["paper"] for arm in board["arms"].values()}
            yield (
                plain(venue_heading(board, board["budget"]))
                + f", [leaderboard](leaderboards/{page_of(board['task'])}.md):"
            )
            yield _ranked(board, {paper.slug for paper in papers}, catalog)
        rows = [
            (
                f"[**{plain(paper.slug)}**]({paper.area}/{paper.slug}.md)",
                plain(paper.summary),
                badge(results[paper.slug]["headline"]["verdict"])
                + f" {plain(effect_sentence(results[paper.slug], results[paper.slug]['headline']))}",
            )
            for paper in measured
            if paper.slug not in there
        ]
        if rows:
            yield ("Judged on work of their own:" if there else "") or "Judged each on its own work:"
            yield table(("method", "what it does", "what was found"), rows)


def _shared(boards: Sequence[Data], slugs: set[str]) -> Data | None:
    """The leaderboard that most of some papers are on; none where fewer than two are."""
    counts = [(len(slugs & {arm["paper"] for arm in board["arms"].values()}), board) for board in boards]
    best = max(counts, key=lambda held: held[0], default=(0, None))
    return best[1] if best[0] >= 2 else None


def _ranked(board: Data, slugs: set[str], catalog: Catalog) -> str:
    """Some papers' entrants and the references by rank: one effect, its cost, and who is surely better."""
    first = next(name for name in shown_metrics(board) if board["metrics"][name]["best"])
    costs = [name for name in shown_metrics(board) if label(board["metrics"][name])[1] == "s"][:1]
    rows = []
    for name, held in board["standing"].items():
        arm = board["arms"][name]
        if arm["paper"] and arm["paper"] not in slugs:
            continue
        numbers = [mean_and_interval(arm["metrics"].get(m, ()), board["metrics"][m]) for m in (first, *costs)]
        better = "; ".join(held["behind"])
        rows.append(
            (str(held["rank"]), linked(name, arm, catalog, ""), *map(plain, numbers), plain(better or "nobody"))
        )
    heads = [plain(board["metrics"][name]["label"]) for name in (first, *costs)]
    return table(("rank", "method", *heads, "surely better"), rows)
