"""Whether tables, modules, tests, studies and results fit together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab import sources
from trimtab.catalog.names import is_exported
from trimtab.catalog.papers import CHECKOUT, PACKAGE, SOURCES, CatalogError

if TYPE_CHECKING:
    from trimtab.catalog import Catalog

_SLUG = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}")


def problems(catalog: Catalog) -> list[str]:
    """What does not fit together, each with its place; empty where all does."""
    return [*_table_problems(catalog), *_file_problems(catalog), *_result_problems(catalog)]


def _table_problems(catalog: Catalog) -> Iterator[str]:
    titles: dict[str, str] = {}
    for paper in catalog:
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
            if slug not in catalog.papers or slug == paper.slug:
                yield f"{where}: related {slug!r} is {'itself' if slug == paper.slug else 'not a paper'}"
        module = sources.module_file(f"trimtab.{paper.area}.{paper.slug}")
        if paper.use and module is None:
            yield f"{where}: use has names and there is no module {paper.area}/{paper.slug}.py"
        if module is not None and not paper.use:
            yield f"{where}: {paper.area}/{paper.slug}.py exists and use is empty"
        if paper.use and not paper.avoid:
            yield f"{where}: use has names and avoid does not say when to leave them"
        if paper.source not in (SOURCES if paper.use else ("", *SOURCES)):
            yield f"{where}: source must be one of {', '.join(SOURCES)}, got {paper.source!r}"
        for name in paper.use:
            if not re.fullmatch(rf"trimtab\.{paper.area}\.\w+", name):
                yield f"{where}: {name} is not a name of the area"
            elif not is_exported(name):
                yield f"{where}: {name} is not exported by {paper.area}/__init__.py"


def _file_problems(catalog: Catalog) -> Iterator[str]:
    for area in catalog.areas:
        if not catalog.areas[area]:
            yield f"{area}/__init__.py: has no docstring"
        for path in _modules(PACKAGE / area):
            if path.stem in catalog.papers and not _is_paper(catalog, path.stem, area):
                yield f"{area}/{path.name}: the paper belongs to area {catalog.papers[path.stem].area}"
        for path in _modules(PACKAGE / "studies" / area):
            if not _is_paper(catalog, path.stem, area):
                yield f"studies/{area}/{path.name}: {area}/papers.toml has no table [{path.stem}]"
        modules = {path.stem for path in (PACKAGE / area).rglob("*.py")}
        tests = CHECKOUT / "tests" / area if CHECKOUT else None
        for path in sorted(tests.glob("test_*.py")) if tests else ():
            name = path.stem.removeprefix("test_")
            if not _is_paper(catalog, name, area) and name not in modules and not (PACKAGE / area / name).is_dir():
                yield f"tests/{area}/{path.name}: neither a paper nor a module of the area"


def _result_problems(catalog: Catalog) -> Iterator[str]:
    for path in sorted(catalog.results.glob("*.json")):
        slug = path.stem
        if slug not in catalog.papers:
            yield f"results/{path.name}: no papers.toml has a table [{slug}]"
            continue
        area = catalog.papers[slug].area
        if sources.module_file(f"trimtab.studies.{area}.{slug}") is None:
            yield f"results/{path.name}: there is no study studies/{area}/{slug}.py"
        try:
            result = catalog.result(slug) or {}
        except CatalogError as error:
            yield str(error)
            continue
        if result.get("area") != area:
            yield f"results/{path.name}: area is {result.get('area')!r}, the table's is {area!r}"


def _modules(package: Path) -> list[Path]:
    """The modules and sub-packages of a package."""
    files = [path for path in package.glob("*.py") if path.name != "__init__.py"]
    return sorted([*files, *(path.parent for path in package.glob("*/__init__.py"))])


def _is_paper(catalog: Catalog, slug: str, area: str) -> bool:
    return slug in catalog.papers and catalog.papers[slug].area == area
