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
        names = ", ".join(f"`{own}`" for own in sorted(sources.exports(f"trimtab.{name}"), key=str.lower))
        rows.append((f"[**{plain(name)}**]({name}.md)", plain(about), names))
    yield table(("area", "about", "names"), rows)


def page(package: str, about: str, catalog: Catalog) -> Iterator[str]:
    """The page of an area: all names in a table, then the documentation of those that belong to no paper."""
    papers: Mapping[str, str] = {
        name: paper.slug for paper in catalog for name in paper.use if paper.area == package and documented(name)
    }
    exported = sources.exports(f"trimtab.{package}")
    yield front_matter(f"API: {package}")
    yield f"# trimtab.{plain(package)}"
    yield plain(about)
    rows, shared = [], []
    for own, module in sorted(exported.items(), key=lambda entry: entry[0].lower()):
        name = f"trimtab.{package}.{own}"
        slug = papers.get(name)
        if slug is None:
            shared.append((name, own, name if module == f"trimtab.{package}" else f"{module}.{own}"))
        link = f"../{package}/{slug}.md#api" if slug else f"#{shared[-1][2]}"
        card = f"[{plain(slug)}](../{package}/{slug}.md)" if slug else "shared"
        rows.append((f"[`{own}`]({link})", prose(summary(name)), card))
    yield table(("name", "what it is", "paper"), rows)
    for name, own, defined in shared:
        yield f"::: {defined}\n    options:\n      heading: {name}\n      toc_label: {own}\n      heading_level: 2"
