"""What the docstrings of public names say, read from the files; nothing of the library is imported."""

from __future__ import annotations

import ast
from functools import cache

from trimtab import fingerprint


@cache
def _definitions(module: str) -> dict[str, str]:
    """Name -> docstring, of the classes and functions of a module."""
    path = fingerprint.module_file(module)
    tree = ast.parse(path.read_text(encoding="utf-8")) if path else ast.Module([], [])
    return {
        node.name: ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _docstring(name: str) -> str | None:
    package, _, attribute = name.rpartition(".")
    return _definitions(fingerprint.exports(package).get(attribute, "")).get(attribute)


def documented(name: str) -> bool:
    """Whether a public name is a class or function that exists.

    Example:
        >>> documented("trimtab.losses.Nothing")
        False
    """
    return _docstring(name) is not None


def example(name: str) -> str:
    """The example in the docstring of a public name, with its prompts; empty where there is none."""
    docstring = _docstring(name) or ""
    return docstring[docstring.index(">>>") :] if ">>>" in docstring else ""
