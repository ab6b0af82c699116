"""Where the modules of this package stand, and what its packages export, read from the files as text.

Nothing is imported or run, so that the answer is there in milliseconds and without PyTorch.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from trimtab import faces

PACKAGE = Path(__file__).parent
"""The folder of the package `trimtab`; names of files are paths relative to its parent."""


def name_of(path: Path) -> str:
    """`trimtab/losses/elr.py` for a file of the package."""
    return path.relative_to(PACKAGE.parent).as_posix()


def module_file(module: str) -> Path | None:
    """The file of a module of this package, or None for anything else."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return None
    base = PACKAGE.parent.joinpath(*parts)
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


@cache
def exports(package: str) -> dict[str, str]:
    """Public name -> defining module, read from the table in a package's `__init__.py`; re-exports are followed."""
    path = module_file(package)
    if path is None or path.name != "__init__.py":
        return {}
    table = faces.read_table(path.read_text(encoding="utf-8"), package)
    return {name: source if source == package else _defining(source, name) for name, source in table.items()}


def _defining(module: str, name: str) -> str:
    path = module_file(module)
    if path is not None and path.name == "__init__.py":
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
                source = absolute(node, module, is_package=True)
                return module if source == module else _defining(source, name)
    return module


def absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    """The module that a `from … import` names, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, *([node.module] if node.module else [])])
