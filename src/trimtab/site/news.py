"""What is new: the newest results as a page and as an Atom feed, so that one can subscribe."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from trimtab.catalog import Catalog
from trimtab.site.text import badge, front_matter, plain, table
from trimtab.studies.engine.report import effect_sentence

_ATOM = "http://www.w3.org/2005/Atom"
_NEWEST = 50
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\+00:00|Z)")
# What XML 1.0 has no place for.
_CONTROL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Dated = tuple[str, str, Mapping[str, Any]]


def newest(catalog: Catalog, results: Mapping[str, Mapping[str, Any]]) -> list[Dated]:
    """When it began to work, slug and result of the newest outcomes that have a date, newest first.

    A method works from when its first result was committed; running it again makes no news. Where there is no history
    to ask, the date of the result has to do.
    """
    first = _first_commits(catalog.results)
    dated = [
        (min(f"{result['created'][:19]}Z", first.get(slug, "9999")), slug, result)
        for slug, result in results.items()
        if _TIME.fullmatch(result["created"])
    ]
    return sorted(dated, key=lambda held: held[:2], reverse=True)[:_NEWEST]


def _first_commits(folder: Path) -> dict[str, str]:
    """Slug -> when the first result of a paper was committed, in UTC; nothing outside of a checkout."""
    command = ("git", "log", "--format=@%ct", "--diff-filter=A", "--name-only", "--relative", "--", "*.json")
    try:
        log = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    found, when = dict[str, str](), ""
    for line in log.splitlines():  # the newest commit first, so that the oldest stays
        if line.startswith("@"):
            when = datetime.fromtimestamp(int(line[1:]), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        elif line and "/" not in line:
            found[Path(line).stem] = when
    return found


def news(catalog: Catalog, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The page."""
    yield front_matter("What is new", hide=["navigation", "toc"])
    yield "# What is new"
    yield (
        "Methods by the day on which they began to work, with parts, tests and a first result. "
        "[Subscribe](feed.xml) in any reader of Atom feeds."
    )
    rows = (
        (
            since[:10],
            f"[**{plain(slug)}**]({catalog[slug].area}/{slug}.md)<br><small>{plain(catalog[slug].title)}</small>",
            f"{badge(result['headline']['verdict'])} {plain(effect_sentence(result, result['headline']))}",
        )
        for since, slug, result in newest(catalog, results)
    )
    yield table(("since", "paper", "what was found"), rows)


def feed(catalog: Catalog, results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The same as an Atom feed, with addresses relative to the feed's own."""
    root = ElementTree.Element("feed", xmlns=_ATOM)
    entries = newest(catalog, results)
    _add(root, "title", "trimtab: methods and whether their claims hold")
    _add(root, "id", "tag:trimtab,2026:methods")
    _add(root, "updated", max((result["created"] for *_, result in entries), default="2026-01-01T00:00:00Z"))
    ElementTree.SubElement(ElementTree.SubElement(root, "author"), "name").text = "trimtab"
    for since, slug, result in entries:
        paper, entry = catalog[slug], ElementTree.SubElement(root, "entry")
        _add(entry, "title", f"{paper.title}: {result['headline']['verdict']}")
        _add(entry, "id", f"tag:trimtab,2026:{slug}")
        _add(entry, "published", since)
        _add(entry, "updated", result["created"])
        ElementTree.SubElement(entry, "link", href=f"{paper.area}/{slug}/")
        _add(entry, "summary", f"{paper.summary} {effect_sentence(result, result['headline'])}")
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def _add(parent: ElementTree.Element, tag: str, text: str) -> None:
    ElementTree.SubElement(parent, tag).text = _CONTROL.sub(" ", text)
