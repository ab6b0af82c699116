"""The public names of the library, and the papers that they belong to; read from the files, nothing is imported."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from trimtab import sources
from trimtab.catalog.papers import read_areas, read_papers


def is_exported(name: str) -> bool:
    """Whether an area's `__init__.py` imports the name from a module that defines it; nothing is imported."""
    package, _, attribute = name.rpartition(".")
    module = sources.exports(package).get(attribute)
    path = sources.module_file(module) if module else None
    return path is not None and _defines(path, attribute)


def _defines(path: Path, name: str) -> bool:
    pattern = rf"^(?:(?:class|def|async def|type)\s+{name}\b|{name}\s*[:=])"
    return re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE) is not None


@cache
def owners() -> dict[str, str]:
    """Public name, with its area and without -> slug of its paper: `losses.ELR` and `ELR` -> `elr`."""
    papers = read_papers()
    names = [(name.removeprefix("trimtab."), paper.slug) for paper in papers.values() for name in paper.use]
    for area in read_areas():
        for name, module in sources.exports(f"trimtab.{area}").items():
            slug = module.removeprefix(f"trimtab.{area}.").partition(".")[0]
            if slug in papers:
                names.append((f"{area}.{name}", slug))
    found: dict[str, str] = {}
    for name, slug in names:
        found.setdefault(name, slug)
        found.setdefault(name.rpartition(".")[2], slug)
    return found
