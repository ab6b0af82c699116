"""Pieces of Markdown; whatever comes from a result or a table of papers passes through `plain`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from trimtab.site.equations import mathml

_SPECIAL = re.compile(r"[!-~](?<![\w,;:'()/%.?+-])|_")


def plain(text: object) -> str:
    """Words on one line that mean nothing to Markdown, its extensions or HTML.

    Example:
        >>> plain("a <b> [c](d)")
        'a &#60;b&#62; &#91;c&#93;(d)'
    """
    words = _SPECIAL.sub(lambda found: f"&#{ord(found[0])};", " ".join(str(text).split()))
    # At the start of a block a sign, or a number and a full stop, would make a list or a line of it.
    words = re.sub(r"^[+-]", lambda found: f"&#{ord(found[0])};", words)
    return re.sub(r"^(\d+)\.(?= )", r"\1&#46;", words)


_MATH = re.compile(r"(?<![\\$])\$([^$`]+)\$(?!\d)")


def prose(text: str) -> str:
    """Words of a docstring on one line, `code` as code and equations as MathML, in which nothing else means anything.

    Example:
        >>> prose("reads `x` <b>")
        'reads `x` &#60;b&#62;'
        >>> prose("the rate $a^2$")
        'the rate <math><msup><mi>a</mi><mn>2</mn></msup></math>'
    """
    if found := _MATH.search(text):
        before, after = text[: found.start()], text[found.end() :]
        # An upright bar would end a cell of a table.
        equation = mathml(found[1]).replace("|", "&#124;")
        return _spaced(before) + equation + _spaced(after)
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0 or "|" in text:  # a lone mark, or what would end a cell of a table
        return plain(text)
    # `plain` trims its ends, where a space belongs.
    words = [part if place % 2 else plain(f"\0{part}\0").replace("\0", "") for place, part in enumerate(parts)]
    return "".join(f"`{word}`" if place % 2 else word for place, word in enumerate(words))


def _spaced(text: str) -> str:
    """The prose of a piece of text, with the spaces at its ends."""
    return " " * text[:1].isspace() + prose(text) + " " * (text.strip() != "" and text[-1:].isspace()) if text else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    head = "| " + " | ".join(columns) + " |"
    return "\n".join([head, "|" + " --- |" * len(columns), *("| " + " | ".join(row) + " |" for row in rows)])


_WORDS = {"works": "works", "partial": "in part", "planned": "planned"}


def badge(word: str) -> str:
    """A word in a coloured frame."""
    kind = re.sub(r"[^a-z]+", "-", word.lower())
    return f'<span class="badge badge-{kind}">{plain(_WORDS.get(word, word))}</span>'


def admonition(kind: str, title: str, blocks: Iterable[str]) -> str:
    """A framed note; title and blocks are Markdown already."""
    # A quotation mark would end the title; `plain` leaves none.
    return "\n".join([f'!!! {kind} "{title}"', *(f"    {block}\n" for block in blocks)])


def figure(name: str, alt: str, caption: str) -> str:
    """A picture that stands beside the page, with a caption that is Markdown already."""
    return (
        f'<figure markdown="span">\n![{plain(alt)}]({name}){{ .study loading=lazy }}\n'
        f'<figcaption markdown="span">{caption}</figcaption>\n</figure>'
    )


def front_matter(title: str, hide: Sequence[str] = (), boost: float = 1) -> str:
    """What MkDocs reads at the top of a page."""
    quoted = '"' + " ".join(title.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'
    hidden = f"\nhide: [{', '.join(hide)}]" if hide else ""
    return f"---\ntitle: {quoted}{hidden}\nsearch:\n  boost: {boost}\n---"
