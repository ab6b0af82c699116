r"""Turns the LaTeX of a page into MathML while the site is built, so that reading it needs no script.

MkDocs calls `on_page_content` for every page; the extension arithmatex has put `\(…\)` and `\[…\]` around the LaTeX.
"""

from __future__ import annotations

import html
import re
from typing import Any

_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, /, **_: Any) -> str:
    """The page with every equation as MathML."""
    return _EQUATION.sub(_as_mathml, content)


def _as_mathml(found: re.Match[str]) -> str:
    tag, latex = found[1], html.unescape(re.sub(r"<[^>]+>", "", found[2])).strip()
    return f'<{tag} class="equation">{mathml(latex[2:-2].strip(), block=tag == "div")}</{tag}>'


def mathml(latex: str, *, block: bool = False) -> str:
    r"""An equation as MathML; the LaTeX itself, as code, where it cannot be converted.

    Args:
        latex: the equation, without dollar signs or brackets.
        block: whether it stands in a line of its own.

    Example:
        >>> mathml(r"\lambda^2")
        '<math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">...<mi>&#x003BB;</mi>...
        >>> mathml(r"\frac{1")
        '<code>\\frac{1</code>'
    """
    from latex2mathml.converter import convert

    # Sizes of brackets are left to the browser, which stretches them where it must.
    plain = re.sub(r"\\(?:[bB]igg?[lrm]?)(?![a-zA-Z])", "", latex)
    try:
        return str(convert(plain, display="block" if block else "inline"))
    except Exception:  # the converter raises its own and built-in errors for LaTeX that it does not know
        return f"<code>{html.escape(latex)}</code>"
