"""What people type, and what the papers call it, as `synonyms.toml` beside this file lists it."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from trimtab.catalog.spelling import stem, words

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))

STOP_WORDS = frozenset(_TABLES["stop_words"].split())
"""Words that say nothing of what is sought."""

FAINT_WORDS = frozenset(_TABLES["faint_words"].split())
"""Words that say little, as every paper here is about them."""

_SHORT_FORMS: dict[str, list[str]] = _TABLES["short_forms"]


def key(terms: list[str]) -> str:
    """The form in which terms are looked up: without their endings, in one string."""
    return " ".join(map(stem, terms))


def _pairings(first: str, second: str) -> list[str]:
    return [f"{one} {other}" for one, other in product(first.split(), second.split())]


_FIELD: dict[str, list[str]] = (
    {typed: row["means"] for row in _TABLES["typed"] for typed in row["typed"].split("; ")}
    | {pair: row["means"] for row in _TABLES["apart"] for pair in _pairings(row["word"], row["other"])}
    | {pair: row["means"] for row in _TABLES["pairs"] for pair in _pairings(row["first"], row["second"])}
    | _SHORT_FORMS
    | _TABLES["other_words"]
)
SYNONYMS = {
    key(words(term)): tuple(" ".join(words(phrase)) for phrase in (term, *phrases)) for term, phrases in _FIELD.items()
}
"""Words of a query, as `key` gives them -> phrases of the papers that mean the same."""

SYNONYM_WORDS = {key([word]): word for term in _FIELD for word in words(term)}
"""Single words of `SYNONYMS`, as `key` gives them -> as people type them."""

APART = tuple(
    tuple(frozenset(key(words(word)) for word in row[side].split()) for side in ("word", "other"))
    for row in _TABLES["apart"]
)
"""Pairs of kinds of words, as `key` gives them, that mean something together wherever they stand in a query."""


def short_forms(terms: Iterable[str]) -> list[str]:
    """The short forms that people type for some terms of a paper.

    Example:
        >>> short_forms(["sharpness-aware minimization", "flat minima"])
        ['SAM']
    """
    text = f" {' | '.join(key(words(term)) for term in terms)} "
    return [form for form, phrases in _SHORT_FORMS.items() if any(f" {key(words(p))} " in text for p in phrases)]
