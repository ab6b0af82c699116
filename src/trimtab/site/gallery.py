"""The gallery: the examples of `docs/gallery` as pages, what they show first and then their code."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.site.text import front_matter, plain, prose, table


@dataclass(frozen=True)
class Example:
    """A script of the gallery.

    Attributes:
        name: of its file, without the ending.
        title: what it does, in a few words.
        about: what it shows.
        code: the script without its docstring.
    """

    name: str
    title: str
    about: str
    code: str


def read(folder: Path) -> list[Example]:
    """The examples of a folder; none where there is no such folder, as in a wheel."""
    found = []
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        title, _, about = (ast.get_docstring(tree) or path.stem).partition("\n\n")
        first = tree.body[1].lineno if len(tree.body) > 1 else 1
        code = "\n".join(text.splitlines()[first - 1 :])
        found.append(Example(path.stem, title.rstrip("."), about, code))
    return found


def index(examples: Sequence[Example]) -> Iterator[str]:
    """The page over all examples."""
    yield front_matter("Gallery", hide=["navigation", "toc"])
    yield "# Gallery"
    yield "Short scripts that run as they stand, on a laptop and without a download; the tests run every one of them."
    yield table(
        ("example", "what it shows"),
        ((f"[**{plain(example.title)}**]({example.name}.md)", prose(example.about)) for example in examples),
    )


def page(example: Example) -> Iterator[str]:
    """The page of one example."""
    yield front_matter(example.title, hide=["toc"])
    yield f"# {plain(example.title)}"
    yield prose(example.about)
    yield f'```python title="docs/gallery/{example.name}.py"\n{example.code}\n```'
