"""The pages of the site as Markdown: home, areas, cards and leaderboards."""

from __future__ import annotations

import ast
import html
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab import fingerprint
from trimtab.catalog import CHECKOUT, Catalog, Paper
from trimtab.site.docstrings import documented, example

_VERDICTS = {
    "holds": "The claim holds here",
    "partly": "The claim holds in part",
    "fails": "The claim fails here",
    "not shown": "The claim is not shown at this scale",
}
_STATES = {"works": "works", "partial": "in part", "planned": "planned"}


def write_pages(folder: Path, catalog: Catalog) -> list[object]:
    """Writes all pages and figures, and returns the navigation as MkDocs wants it."""
    from trimtab.studies.figure import draw

    results, set_aside = catalog.outcomes()
    for problem in set_aside:
        logging.getLogger(__name__).warning(problem)
    for slug, result in results.items():
        figure = folder / catalog[slug].area / f"{slug}.svg"
        figure.parent.mkdir(exist_ok=True)
        draw(result, figure)
    for paper in catalog:
        _write(folder / paper.area / f"{paper.slug}.md", _card(paper, catalog, results.get(paper.slug)))
    for area in catalog.areas:
        _write(folder / area / "index.md", _area(area, catalog, results))
    _write(folder / "index.md", _home(catalog, results))
    _write(folder / "methods" / "index.md", _areas(catalog))
    _write(folder / "leaderboards.md", _leaderboards(catalog, results))
    _write(folder / "choose.md", _choose(catalog, results))
    methods: list[object] = ["methods/index.md"]
    for area in catalog.areas:
        cards = [{paper.slug: f"{area}/{paper.slug}.md"} for paper in sorted(catalog.area(area), key=lambda p: p.slug)]
        methods.append({area: [f"{area}/index.md", *cards]})
    written = {path.stem: path for path in (CHECKOUT / "docs").glob("*.md")} if CHECKOUT else {}
    for path in written.values():
        shutil.copy(path, folder / path.name)
    contributing = [{"Contributing": "contributing.md"}] if written.pop("contributing", None) else []
    others = [{name.replace("_", " ").capitalize(): path.name} for name, path in sorted(written.items())]
    return [
        {"Home": "index.md"},
        *others,
        {"Choose": "choose.md"},
        {"Methods": methods},
        {"Leaderboards": "leaderboards.md"},
        *contributing,
    ]


def _write(path: Path, blocks: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(block for block in blocks if block) + "\n", encoding="utf-8")


def _text(text: str) -> str:
    """Words that mean nothing to Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]|$])", r"\\\1", html.escape(text, quote=False))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "| " + " | ".join(columns) + " |"
    return "\n".join([head, "|" + " --- |" * len(columns), *("| " + " | ".join(row) + " |" for row in rows)])


def _badge(word: str) -> str:
    return f'<span class="badge badge-{word.replace(" ", "-")}">{_STATES.get(word, word)}</span>'


def _home(catalog: Catalog, results: Mapping[str, Any]) -> Iterator[str]:
    working = sum(catalog.status(paper.slug).state == "works" for paper in catalog)
    yield "---\ntitle: trimtab\nhide: [navigation, toc]\n---"
    yield "# Small terms that steer large models"
    yield (
        f"`trimtab` is a PyTorch library of published methods: {len(catalog)} papers in {len(catalog.areas)} areas, "
        f"{working} of them working so far. Losses, optimizers, adapters, samplers, solvers: each is one import and a "
        "few lines in a loop of your own, and each has a study that re-runs its paper's claim on a laptop and says, in "
        "numbers, whether it holds."
    )
    yield (
        '```python title="Parts of two papers in a plain PyTorch loop"\n'
        "optimizer = trimtab.optim.SGDSaI(model.parameters(), lr=1e-2)\n"
        "criterion = trimtab.losses.ELR(num_samples=len(train), num_classes=10)\n"
        "for index, x, y in loader:\n"
        "    loss = criterion(model(x), y, index)\n"
        "    optimizer.zero_grad(); loss.backward(); optimizer.step()\n"
        "```"
    )
    if results:
        yield "## Measured so far"
        yield _verdict_table(catalog, results)
    yield "## Areas"
    yield _area_table(catalog, "")


def _areas(catalog: Catalog) -> Iterator[str]:
    yield "---\nhide: [toc]\n---"
    yield "# Methods"
    yield "Find a paper by the search above, with `trimtab search` in a terminal, or by its area."
    yield _area_table(catalog, "../")


def _area_table(catalog: Catalog, base: str) -> str:
    rows = []
    for area, about in catalog.areas.items():
        papers = catalog.area(area)
        working = sum(catalog.status(paper.slug).state == "works" for paper in papers)
        rows.append((f"[**{area}**]({base}{area}/index.md)", _text(about), str(len(papers)), str(working or "–")))
    return _table(("area", "about", "papers", "work"), rows)


def _verdict_table(catalog: Catalog, results: Mapping[str, Any]) -> str:
    rows = (
        (
            f"[{_text(slug)}]({catalog[slug].area}/{slug}.md)",
            _text(catalog[slug].title),
            _badge(result["verdict"]),
            "<br>".join(_effect(claim) for claim in result["claims"]),
        )
        for slug, result in results.items()
    )
    return _table(("paper", "title", "claim", "measured"), rows)


def _choose(catalog: Catalog, results: Mapping[str, Any]) -> Iterator[str]:
    """The methods by what a user has to deal with, and what each has gained."""
    yield "---\nhide: [navigation]\n---"
    yield "# Which method for my data?"
    yield (
        "Methods side by side by what they are for, with what each gained over its baseline in its own study: the "
        "mean effect, positive in the direction of the claim, with its 95 % interval. Those whose claim holds come "
        "first."
    )
    situations: dict[str, list[Paper]] = {}
    for paper in catalog:
        for words in paper.helps:
            situations.setdefault(words, []).append(paper)
    order = ["holds", "partly", "not shown", "fails"]
    for words in sorted(situations):
        yield f"## {_text(words.capitalize())}"
        measured = [paper for paper in situations[words] if paper.slug in results]
        rows = []
        for paper in sorted(measured, key=lambda paper: order.index(results[paper.slug]["verdict"])):
            result = results[paper.slug]
            claims = "<br>".join(
                f"{_badge(claim['verdict'])} {_text(claim['text'])}: {_effect(claim)}" for claim in result["claims"]
            )
            name = f"[**{_text(paper.slug)}**]({paper.area}/{paper.slug}.md) {_badge(result['verdict'])}"
            rows.append((name, _text(paper.summary), claims))
        yield _table(("method", "what it does", "what it gained here"), rows)
        if planned := [_text(paper.slug) for paper in situations[words] if paper.slug not in results]:
            yield f"Not measured yet: {', '.join(planned)}."


def _area(area: str, catalog: Catalog, results: Mapping[str, Any]) -> Iterator[str]:
    yield f"---\ntitle: {area}\nhide: [toc]\n---"
    yield f"# {area}"
    yield _text(catalog.areas[area])
    rows = []
    for paper in catalog.area(area):
        state = catalog.status(paper.slug).state
        verdict = _badge(results[paper.slug]["verdict"]) if paper.slug in results else ""
        name = f"[**{_text(paper.slug)}**]({paper.slug}.md)<br>{paper.year}"
        rows.append((name, f"{_text(paper.title)}<br><small>{_text(paper.summary)}</small>", _badge(state), verdict))
    yield _table(("paper", "what it does", "state", "claim"), rows)


def _card(paper: Paper, catalog: Catalog, result: dict[str, Any] | None) -> Iterator[str]:
    status = catalog.status(paper.slug)
    yield f"---\ntitle: {_quoted(paper.title)}\nhide: [toc]\nsearch:\n  boost: {2 if paper.use else 1}\n---"
    yield f"# {_text(paper.title)}"
    arxiv = f"[arXiv {paper.arxiv}]({paper.url})" if paper.arxiv else ""
    about = (_text(_names(paper.authors)), _text(paper.venue or str(paper.year)), arxiv)
    yield f"{_badge(status.state)} {' · '.join(part for part in about if part)}\n{{ .byline }}"
    yield f"{_text(paper.summary)}\n{{ .lead }}"
    yield from _verdict(paper, catalog, result)
    module = fingerprint.module_file(f"trimtab.{paper.area}.{paper.slug}")
    source = module.read_text(encoding="utf-8") if module else ""
    if docstring := source and ast.get_docstring(ast.parse(source)):
        yield "## The method"
        yield docstring
    exported = [name for name in paper.use if documented(name)]
    if exported:
        yield "## Use it"
        extras = ",".join(sorted(set(re.findall(r"trimtab\[(\w+)\]", source))))
        note = f'\npip install "trimtab[{extras}]"  # with its optional parts' if extras else ""
        yield f"```sh\npip install trimtab{note}\n```"
        yield _example(exported)
    if result is not None:
        yield from _numbers(result)
    if exported:
        yield "## API"
        yield from (f"::: {name}" for name in exported)
    if paper.peers:
        yield "## Peers"
        yield "Other packages with this method: " + ", ".join(f"`{peer}`" for peer in paper.peers) + "."
    if paper.related:
        yield "## Related"
        yield "\n".join(_link(catalog[slug], paper) for slug in paper.related)
    yield f"Keywords: {_text(', '.join(paper.keywords))}.\n{{ .keywords }}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _names(authors: Sequence[str]) -> str:
    return ", ".join(authors) if len(authors) <= 6 else f"{', '.join(authors[:5])} and {len(authors) - 5} others"


def _link(paper: Paper, origin: Paper) -> str:
    target = f"{paper.slug}.md" if paper.area == origin.area else f"../{paper.area}/{paper.slug}.md"
    return f"- [**{_text(paper.slug)}**]({target}): {_text(paper.summary)}"


def _verdict(paper: Paper, catalog: Catalog, result: dict[str, Any] | None) -> Iterator[str]:
    """The claim, what became of it, and the figure."""
    if result is None:
        yield f'!!! claim "Claim (not measured yet)"\n    {_text(paper.claim)}'
        return
    word = result["verdict"]
    lines = [f'!!! verdict-{word.replace(" ", "-")} "{_VERDICTS[word]}"', f"    {_text(paper.claim)}", ""]
    for claim in result["claims"]:
        lines.append(f"    - {_badge(claim['verdict'])} {_text(claim['text'])}: {_effect(claim)}")
    if not catalog.is_fresh(result):
        lines += ["", "    The code has changed since this was measured: the result is stale."]
    yield "\n".join(lines)
    seeds, budget, machine = len(result["seeds"]), result["budget"], result.get("machine")
    where = f", on {machine}" if isinstance(machine, str) and machine else ""
    task = f"Task [{result['task']}](../leaderboards.md#{result['task']}), " if result.get("task") else ""
    yield (
        f'<figure markdown="span">\n![Figure of the study of {paper.slug}]({paper.slug}.svg){{ .study }}\n'
        f'<figcaption markdown="span">{task}'
        f"budget {budget}, mean and 95 % interval over {seeds} seeds{where}.</figcaption>\n</figure>"
    )
    if result.get("notes"):
        yield _text(result["notes"])


def _effect(claim: Mapping[str, Any]) -> str:
    """The measured effect in one phrase."""
    if claim["effect"] is None:
        return _text(claim.get("reason") or "no number")
    low, high = claim["interval"] or (None, None)
    bounds = f" (95 % interval {low:.3g} to {high:.3g})" if low is not None and high is not None else ""
    return f"**{claim['effect']:.3g}**{bounds}"


def _example(names: Sequence[str]) -> str:
    """The first example among the docstrings."""
    script = next((script for name in names if (script := example(name))), "")
    return f"```python\n{script}\n```" if script else ""


def _numbers(result: Mapping[str, Any]) -> Iterator[str]:
    yield "## Numbers"
    yield _arms_table(result["arms"], result["metrics"], {arm: _text(arm) for arm in result["arms"]})
    versions = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    created = str(result.get("created", ""))[:10]
    measured = ", ".join(part for part in (created, versions) if part)
    again = f"Run it again: `trimtab run {result['paper']} --budget {result['budget']}`."
    yield (f"Measured {_text(measured)}. " if measured else "") + again + "\n{ .byline }"


def _arms_table(arms: Mapping[str, Any], metrics: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Arms by metrics, the best of each metric in bold."""
    shown = [name for name in metrics if any(_finite(arm, name) for arm in arms.values())]
    columns = []
    for name in shown:
        cells = [_mean_and_interval(_finite(arm, name), metrics[name]["percent"]) for arm in arms.values()]
        best = _best(arms, name, metrics[name]["best"])
        columns.append([f"**{cell}**" if arm == best else cell for arm, cell in zip(arms, cells, strict=True)])
    arrows = {"max": "&nbsp;↑", "min": "&nbsp;↓", None: ""}
    heads = (_text(metrics[name]["label"]) + arrows[metrics[name]["best"]] for name in shown)
    return _table(("arm", *heads), zip((names[arm] for arm in arms), *columns, strict=True))


def _finite(arm: Mapping[str, Any], metric: str) -> list[float]:
    return [value for value in arm["metrics"].get(metric, ()) if value is not None and math.isfinite(value)]


def _best(arms: Mapping[str, Any], metric: str, direction: str | None) -> str | None:
    """The arm with the best mean; None where that is a tie or has no meaning."""
    means = {arm: sum(values) / len(values) for arm, held in arms.items() if (values := _finite(held, metric))}
    if direction is None or len(set(means.values())) < 2:
        return None
    return (max if direction == "max" else min)(means, key=means.__getitem__)


def _mean_and_interval(values: Sequence[float], percent: bool) -> str:
    from trimtab.studies.verdict import interval

    if not values:
        return "–"
    mean, low, _ = interval(values)
    scale, form = (100.0, ".1f") if percent else (1.0, ".4g")
    half = f" ± {scale * (mean - low):{'.1f' if percent else '.2g'}}" if len(values) > 1 else ""
    return f"{scale * mean:{form}}{half}"


def _leaderboards(catalog: Catalog, results: Mapping[str, Any]) -> Iterator[str]:
    yield "---\nhide: [navigation]\n---"
    yield "# Leaderboards"
    yield (
        "What the studies of one task have measured, side by side: mean and 95 % interval over seeds, the best in "
        "bold. `trimtab compare TASK` runs all contestants of a task on one and the same variant of it."
    )
    boards: dict[str, dict[tuple[str, str], list[Mapping[str, Any]]]] = {}
    for result in results.values():
        # A study may compare on several variants of its task, or on several tasks; each gets its own table.
        parts: dict[tuple[str, str], dict[str, Any]] = {}
        for name, arm in result["arms"].items():
            parts.setdefault((arm.get("task") or result["task"], arm.get("variant") or ""), {})[name] = arm
        for (task, variant), arms in parts.items():
            key = (variant, result["budget"])
            boards.setdefault(task, {}).setdefault(key, []).append({**result, "arms": arms})
    if not boards:
        yield "No study has a result yet."
    for task in sorted(filter(None, boards)):
        yield f"## {task} {{ #{task} }}"
        for (variant, budget), held in boards[task].items():
            seeds = max(len(result["seeds"]) for result in held)
            yield (f"`{variant}` · " if variant else "") + f"budget {budget}, {seeds} seeds"
            yield _board(catalog, held)


def _board(catalog: Catalog, results: Sequence[Mapping[str, Any]]) -> str:
    """One table of the arms of several studies; an arm that studies share stands once."""
    metrics: dict[str, Any] = {}
    rows: dict[tuple[str, str], tuple[str, Any, list[str]]] = {}
    for result in results:
        metrics |= result["metrics"]
        chosen = result.get("leaderboard") or list(result["arms"])
        for arm in (name for name in chosen if name in result["arms"]):
            held = result["arms"][arm]
            # Equal numbers under one name are one run, whatever it took on the machine of the day.
            numbers = {name: values for name, values in held["metrics"].items() if "second" not in name}
            rows.setdefault((arm, repr(sorted(numbers.items()))), (arm, held, []))[2].append(result["paper"])
    order = next((name for name, metric in metrics.items() if metric["best"]), None)

    def place(row: tuple[str, Any, list[str]]) -> float:
        values = _finite(row[1], order) if order else []
        if not values or order is None:
            return math.inf
        mean = sum(values) / len(values)
        return -mean if metrics[order]["best"] == "max" else mean

    arms, names = {}, {}
    for number, (arm, held, papers) in enumerate(sorted(rows.values(), key=place)):
        key = f"{number} {arm}"
        links = ", ".join(f"[{_text(slug)}]({catalog[slug].area}/{slug}.md)" for slug in papers)
        arms[key], names[key] = held, f"{_text(arm)} <small>{links}</small>"
    return _arms_table(arms, metrics, names)
