"""The tables of papers: one `papers.toml` an area, one table a paper."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from trimtab import sources
from trimtab.catalog.spelling import nearest

PACKAGE = sources.PACKAGE
CHECKOUT: Path | None = PACKAGE.parent.parent if PACKAGE.parent.name == "src" else None
"""The root of the repository, where the package lies in one; None where it is installed from a wheel."""

SOURCES = ("code", "paper", "abstract")
"""What a method can have been built from."""


class CatalogError(ValueError):
    """A papers.toml or a result that cannot be read."""


class UnknownNameError(LookupError):
    """A name that is not there, with the nearest one that is.

    Attributes:
        kind: what was looked up, as "area".
        name: what was asked for.
        nearest: the known name that is spelt most like it, or None where none is near.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        self.nearest = nearest(name, known)
        hint = f"; did you mean {self.nearest!r}?" if self.nearest else hint
        super().__init__(f"unknown {kind} {name!r}{hint}")


class UnknownPaperError(UnknownNameError):
    """A name that no paper has."""


@dataclass(frozen=True)
class Paper:
    """One table of a papers.toml.

    Attributes:
        slug: the name of the paper's module, table, study, test file and result.
        area: the sub-package that the paper's parts live in.
        title: the paper's title.
        year: of its first appearance.
        summary: what it does, in one sentence.
        claim: what the study tests, with numbers.
        use: the public names, in full (`trimtab.losses.ELR`); empty until they exist.
        keywords: terms to find it by.
        related: slugs of papers near to it.
        arxiv: the arXiv identifier, where there is one.
        venue: where it was published.
        authors: in the order of the paper.
        peers: packages that offer the same method.
        helps: what a user has to have for the method to be of use, as "noisy labels"; papers of equal words are
            shown side by side.
        avoid: when not to use it, as words that follow "not when"; empty until it is built.
        source: what the method was built from: the authors' "code", the "paper" or its "abstract"; empty until it is
            built.
    """

    slug: str
    area: str
    title: str
    year: int
    summary: str
    claim: str
    use: tuple[str, ...]
    keywords: tuple[str, ...]
    related: tuple[str, ...]
    arxiv: str = ""
    venue: str = ""
    authors: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()
    avoid: str = ""
    source: str = ""

    @classmethod
    def from_table(cls, slug: str, area: str, table: dict[str, Any]) -> Paper:
        """The paper of one table.

        Raises:
            CatalogError: if a key is missing, unknown or of the wrong type.
        """
        types = {item.name: item.type for item in fields(cls) if item.name not in ("slug", "area")}
        required = {item.name for item in fields(cls) if item.default is MISSING} - {"slug", "area"}
        where = f"{area}/papers.toml, [{slug}]"
        if not isinstance(table, dict):
            raise CatalogError(f"{where}: a table is wanted, not a {type(table).__name__}")
        for kind, names in (("missing", required - set(table)), ("unknown", set(table) - set(types))):
            if names:
                raise CatalogError(f"{where}: {kind} key {', '.join(sorted(names))}")
        values: dict[str, Any] = {}
        for name, value in table.items():
            if types[name].startswith("tuple"):
                valid = isinstance(value, list) and all(isinstance(item, str) for item in value)
                values[name] = tuple(value) if valid else None
            else:
                valid = type(value).__name__ == types[name]
                values[name] = value
            if not valid:
                wanted = "a list of strings" if types[name].startswith("tuple") else types[name]
                raise CatalogError(f"{where}: {name} must be {wanted}, got {value!r}")
        return cls(slug=slug, area=area, **values)

    @property
    def url(self) -> str:
        """The paper's page at arXiv, or an empty string."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""


@cache
def read_papers() -> dict[str, Paper]:
    """Slug -> paper, area by area; read once.

    Raises:
        CatalogError: if a papers.toml cannot be read or holds something else.
    """
    found: dict[str, Paper] = {}
    for path in _files():
        area = path.parent.name
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise CatalogError(f"{path} cannot be read: {error}") from None
        for slug, table in tables.items():
            if slug in found:
                raise CatalogError(f"{path}: [{slug}] is a table of area {found[slug].area} already")
            found[slug] = Paper.from_table(slug, area, table)
    return found


@cache
def read_areas() -> dict[str, str]:
    """Area -> what it is about, the first line of its docstring; read once."""
    return {path.parent.name: _first_line(path.with_name("__init__.py")) for path in _files()}


def _files() -> list[Path]:
    return sorted(PACKAGE.glob("*/papers.toml"))


def _first_line(path: Path) -> str:
    if not path.is_file():
        return ""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
