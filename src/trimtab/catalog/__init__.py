"""The papers: what each is about, where its parts stand, and whether they work.

Every area has a `papers.toml` with one table per paper. This package reads them, finds a paper by its slug, by a
public name or by a search in words, and computes from the files what state a paper is in. It imports neither PyTorch
nor NumPy, and no part of the library, so that it answers in milliseconds.

Example:
    >>> papers = Catalog()
    >>> papers["elr"].area
    'losses'
    >>> papers.find("losses.ELR").slug
    'elr'
    >>> [paper.slug for paper in papers.search("early lerning regularisation").papers][0]
    'elr'
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from trimtab.catalog import integrity, search, shapes
from trimtab.catalog.names import is_exported, owners
from trimtab.catalog.papers import (
    CHECKOUT,
    PACKAGE,
    SOURCES,
    CatalogError,
    Paper,
    UnknownNameError,
    UnknownPaperError,
    read_areas,
    read_papers,
)
from trimtab.catalog.search import Hits
from trimtab.catalog.shapes import VERDICTS
from trimtab.catalog.spelling import nearest

__all__ = [
    "CHECKOUT",
    "PACKAGE",
    "SOURCES",
    "STATES",
    "VERDICTS",
    "Catalog",
    "CatalogError",
    "Hits",
    "Paper",
    "State",
    "Status",
    "UnknownNameError",
    "UnknownPaperError",
    "is_exported",
    "nearest",
]

State = Literal["planned", "partial", "works"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Status:
    """What state a paper is in.

    Attributes:
        state: `works`, `partial` or `planned`.
        missing: what stands between the paper and `works`, in words.
    """

    state: State
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Catalog:
    """All papers of the library; the tables are read once, however many catalogues there are.

    Args:
        results: the folder of the studies' outcomes; by default `results/` at the root of a checkout, and the
            package's own copy where it is installed from a wheel.
    """

    results: Path = (CHECKOUT or PACKAGE) / "results"

    @property
    def papers(self) -> dict[str, Paper]:
        """Slug -> paper, area by area.

        Raises:
            CatalogError: if a papers.toml cannot be read or holds something else.
        """
        return read_papers()

    @property
    def areas(self) -> dict[str, str]:
        """Area -> what it is about, the first line of its docstring."""
        return read_areas()

    def __getitem__(self, slug: str) -> Paper:
        """The paper of a slug; case and the kind of dash do not matter.

        Raises:
            UnknownPaperError: if there is none; it names the nearest.
        """
        plain = _plain(slug)
        if plain not in self.papers:
            raise UnknownPaperError("paper", slug, self.papers)
        return self.papers[plain]

    def __iter__(self) -> Iterator[Paper]:
        return iter(self.papers.values())

    def __len__(self) -> int:
        return len(self.papers)

    def find(self, text: str) -> Paper:
        """The paper of a slug, of a public name (`ELR`, `losses.ELR`) or of an arXiv identifier.

        Raises:
            UnknownPaperError: if there is none; it names what is spelt most like it, or else what is about it.
        """
        if _plain(text) in self.papers:
            return self[text]
        name, names = text.strip().removeprefix("trimtab."), owners()
        if name not in names:
            name = next((known for known in names if known.lower() == name.lower()), name)
        if name in names:
            return self.papers[names[name]]
        identifier = text.strip().lower().removeprefix("arxiv:")
        for paper in self:
            if paper.arxiv and paper.arxiv == identifier:
                return paper
        about = [paper.slug for paper in self.search(text, 3).papers] if re.search(r"[a-z0-9]", text.lower()) else []
        hint = f"; near to it in meaning: {', '.join(about)}" if about else ""
        raise UnknownPaperError("paper", text, [*self.papers, *names], hint)

    def area(self, name: str) -> list[Paper]:
        """The papers of one area.

        Raises:
            UnknownNameError: if there is no such area; it names the nearest.
        """
        if name not in self.areas:
            raise UnknownNameError("area", name, self.areas)
        return [paper for paper in self if paper.area == name]

    def search(self, query: str, limit: int = 20) -> Hits:
        """The papers that a query in words is about, those with usable parts first; none rather than a poor match.

        A word that no paper has is replaced by the most similar one that some have.

        Raises:
            ValueError: if the query has no word or the limit is not positive.
        """
        return search.search(query, limit)

    def result(self, slug: str) -> dict[str, Any] | None:
        """The outcome of a paper's study as the runner wrote it, or None where there is none.

        Raises:
            CatalogError: if the file is there and does not hold a result.
        """
        path = self.results / f"{slug}.json"
        if not path.is_file():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CatalogError(f"{path} cannot be read: {error}") from None
        if problem := _malformed(result, slug):
            raise CatalogError(f"{path} is not a result of {slug}: {problem}")
        return cast("dict[str, Any]", result)

    def outcomes(self) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Slug -> result of all papers that have one, and what is wrong with the files that were set aside."""
        found, problems = {}, []
        for slug in self.papers:
            try:
                if result := self.result(slug):
                    found[slug] = result
            except CatalogError as error:
                problems.append(str(error))
        return found, problems

    def status(self, slug: str) -> Status:
        """The state of a paper, computed from its names, its test file and its result."""
        paper = self[slug]
        missing = []
        exported = [name for name in paper.use if is_exported(name)]
        if not paper.use:
            missing.append("no public name yet")
        missing += [f"{name} is not exported" for name in paper.use if name not in exported]
        test = f"tests/{paper.area}/test_{slug}.py"
        tested = CHECKOUT is not None and (CHECKOUT / test).is_file()
        if CHECKOUT is not None and not tested:  # a wheel has no tests
            missing.append(f"no {test}")
        result, problem = None, f"no result {slug}.json"
        try:
            result = self.result(slug)
        except CatalogError as error:
            problem = str(error)
        if result is None:
            missing.append(problem)
        if not missing:
            return Status("works")
        return Status("partial" if exported or tested or result else "planned", tuple(missing))

    def integrity(self) -> list[str]:
        """What does not fit together between tables, modules, tests, studies and results; empty where all does."""
        return integrity.problems(self)


def _plain(slug: str) -> str:
    return slug.strip().lower().replace("-", "_")


def _malformed(result: object, slug: str) -> str:
    """What keeps a file from being the result of a paper, in words; empty where nothing does."""
    return shapes.misfit(result, {**shapes.RESULT, "paper": slug})
