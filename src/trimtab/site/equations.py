r"""Turns the LaTeX of a page into MathML while the site is built, so that reading it needs no script.

MkDocs calls `on_page_content` for every page; the extension arithmatex has put `\(…\)` and `\[…\]` around the LaTeX.
"""

from __future__ import annotations

import html
import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from math_core import LatexToMathML

_EQUATION = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, /, **_: Any) -> str:
    """The page with every equation as MathML."""
    return _EQUATION.sub(_as_mathml, content)


def _as_mathml(found: re.Match[str]) -> str:
    tag, latex = found[1], html.unescape(re.sub(r"<[^>]+>", "", found[2])).strip()
    # Two equations without an empty line between them come as one.
    parts = re.split(r"\s*\$\$\s*\$\$\s*", latex[2:-2].strip())
    return "\n".join(f'<{tag} class="equation">{mathml(part, block=tag == "div")}</{tag}>' for part in parts)


def mathml(latex: str, *, block: bool = False) -> str:
    r"""An equation as MathML; the LaTeX itself, as code, where it cannot be converted.

    Args:
        latex: the equation, without dollar signs or brackets.
        block: whether it stands in a line of its own.

    Example:
        >>> mathml(r"\lambda^2")
        '<math><msup><mi>λ</mi><mn>2</mn></msup></math>'
        >>> mathml(r"\frac{1")
        '<code>\\frac{1</code>'
    """
    from math_core import LatexError

    try:
        return _converter().convert_with_local_state(latex, displaystyle=block)
    except LatexError:
        return f"<code>{html.escape(latex)}</code>"


@cache
def _converter() -> LatexToMathML:
    from math_core import LatexToMathML

    macros = {"argmin": r"\operatorname*{arg\,min}", "argmax": r"\operatorname*{arg\,max}"}
    return LatexToMathML(macros=macros, allow_unreliable_rendering=True)
