"""The faces of the packages: public names that are imported when they are first used.

A package's `__init__.py` holds its docstring and one table of names, written as the imports that type checkers,
editors and import-linter read anyway, and which are not run:

    from typing import TYPE_CHECKING

    from trimtab.faces import import_lazily

    if TYPE_CHECKING:
        from trimtab.losses.elr import ELR as ELR
        from trimtab.losses.elr import elr_penalty as elr_penalty
    else:
        import_lazily(__name__)

`losses.ELR` then imports the one module that defines it, so that nobody pays for a neighbour's SciPy.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from functools import cache
from types import ModuleType
from typing import Any


def import_lazily(package: str) -> None:
    """Makes the names in the table of a package's `__init__.py` attributes that are imported on first use.

    Args:
        package: the package's `__name__`.
    """
    sys.modules[package].__class__ = _Face


def read_table(text: str, package: str) -> dict[str, str]:
    """Public name -> the module that defines it, from the text of a package's `__init__.py`.

    Args:
        text: the file's text.
        package: the package's name; a name whose module is the package itself is one of its submodules.

    Example:
        >>> read_table("if TYPE_CHECKING:\\n    from trimtab.losses.elr import ELR as ELR", "trimtab.losses")
        {'ELR': 'trimtab.losses.elr'}
    """
    found = {}
    for block in ast.parse(text).body:
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING":
            for node in block.body:
                if isinstance(node, ast.ImportFrom):
                    relative = f"{package}.{node.module}" if node.module else package
                    source = relative if node.level else node.module or ""
                    found.update({alias.asname or alias.name: source for alias in node.names})
    return found


@cache
def _table(package: str) -> dict[str, str]:
    text = pkgutil.get_data(package, "__init__.py") or b""
    return read_table(text.decode("utf-8"), package)


class _Face(ModuleType):
    """A package that imports what its table names when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        package = self.__name__
        if name == "__all__":
            return list(_table(package))
        # Names such as __path__ and __wrapped__ are asked for by the machinery of imports and of inspection.
        source = None if name.startswith("__") else _table(package).get(name)
        if source is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if source == package:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(source), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule trimtab.diffusion.deis sets it on its package, where the name is the function's.
        package = self.__name__
        is_submodule = isinstance(value, ModuleType) and value.__name__ == f"{package}.{name}"
        if not (is_submodule and _table(package).get(name, package) != package):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return importlib.import_module, (self.__name__,)  # workers import it for themselves, as any module

    def __dir__(self) -> list[str]:
        return [*(name for name in vars(self) if name.startswith("__")), *_table(self.__name__)]
