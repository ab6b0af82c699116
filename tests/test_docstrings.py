"""Docstrings keep one form: how a paper is referred to, and how mathematics is written."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from trimtab import sources

IDENTIFIER = re.compile(r"\b(?:0[7-9]|[12]\d)(?:0[1-9]|1[0-2])\.\d{4,5}\b")
OTHER_MATHEMATICS = {
    r"\(…\)": re.compile(r"\\[()]"),
    r"\[…\]": re.compile(r"\\[\[\]]"),
    ":math:": re.compile(r":math:|\.\. math::"),
    "``…``": re.compile(r"``"),
}


def docstrings() -> Iterator[tuple[str, str]]:
    """Place and text of every docstring, but those that speak of the forms themselves."""
    for path in sorted(sources.PACKAGE.rglob("*.py")):
        name = path.relative_to(sources.PACKAGE)
        if name.parts[0] == "site":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{name}:{node.lineno}", node.value.value


def test_a_paper_is_referred_to_as_arxiv_and_its_identifier() -> None:
    wrong = [
        f"{place}: {text[max(0, found.start() - 12) : found.end()]!r}"
        for place, text in docstrings()
        for found in IDENTIFIER.finditer(text)
        if re.search(r"(^|[^\w])arXiv\s+$", text[: found.start()]) is None
    ]
    assert wrong == [], "write: arXiv 2007.00151"


@pytest.mark.parametrize("form", OTHER_MATHEMATICS)
def test_mathematics_stands_between_dollar_signs(form: str) -> None:
    wrong = [place for place, text in docstrings() if OTHER_MATHEMATICS[form].search(text)]
    assert wrong == [], r"write $x^2$ in a line, $$x^2$$ in one of its own, `x` for code"


def test_dollar_signs_come_in_pairs() -> None:
    # Markdown takes a dollar sign with a space inside it for an amount of money.
    for place, text in docstrings():
        plain = re.sub(r"`[^`\n]*`", "", text)
        inline = re.sub(r"\$\$.*?\$\$", "", plain, flags=re.DOTALL)
        assert inline.count("$") % 2 == 0, place
        assert not [part for part in inline.split("$")[1::2] if part != part.strip() or "\n\n" in part], place
