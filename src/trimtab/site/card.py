"""A paper's card: what it does, what was found, how to use it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from trimtab import sources
from trimtab.catalog import Catalog, Paper
from trimtab.catalog.synonyms import short_forms
from trimtab.site.boards import judged_first, venue_table
from trimtab.site.docstrings import documented, example, signature
from trimtab.site.fitting import fitted, wrapped
from trimtab.site.text import admonition, badge, figure, front_matter, plain
from trimtab.studies.engine.report import (
    claims_sentence,
    data_sentence,
    effect_sentence,
    standing_sentences,
    venue_heading,
)

_FLAGS = {"paper": "built from the paper", "abstract": "built from the abstract alone"}


def card(
    paper: Paper, catalog: Catalog, result: Mapping[str, Any] | None, boards: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """The blocks of the page, what one asks first at the top."""
    yield front_matter(paper.title, boost=2 if paper.use else 1)
    yield f"# {plain(paper.title)}"
    word = result["headline"]["verdict"] if result else catalog.status(paper.slug).state
    flags = [badge(word), *([badge(_FLAGS[paper.source])] if paper.source in _FLAGS else [])]
    arxiv = f"[arXiv {paper.arxiv}]({paper.url})" if paper.arxiv else ""
    about = (plain(_names(paper.authors)), plain(paper.venue or str(paper.year)), arxiv)
    yield f"{' '.join(flags)} {' · '.join(part for part in about if part)}\n{{ .byline }}"
    yield f"{plain(paper.summary)}\n{{ .lead }}"
    yield _verdict(paper, result, boards)
    if paper.avoid:
        yield f"**Not when** {plain(paper.avoid)}."
    exported = [name for name in paper.use if documented(name)]
    if script := next(filter(None, map(example, exported)), ""):
        yield f'```python title="Drop into your loop"\n{fitted(script)}\n```'
    module = _module(paper)
    source = module.read_text(encoding="utf-8") if module else ""
    if docstring := source and ast.get_docstring(ast.parse(source)):
        yield "## The method"
        yield docstring
    if result is not None:
        yield from _evidence(paper, result)
        yield from _standing(paper, result, boards)
    if exported:
        yield from _api(paper, exported, source)
    yield from _around(paper, catalog)


def _module(paper: Paper) -> Any:
    return sources.module_file(f"trimtab.{paper.area}.{paper.slug}")


def _names(authors: Sequence[str]) -> str:
    return ", ".join(authors) if len(authors) <= 6 else f"{', '.join(authors[:5])} and {len(authors) - 5} others"


def _verdict(paper: Paper, result: Mapping[str, Any] | None, boards: Sequence[Mapping[str, Any]]) -> str:
    if result is None:
        return admonition("claim", "Not measured yet", [plain(paper.claim)])
    headline = result["headline"]
    word = headline["verdict"]
    where = f" ({plain(headline['venue'])})" if len(result["venues"]) > 1 else ""
    effect = effect_sentence(result, headline)
    blocks = [f"**{plain(effect[:1].upper() + effect[1:])}**", f"Claim: {plain(headline['text'])}{where}."]
    if word == "not shown" and headline["reason"] and headline["effect"] is not None:
        blocks.append(plain(headline["reason"][:1].upper() + headline["reason"][1:]) + ".")
    first = judged_first(boards, result)
    blocks += [plain(sentence) + "." for sentence in islice(standing_sentences(first, paper.slug), 1)]
    titles = {"holds": "The claim holds here", "fails": "The claim fails here", "not shown": "Not shown here"}
    return admonition(f"verdict-{word.replace(' ', '-')}", titles[word], blocks)


def _evidence(paper: Paper, result: Mapping[str, Any]) -> Iterator[str]:
    yield "## Evidence"
    data = sorted({name for venue in result["venues"] for name in venue["data"]})
    where = plain(f"Budget {result['budget']}{data_sentence(data)}")
    machine = f", {plain(result['machine'])}" if result["machine"] else ""
    caption = f"{where}: mean and 95 % interval over seeds{machine}."
    yield figure(f"{paper.slug}.svg", f"Figure of the study of {paper.slug}", caption)
    if result["claims"]:
        yield plain(claims_sentence(result)) + ":"
        yield "\n".join(
            f"- {badge(claim['verdict'])} {plain(claim['text'])}"
            + (f" ({plain(claim['venue'])})" if len(result["venues"]) > 1 else "")
            + f": {plain(effect_sentence(result, claim))}"
            for claim in result["claims"]
        )
    if result["notes"]:
        yield f"**Notes.** {plain(result['notes'])}"
    for venue in result["venues"]:
        if venue["arms"]:
            yield f'??? note "{plain(venue_heading(venue, result["budget"]))}"\n\n' + _indented(venue_table(venue))
    seconds = sum(sum(arm.get("seconds", ())) for venue in result["venues"] for arm in venue["arms"].values())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    minutes = max(1, round(seconds / 60))
    yield (
        f"Measured {plain(result['created'][:10])} with {plain(versions)}. Run it again: "
        f"`trimtab run {paper.slug}`; the runs shown took {minutes} minute{'s' * (minutes > 1)} of one core, the "
        "search of settings left out.\n{ .byline }"
    )


def _standing(paper: Paper, result: Mapping[str, Any], boards: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where its entrants stand, on the headline's leaderboard first."""
    if sentences := list(standing_sentences(judged_first(boards, result), paper.slug)):
        yield "## Standing"
        yield "\n".join(f"- {plain(sentence)}." for sentence in sentences)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _api(paper: Paper, exported: Sequence[str], source: str) -> Iterator[str]:
    yield "## API"
    extras = ",".join(sorted(set(re.findall(r"trimtab\[(\w+)\]", source))))
    if extras:
        yield f'Its optional parts need more packages: `pip install ".[{extras}]"`.'
    called = (wrapped(text) for name in exported if (text := signature(name)))
    yield "```python\n" + "\n".join(called) + "\n```"
    for name in exported:
        package, _, own = name.rpartition(".")
        # The module that defines it: a function may bear the name of its module.
        defined = f"{sources.exports(package)[own]}.{own}"
        yield f"::: {defined}\n    options:\n      heading: {name}\n      toc_label: {own}"
    module = _module(paper)
    if module is not None:
        yield f"Source: `src/{sources.name_of(module)}`, tests: `tests/{paper.area}/test_{paper.slug}.py`."


def _around(paper: Paper, catalog: Catalog) -> Iterator[str]:
    yield "## Cite"
    yield f"```bibtex\n{bibtex(paper)}\n```"
    if paper.peers:
        yield "## Peers"
        yield "Other packages with this method: " + ", ".join(plain(peer) for peer in paper.peers) + "."
    if paper.related:
        yield "## Related"
        yield "\n".join(_link(catalog[slug], paper) for slug in paper.related)
    # The site's search knows no synonyms, so that the short forms stand on the page.
    yield f"Keywords: {plain(', '.join([*paper.keywords, *short_forms(paper.keywords)]))}.\n{{ .keywords }}"


def bibtex(paper: Paper) -> str:
    """The paper's entry for a bibliography."""
    fields = {"title": f"{{{paper.title}}}", "author": " and ".join(paper.authors), "year": str(paper.year)}
    if paper.venue:
        fields["journal"] = paper.venue
    if paper.arxiv:
        fields |= {"eprint": paper.arxiv, "archivePrefix": "arXiv"}
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@article{{{paper.slug},", *lines, "}"])


def _link(paper: Paper, origin: Paper) -> str:
    target = f"{paper.slug}.md" if paper.area == origin.area else f"../{paper.area}/{paper.slug}.md"
    return f"- [**{plain(paper.slug)}**]({target}): {plain(paper.summary)}"
