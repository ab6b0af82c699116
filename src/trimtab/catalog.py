"""The papers: what each is about, where its parts stand, and whether they work.

Every area has a `papers.toml` with one table per paper. This module reads them, finds a paper by its slug or by a
search in words, and computes from the files what state a paper is in. It imports neither PyTorch nor NumPy, and no
part of the library, so that it answers in milliseconds.

Example:
    >>> papers = Catalog()
    >>> papers["elr"].area
    'losses'
    >>> [paper.slug for paper in papers.search("early lerning regularisation").papers][0]
    'elr'
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from trimtab import fingerprint

State = Literal["planned", "partial", "works"]
STATES: tuple[State, ...] = get_args(State)
SOURCES = ("code", "paper", "abstract")
"""What a method can have been built from."""

PACKAGE = fingerprint.PACKAGE
CHECKOUT: Path | None = PACKAGE.parent.parent if PACKAGE.parent.name == "src" else None
"""The root of the repository, where the package lies in one; None where it is installed from a wheel."""

_SLUG = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}")
_WORD = re.compile(r"[a-z0-9]+")
_BRITISH = re.compile(r"(?<=[a-z]{3})(?<!no)(?<!w)(?<!c)is(?=(e|ed|es|er|ers|ing|ation|ations)\b)")
_STOP_WORDS = frozenset(
    {"a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "how", "in", "is", "it", "of", "on", "or", "that"}
    | {"the", "this", "to", "what", "when", "with"}
)


class CatalogError(ValueError):
    """A papers.toml or a result that cannot be read."""


class UnknownNameError(LookupError):
    """A name that is not there, with the nearest one that is."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.kind, self.name = kind, name
        self.nearest = nearest(name, known)
        hint = f"; did you mean {self.nearest!r}?" if self.nearest else ""
        super().__init__(f"unknown {kind} {name!r}{hint}")


class UnknownPaperError(UnknownNameError):
    """A slug that no area has."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where none is near.

    Example:
        >>> nearest("adabelif", ["adamp", "adabelief", "saf"])
        'adabelief'
        >>> nearest("transformer", ["adamp", "saf"]) is None
        True
    """
    from rapidfuzz import process
    from rapidfuzz.distance import JaroWinkler

    found = process.extractOne(name.lower(), list(known), scorer=JaroWinkler.normalized_similarity, score_cutoff=0.75)
    return found[0] if found else None


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
class Hits:
    """What a search found.

    Attributes:
        papers: best first.
        corrections: words of the query that no paper has -> the word that was searched instead.
    """

    papers: tuple[Paper, ...]
    corrections: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Catalog:
    """All papers of the library.

    Args:
        results: the folder of the studies' outcomes; by default `results/` at the root of a checkout, and the
            package's own copy where it is installed from a wheel.
    """

    results: Path = (CHECKOUT or PACKAGE) / "results"

    @cached_property
    def papers(self) -> dict[str, Paper]:
        """Slug -> paper, area by area.

        Raises:
            CatalogError: if a papers.toml cannot be read or holds something else.
        """
        found: dict[str, Paper] = {}
        for path in self._tables():
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

    @cached_property
    def areas(self) -> dict[str, str]:
        """Area -> what it is about, the first line of its docstring."""
        return {path.parent.name: _first_line(path.with_name("__init__.py")) for path in self._tables()}

    def __getitem__(self, slug: str) -> Paper:
        """The paper of a slug; case and the kind of dash do not matter.

        Raises:
            UnknownPaperError: if there is none; it names the nearest.
        """
        plain = slug.strip().lower().replace("-", "_")
        if plain not in self.papers:
            raise UnknownPaperError("paper", slug, self.papers)
        return self.papers[plain]

    def __iter__(self) -> Iterator[Paper]:
        return iter(self.papers.values())

    def __len__(self) -> int:
        return len(self.papers)

    def area(self, name: str) -> list[Paper]:
        """The papers of one area.

        Raises:
            UnknownNameError: if there is no such area; it names the nearest.
        """
        if name not in self.areas:
            raise UnknownNameError("area", name, self.areas)
        return [paper for paper in self if paper.area == name]

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
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CatalogError(f"{path} cannot be read: {error}") from None
        if not isinstance(result, dict) or result.get("paper") != slug:
            raise CatalogError(f"{path} is not a result of {slug}")
        return cast("dict[str, Any]", result)

    def is_fresh(self, result: dict[str, Any]) -> bool:
        """Whether a result belongs to the code that stands here."""
        sources = result.get("sources") or {}
        return bool(sources) and all(
            _unchanged(name, hashes["raw"], hashes["code"]) for name, hashes in sources.items()
        )

    def status(self, slug: str) -> Status:
        """The state of a paper, computed from its names, its test file and its result."""
        paper = self[slug]
        missing = []
        exported = [name for name in paper.use if is_exported(name)]
        if not paper.use:
            missing.append("no public name yet")
        missing += [f"{name} is not exported" for name in paper.use if name not in exported]
        result, problem = None, f"no result {slug}.json"
        try:
            result = self.result(slug)
        except CatalogError as error:
            problem = str(error)
        if CHECKOUT is not None:
            test = f"tests/{paper.area}/test_{slug}.py"
            tested = (CHECKOUT / test).is_file()
        else:
            test = "test file"
            tested = bool(result and result.get("test"))
        if not tested:
            missing.append(f"no {test}")
        if result is None:
            missing.append(problem)
        elif not self.is_fresh(result):
            missing.append("the result is stale: the code has changed since")
        if not missing:
            return Status("works")
        return Status("partial" if exported or tested or result else "planned", tuple(missing))

    def search(self, query: str, limit: int = 20) -> Hits:
        """The papers that a query in words is about, best first.

        Papers with all of the words come before those with some. A word that no paper has is replaced by the most
        similar one that some have.

        Raises:
            ValueError: if the query has no word or the limit is not positive.
        """
        words = list(dict.fromkeys(_words(query)))
        words = [word for word in words if word not in _STOP_WORDS] or words
        if not words:
            raise ValueError(f"query: expected at least one word, got {query!r}")
        if limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        index = self._index
        corrections: dict[str, str] = {}
        terms = []
        for word in words:
            if index.execute("SELECT 1 FROM papers WHERE papers MATCH ? LIMIT 1", (f'"{word}"',)).fetchone():
                terms.append(f'"{word}"')
            elif len(word) >= 3 and any(known.startswith(word) for known in self._vocabulary):
                terms.append(f'"{word}"*')
            elif corrected := _correct(word, self._vocabulary):
                corrections[word] = corrected
                terms.append(f'"{corrected}"')
        slugs: dict[str, None] = {}
        # A term in the slug or the title tells more than one in the claim.
        ranked = "SELECT slug FROM papers WHERE papers MATCH ? ORDER BY bm25(papers, 12, 8, 6, 4, 2, 3, 2, 1) LIMIT ?"
        for operator in (" AND ", " OR ") if terms else ():
            slugs |= {row[0]: None for row in index.execute(ranked, (operator.join(terms), limit))}
        return Hits(tuple(self.papers[slug] for slug in list(slugs)[:limit]), corrections)

    @cached_property
    def _index(self) -> Any:
        import sqlite3

        index = sqlite3.connect(":memory:")
        index.execute(
            "CREATE VIRTUAL TABLE papers USING fts5"
            "(slug, title, keywords, summary, claim, names, area, authors, tokenize = 'porter unicode61')"
        )
        index.executemany(f"INSERT INTO papers VALUES ({', '.join('?' * 8)})", self._documents())
        return index

    def _documents(self) -> Iterator[tuple[str, ...]]:
        for paper in self:
            keywords, authors = ", ".join(paper.keywords), ", ".join(paper.authors)
            names = " ".join(name.rpartition(".")[2] for name in paper.use)
            area = f"{paper.area} {self.areas[paper.area]}"
            texts = (paper.title, keywords, paper.summary, paper.claim, names, area, authors)
            yield paper.slug, *(" ".join(_words(text)) for text in texts)

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        """Word -> in how many papers it occurs."""
        counts: dict[str, int] = {}
        for document in self._documents():
            for word in set(_words(" ".join(document))):
                counts[word] = counts.get(word, 0) + 1
        return counts

    def _tables(self) -> list[Path]:
        return sorted(PACKAGE.glob("*/papers.toml"))

    def integrity(self) -> list[str]:
        """What does not fit together between tables, modules, tests, studies and results; empty where all does."""
        return [*self._table_problems(), *self._file_problems(), *self._result_problems()]

    def _table_problems(self) -> Iterator[str]:
        titles: dict[str, str] = {}
        for paper in self:
            where = f"{paper.area}/papers.toml, [{paper.slug}]"
            if not _SLUG.fullmatch(paper.slug):
                yield f"{where}: a slug is lower case letters, digits and single underscores"
            if paper.arxiv and not _ARXIV.fullmatch(paper.arxiv):
                yield f"{where}: arxiv {paper.arxiv!r} is not an identifier"
            if not 1950 <= paper.year <= 2100:
                yield f"{where}: year {paper.year} is out of range"
            for name in ("title", "summary", "claim", "keywords"):
                if not getattr(paper, name):
                    yield f"{where}: {name} is empty"
            if (other := titles.setdefault(paper.title.casefold(), paper.slug)) != paper.slug:
                yield f"{where}: has the title of [{other}]"
            for name in ("use", "keywords", "related"):
                if len(set(getattr(paper, name))) < len(getattr(paper, name)):
                    yield f"{where}: {name} has an entry twice"
            for slug in paper.related:
                if slug not in self.papers or slug == paper.slug:
                    yield f"{where}: related {slug!r} is {'itself' if slug == paper.slug else 'not a paper'}"
            module = fingerprint.module_file(f"trimtab.{paper.area}.{paper.slug}")
            if paper.use and module is None:
                yield f"{where}: use has names and there is no module {paper.area}/{paper.slug}.py"
            if module is not None and not paper.use:
                yield f"{where}: {paper.area}/{paper.slug}.py exists and use is empty"
            if paper.source not in (SOURCES if paper.use else ("", *SOURCES)):
                yield f"{where}: source must be one of {', '.join(SOURCES)}, got {paper.source!r}"
            for name in paper.use:
                if not re.fullmatch(rf"trimtab\.{paper.area}\.\w+", name):
                    yield f"{where}: {name} is not a name of the area"
                elif not is_exported(name):
                    yield f"{where}: {name} is not exported by {paper.area}/__init__.py"

    def _file_problems(self) -> Iterator[str]:
        for area in self.areas:
            if not self.areas[area]:
                yield f"{area}/__init__.py: has no docstring"
            modules = {path.stem for path in (PACKAGE / area).glob("*.py")}
            for name in sorted(modules & set(self.papers)):
                if self.papers[name].area != area:
                    yield f"{area}/{name}.py: the paper belongs to area {self.papers[name].area}"
            for path in sorted((PACKAGE / "studies" / area).glob("*.py")):
                if path.name != "__init__.py" and not self._is_paper(path.stem, area):
                    yield f"studies/{area}/{path.name}: {area}/papers.toml has no table [{path.stem}]"
            tests = CHECKOUT / "tests" / area if CHECKOUT else None
            for path in sorted(tests.glob("test_*.py")) if tests else ():
                name = path.stem.removeprefix("test_")
                if not self._is_paper(name, area) and name not in modules:
                    yield f"tests/{area}/{path.name}: neither a paper nor a module of the area"

    def _result_problems(self) -> Iterator[str]:
        for path in sorted(self.results.glob("*.json")):
            slug = path.stem
            if slug not in self.papers:
                yield f"results/{path.name}: no papers.toml has a table [{slug}]"
                continue
            area = self.papers[slug].area
            if not (PACKAGE / "studies" / area / f"{slug}.py").is_file():
                yield f"results/{path.name}: there is no study studies/{area}/{slug}.py"
            try:
                result = self.result(slug) or {}
            except CatalogError as error:
                yield str(error)
                continue
            if result.get("area") != area:
                yield f"results/{path.name}: area is {result.get('area')!r}, the table's is {area!r}"
            if not self.is_fresh(result):
                yield f"results/{path.name}: stale, the code has changed since; run the study again"

    def _is_paper(self, slug: str, area: str) -> bool:
        return slug in self.papers and self.papers[slug].area == area


def is_exported(name: str) -> bool:
    """Whether an area's `__init__.py` imports the name from a module that defines it; nothing is imported."""
    package, _, attribute = name.rpartition(".")
    module = fingerprint.exports(package).get(attribute)
    path = fingerprint.module_file(module) if module else None
    return path is not None and _defines(path, attribute)


def _defines(path: Path, name: str) -> bool:
    pattern = rf"^(?:(?:class|def|async def|type)\s+{name}\b|{name}\s*[:=])"
    return re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE) is not None


@cache
def _unchanged(name: str, raw: str, code: str) -> bool:
    # Studies share most of their sources, so that each file is hashed once for all of them.
    return fingerprint.is_fresh({name: {"raw": raw, "code": code}})


def _first_line(path: Path) -> str:
    import ast

    if not path.is_file():
        return ""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def _words(text: str) -> list[str]:
    """The words of a text in lower case, with -ize for -ise, so that either spelling finds the other."""
    return _WORD.findall(_BRITISH.sub("iz", text.lower()))


def _correct(word: str, vocabulary: dict[str, int]) -> str | None:
    """The known word with the fewest slips of the finger to `word`; a common one rather than a rare one."""
    from rapidfuzz.distance import OSA, JaroWinkler

    limit = 1 if len(word) < 5 else 2 if len(word) < 9 else 3
    near: Sequence[tuple[int, float, int, str]] = sorted(
        (slips, -JaroWinkler.similarity(word, known), -count, known)
        for known, count in vocabulary.items()
        if abs(len(known) - len(word)) <= limit and (slips := OSA.distance(word, known, score_cutoff=limit)) <= limit
    )
    return near[0][3] if near else None
