"""What is new: the newest results as a page and as an Atom feed, so that one can subscribe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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


def newest(results: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Slug and result of the newest outcomes that have a date, newest first."""
    dated = [(slug, result) for slug, result in results.items() if _TIME.fullmatch(result["created"])]
    return sorted(dated, key=lambda held: held[1]["created"], reverse=True)[:_NEWEST]


def news(catalog: Catalog, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The page."""
    yield front_matter("What is new", hide=["navigation", "toc"])
    yield "# What is new"
    yield "Methods by the day on which they were measured. [Subscribe](feed.xml) in any reader of Atom feeds."
    rows = (
        (
            result["created"][:10],
            f"[**{plain(slug)}**]({catalog[slug].area}/{slug}.md)<br><small>{plain(catalog[slug].title)}</small>",
            f"{badge(result['headline']['verdict'])} {plain(effect_sentence(result, result['headline']))}",
        )
        for slug, result in newest(results)
    )
    yield table(("measured", "paper", "what was found"), rows)


def feed(catalog: Catalog, results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The same as an Atom feed, with addresses relative to the feed's own."""
    root = ElementTree.Element("feed", xmlns=_ATOM)
    entries = newest(results)
    _add(root, "title", "trimtab: methods and whether their claims hold")
    _add(root, "id", "tag:trimtab,2026:methods")
    _add(root, "updated", entries[0][1]["created"] if entries else "2026-01-01T00:00:00Z")
    ElementTree.SubElement(ElementTree.SubElement(root, "author"), "name").text = "trimtab"
    for slug, result in entries:
        paper, entry = catalog[slug], ElementTree.SubElement(root, "entry")
        _add(entry, "title", f"{paper.title}: {result['headline']['verdict']}")
        _add(entry, "id", f"tag:trimtab,2026:{slug}")
        _add(entry, "updated", result["created"])
        ElementTree.SubElement(entry, "link", href=f"{paper.area}/{slug}/")
        _add(entry, "summary", f"{paper.summary} {effect_sentence(result, result['headline'])}")
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text


def _add(parent: ElementTree.Element, tag: str, text: str) -> None:
    ElementTree.SubElement(parent, tag).text = _CONTROL.sub(" ", text)
