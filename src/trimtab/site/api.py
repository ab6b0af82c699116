"""The index of public names, an area to a page, with the documentation of what no card shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trimtab import sources
from trimtab.catalog import Catalog
from trimtab.site.docstrings import documented, summary
from trimtab.site.text import front_matter, plain, prose, table

_ABOUT = {
    "data": "Loaders of the data sets that studies and examples use.",
    "nets": "The small networks that the tasks train.",
}


def packages(catalog: Catalog) -> dict[str, str]:
    """The packages that export something -> what they are about."""
    return {name: about for name, about in {**catalog.areas, **_ABOUT}.items() if sources.exports(f"trimtab.{name}")}


def index(catalog: Catalog) -> Iterator[str]:
    """The page over all areas."""
    yield front_matter("API", hide=["toc"])
    yield "# API"
    yield "Every public name, by area. What belongs to a paper is documented on its card, what methods share is here."
    rows = []
    for name, about in packages(catalog).items():
        places = _places(name, catalog, "../")
        links = (f"[`{own}`]({link if slug else f'{name}.md{link}'})" for own, slug, _, link in places)
        rows.append((f"[**{plain(name)}**]({name}.md)", plain(about), ", ".join(links)))
    yield table(("area", "about", "names"), rows)


def _places(package: str, catalog: Catalog, to_cards: str) -> Iterator[tuple[str, str | None, str, str]]:
    """Each public name of a package, its paper or none, what defines it, and the link to its documentation."""
    papers: Mapping[str, str] = {
        name: paper.slug for paper in catalog for name in paper.use if paper.area == package and documented(name)
    }
    for own, module in sorted(sources.exports(f"trimtab.{package}").items(), key=lambda entry: entry[0].lower()):
        slug = papers.get(f"trimtab.{package}.{own}")
        defined = f"trimtab.{package}.{own}" if module == f"trimtab.{package}" else f"{module}.{own}"
        yield own, slug, defined, (f"{to_cards}{package}/{slug}.md" if slug else "") + f"#{defined}"


def page(package: str, about: str, catalog: Catalog) -> Iterator[str]:
    """The page of an area: all names in a table, then the documentation of those that belong to no paper."""
    yield front_matter(f"API: {package}")
    yield f"# trimtab.{plain(package)}"
    yield plain(about)
    rows, shared = [], []
    for own, slug, defined, link in _places(package, catalog, "../"):
        name = f"trimtab.{package}.{own}"
        if slug is None:
            shared.append((name, own, defined))
        card = f"[{plain(slug)}](../{package}/{slug}.md)" if slug else "shared"
        rows.append((f"[`{own}`]({link})", prose(summary(name)), card))
    yield table(("name", "what it is", "paper"), rows)
    for name, own, defined in shared:
        yield f"::: {defined}\n    options:\n      heading: {name}\n      toc_label: {own}\n      heading_level: 2"
