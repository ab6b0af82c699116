"""Who an arm is: a text that names everything its numbers depend on, and the source files behind it.

Two arms with the same identity are the same contestant, so a baseline that several studies share runs once; and a
stored run whose sources have changed since is known to be stale.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from trimtab import fingerprint
from trimtab.studies.study import Arm

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Path)


def identity(arm: Arm) -> str:
    """The arm's text: its task with all fields, and the options it brings, code of lambdas included."""
    return describe(arm)


def describe(value: Any) -> str:
    """A text that is equal for equal contestants.

    Named functions and classes are given by name (their code is tracked through `sources`). Lambdas, local functions
    and those of a study's own module are given by their source text with the values they use, so that a change to a
    study's claims or notes leaves its arms what they were.

    Raises:
        TypeError: the value has no stable text (an object made at import, say); pass a factory instead.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{describe(k)}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        parts = sorted(map(describe, value)) if isinstance(value, set | frozenset) else map(describe, value)
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, functools.partial):
        return f"partial({describe(value.func)}, {describe(value.args)}, {describe(value.keywords)})"
    if isinstance(value, types.MethodType):
        return f"{describe(value.__self__)}.{value.__name__}"
    if is_dataclass(value) and not isinstance(value, type):
        held = ", ".join(f"{f.name}={describe(getattr(value, f.name))}" for f in fields(value) if f.compare)
        return f"{_name(type(value))}({held})"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _local(value) if _is_local(value) else _name(value)
    raise TypeError(
        f"an arm's option must be a plain value, a function, a class or a dataclass, got {type(value).__name__}; "
        "pass a factory (a lambda) that makes the object"
    )


def _is_local(value: Any) -> bool:
    """Whether something is known by its text: it has no name to import it by, or stands in a study."""
    in_study = fnmatch(value.__module__, "trimtab.studies.*.*") and not fnmatch(
        value.__module__, "trimtab.studies.tasks.*"
    )
    return "<" in value.__qualname__ or (in_study and isinstance(value, types.FunctionType))


def _name(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def _local(function: Any) -> str:
    function = inspect.unwrap(function)  # what a decorator such as torch.no_grad makes has another's source
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{function!r} is defined inside a function; define it at module level")
    captured = {
        name: describe(cell.cell_contents)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }
    defaults = describe(function.__defaults__ or ())
    used = [(name, value) for name, value in _globals(function) if value is not function]
    constants = {name: describe(value) for name, value in used if isinstance(value, (*_PLAIN, tuple, list, dict))}
    helpers = [_local(value) for _, value in used if isinstance(value, types.FunctionType) and _is_local(value)]
    return " | ".join([f"{_source_text(function.__code__)} with {captured} {defaults} {constants}", *helpers])


def _source_text(code: types.CodeType) -> str:
    """The text of a lambda or local function; all that begin on its line, should there be several."""
    lines = linecache.getlines(code.co_filename)
    if not lines:
        raise TypeError(f"the source of {code.co_name} in {code.co_filename} cannot be read, so it has no identity")
    text = "".join(lines)
    found = [
        # unparse settles the layout, so that moving or re-wrapping the code does not make it another contestant
        ast.unparse(node)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Lambda | ast.FunctionDef) and code.co_firstlineno in _first_lines(node)
    ]
    return " | ".join(found)


def _first_lines(node: ast.Lambda | ast.FunctionDef) -> set[int]:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return {node.lineno, *(d.lineno for d in decorators)}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _globals(function: types.FunctionType) -> list[tuple[str, Any]]:
    """The global names a function uses, with their values."""
    names = sorted({name for code in _codes(function.__code__) for name in code.co_names})
    return [(name, function.__globals__[name]) for name in names if name in function.__globals__]


def modules(value: Any) -> set[str]:
    """The modules of this package whose code an arm (or one of its options) rests on, imports not followed."""
    if isinstance(value, Mapping):
        return set().union(*(modules(v) for v in value.values())) if value else set()
    if isinstance(value, list | tuple | set | frozenset):
        return set().union(*(modules(v) for v in value)) if value else set()
    if isinstance(value, functools.partial):
        return modules(value.func) | modules(value.args) | modules(value.keywords)
    if isinstance(value, types.MethodType):
        return modules(value.__self__)
    if isinstance(value, types.FunctionType) and _is_local(value):
        value = inspect.unwrap(value)
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return modules(cells) | modules(value.__defaults__ or ()) | _referenced(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__module__} | modules([getattr(value, f.name) for f in fields(value)])
    module = getattr(value, "__module__", None)
    return {module} if isinstance(module, str) and not isinstance(value, _PLAIN) else set()


def _referenced(function: types.FunctionType) -> set[str]:
    attributes = {name for code in _codes(function.__code__) for name in code.co_names}
    found: set[str] = set()
    for _, value in _globals(function):
        if isinstance(value, types.ModuleType):
            for name in attributes & set(dir(value)):
                found |= fingerprint.resolve(value.__name__, name)
        elif value is not function and (inspect.isfunction(value) or inspect.isclass(value)):
            found |= modules(value)
    return found


def sources(arm: Arm) -> list[Path]:
    """The files of this package that the arm's numbers depend on."""
    return fingerprint.import_closure(modules(arm))


def sources_hash(value: Any) -> str:
    """One hash over the code that an arm, or a function with the module it stands in, depends on."""
    own = set() if isinstance(value, Arm) else {value.__module__}
    files = fingerprint.import_closure(modules(value) | own)
    text = "\n".join(f"{fingerprint.name_of(path)} {fingerprint.code_hash(path)}" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
