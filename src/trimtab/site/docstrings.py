"""What the docstrings of public names say, read from the files; nothing of the library is imported."""

from __future__ import annotations

import ast
import copy
import doctest
from collections.abc import Iterator
from functools import cache

from trimtab import fingerprint


@cache
def _module(name: str) -> ast.Module:
    """The module that defines a public name; an empty one where there is none."""
    package, _, attribute = name.rpartition(".")
    path = fingerprint.module_file(fingerprint.exports(package).get(attribute, ""))
    return ast.parse(path.read_text(encoding="utf-8")) if path else ast.Module([], [])


def _docstring(name: str) -> str | None:
    for node in _module(name).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name.rpartition(".")[2]:
            return ast.get_docstring(node) or ""
    return None


def documented(name: str) -> bool:
    """Whether a public name is a class or function that exists.

    Example:
        >>> documented("trimtab.losses.Nothing")
        False
    """
    return _docstring(name) is not None


def example(name: str) -> str:
    """The example in the docstring of a public name as a script, with the imports it needs; empty without one."""
    steps = doctest.DocTestParser().get_examples(_docstring(name) or "")
    code = "\n".join(line for step in steps for line in (step.source.rstrip(), *_output(step)))
    imports = sorted(_imports(name, code), key=lambda line: (line.startswith("from trimtab"), line))
    return "\n".join([*imports, "", code]) if steps else ""


def _output(step: doctest.Example) -> list[str]:
    return [f"# {line}" for line in step.want.splitlines()]


def _imports(name: str, code: str) -> Iterator[str]:
    """What the example takes from the module around it: public names of the area, and the module's own imports."""
    package = name.rpartition(".")[0]
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    bound = {alias.asname or alias.name for alias in _aliases(ast.parse(code))}
    bound |= {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    needed = {node.id for node in nodes} - bound
    public = sorted(needed & set(fingerprint.exports(package)))
    if public:
        yield f"from {package} import {', '.join(public)}"
    for node in copy.deepcopy(_module(name).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name) in needed - set(public)]
            if node.names:
                yield ast.unparse(node)


def _aliases(tree: ast.Module) -> Iterator[ast.alias]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from node.names
