"""The pages of the site as Markdown: home and areas here, cards and leaderboards in their own modules."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.catalog import CHECKOUT, Catalog
from trimtab.site import api, gallery
from trimtab.site.boards import by_task, choose, file_of, leaderboards, over_bytes, page_of, task_page
from trimtab.site.card import card
from trimtab.site.news import feed, news
from trimtab.site.text import badge, figure, front_matter, plain, table
from trimtab.studies.engine.report import effect_sentence, read_boards

_HOME_BOARD = ("label-noise", "symmetric")


def write_pages(folder: Path, catalog: Catalog) -> list[object]:
    """Writes all pages and figures, and returns the navigation as MkDocs wants it.

    A result or a leaderboard that cannot be read is named on stderr, and the rest is built.
    """
    from trimtab.studies.engine.figure import draw

    results, problems = catalog.outcomes()
    boards, others = read_boards(catalog.results)
    for problem in (*problems, *others):
        print(f"trimtab: {problem}", file=sys.stderr)
    for slug, result in list(results.items()):
        path = folder / catalog[slug].area / f"{slug}.svg"
        path.parent.mkdir(exist_ok=True)
        try:
            draw(result, path, boards)
        except ValueError as error:
            print(f"trimtab: the result of {slug} cannot be drawn: {error}", file=sys.stderr)
            del results[slug]
    tasks = by_task(boards)
    (folder / "leaderboards").mkdir()
    for board in (board for held in tasks.values() for board in held):
        draw(board, folder / "leaderboards" / f"{file_of(board)}.svg")
        if spent := over_bytes(board):
            draw(spent, folder / "leaderboards" / f"{file_of(board)}-bytes.svg")
    for paper in catalog:
        _write(folder / paper.area / f"{paper.slug}.md", card(paper, catalog, results.get(paper.slug), boards))
    for area in catalog.areas:
        _write(folder / area / "index.md", _area(area, catalog, results))
    _write(folder / "index.md", _home(catalog, results, boards))
    _write(folder / "methods" / "index.md", _areas(catalog))
    _write(folder / "leaderboards" / "index.md", leaderboards(boards))
    for task, held in tasks.items():
        _write(folder / "leaderboards" / f"{page_of(task)}.md", task_page(task, held, catalog))
    _write(folder / "choose.md", choose(catalog, results, boards))
    _write(folder / "api" / "index.md", api.index(catalog))
    for package, about in api.packages(catalog).items():
        _write(folder / "api" / f"{package}.md", api.page(package, about, catalog))
    examples = gallery.read(CHECKOUT / "docs" / "gallery") if CHECKOUT else []
    if examples:
        _write(folder / "gallery" / "index.md", gallery.index(examples))
    for example in examples:
        _write(folder / "gallery" / f"{example.name}.md", gallery.page(example))
    _write(folder / "new.md", news(catalog, results))
    (folder / "feed.xml").write_bytes(feed(catalog, results))
    return _navigation(folder, catalog, tasks, examples)


def _navigation(
    folder: Path, catalog: Catalog, tasks: Mapping[str, Sequence[Any]], examples: Sequence[gallery.Example]
) -> list[object]:
    methods: list[object] = ["methods/index.md"]
    for area in catalog.areas:
        cards = [{paper.slug: f"{area}/{paper.slug}.md"} for paper in sorted(catalog.area(area), key=lambda p: p.slug)]
        methods.append({area: [f"{area}/index.md", *cards]})
    written = {path.stem: path for path in (CHECKOUT / "docs").glob("*.md")} if CHECKOUT else {}
    for path in written.values():
        shutil.copy(path, folder / path.name)
    contributing = [{"Contributing": "contributing.md"}] if written.pop("contributing", None) else []
    others = [{name.replace("_", " ").capitalize(): path.name} for name, path in sorted(written.items())]
    shown = ["gallery/index.md", *({e.title: f"gallery/{e.name}.md"} for e in examples)]
    return [
        {"Home": "index.md"},
        *others,
        *([{"Gallery": shown}] if examples else []),
        {"Choose": "choose.md"},
        {"Methods": methods},
        {"API": ["api/index.md", *({package: f"api/{package}.md"} for package in api.packages(catalog))]},
        {"Leaderboards": ["leaderboards/index.md", *({t: f"leaderboards/{page_of(t)}.md"} for t in tasks)]},
        {"What is new": "new.md"},
        *contributing,
    ]


def _write(path: Path, blocks: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(block for block in blocks if block) + "\n", encoding="utf-8")


_EXAMPLE = """import torch
import trimtab

data = trimtab.data.load("digits")
model = trimtab.nets.mlp(64)
optimizer = trimtab.optim.AdaBelief(model.parameters(), lr=3e-3)
elr = trimtab.losses.ELR(num_samples=len(data.y_train), num_classes=10)
for index in torch.randperm(len(data.y_train)).split(64):
    loss = elr(model(data.x_train[index]), data.y_train[index], index)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()"""


def _home(catalog: Catalog, results: Mapping[str, Any], boards: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield front_matter("trimtab", hide=["navigation", "toc"])
    yield "# Small terms that steer large models"
    yield (
        f"`trimtab` is a PyTorch library of published methods, {len(catalog)} papers in {len(catalog.areas)} areas, "
        f"{len(results)} of them measured so far: losses, optimizers, adapters, samplers and solvers that drop into a "
        "loop of your own. Each has a study that re-runs its paper's claim and says, in numbers, whether it holds.\n"
        "{ .lead }"
    )
    yield '<div class="beside" markdown>\n\n<div markdown>'
    yield "```sh\npip install .   # in a checkout\n```"
    yield f'```python title="Parts of two papers in a plain loop"\n{_EXAMPLE}\n```'
    yield (
        "**By problem:** [which method for my data?](choose.md)<br>"
        "**By area:** [all methods](methods/index.md), [all names](api/index.md)<br>"
        "**By paper:** search above, or `trimtab search` in a terminal<br>"
        "**Side by side:** [leaderboards](leaderboards/index.md)"
    )
    yield "</div>"
    for board in boards:
        if (board["task"], board["variant"]) == _HOME_BOARD and board["arms"]:
            where = f"leaderboards/{page_of(board['task'])}.md"
            caption = f"[{plain(board['title'])}]({where}): mean and 95 % interval; methods of papers in blue."
            yield figure(f"leaderboards/{file_of(board)}.svg", "Accuracy under wrong labels, method by method", caption)
    yield "</div>"


def _areas(catalog: Catalog) -> Iterator[str]:
    yield front_matter("Methods", hide=["toc"])
    yield "# Methods"
    yield "Find a paper by the search above, with `trimtab search` in a terminal, or by its area."
    rows = []
    for area, about in catalog.areas.items():
        papers = catalog.area(area)
        working = sum(catalog.status(paper.slug).state == "works" for paper in papers)
        rows.append((f"[**{plain(area)}**](../{area}/index.md)", plain(about), str(len(papers)), str(working or "–")))
    yield table(("area", "about", "papers", "work"), rows)


def _area(area: str, catalog: Catalog, results: Mapping[str, Any]) -> Iterator[str]:
    yield front_matter(area, hide=["toc"])
    yield f"# {plain(area)}"
    yield plain(catalog.areas[area])
    papers = sorted(catalog.area(area), key=lambda paper: (paper.slug not in results, paper.slug))
    rows = []
    for paper in papers:
        found = badge(catalog.status(paper.slug).state)
        if result := results.get(paper.slug):
            found = f"{badge(result['headline']['verdict'])} {plain(effect_sentence(result, result['headline']))}"
        name = f"[**{plain(paper.slug)}**]({paper.slug}.md)<br>{paper.year}"
        rows.append((name, f"{plain(paper.title)}<br><small>{plain(paper.summary)}</small>", found))
    yield table(("paper", "what it does", "what was found"), rows)
    if area in api.packages(catalog):
        yield f"All its public names: [API of {plain(area)}](../api/{area}.md)."
