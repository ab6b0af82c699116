"""Who a contestant is: a text that names everything its numbers depend on, the code behind it, and the data it reads.

Two contestants with the same identity are the same, so a reference that several studies share runs once; and a stored
run whose code or data have changed since is known to be stale.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import types
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab import sources
from trimtab.studies.engine import definitions
from trimtab.studies.engine.definitions import Node

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Path)


def describe(value: Any) -> str:
    """A text that is equal for equal contestants.

    Named functions and classes are given by name (their code is tracked by `roots`). Lambdas and functions within
    functions are given by their text and the values they hold.

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
        return _local(value) if "<" in value.__qualname__ else _name(value)
    raise TypeError(
        "what a contestant brings must be a plain value, a function, a class or a dataclass, "
        f"got {type(value).__name__}; pass a factory (a lambda) that makes the object"
    )


def _name(value: Any) -> str:
    return f"{_home(value.__module__)}:{value.__qualname__}"


def _home(module: str) -> str:
    """The part of the library that a module belongs to, so that one which is split into a package keeps its names."""
    parts = module.split(".")
    if parts[0] != sources.PACKAGE.name:
        return module
    return ".".join(parts[: 4 if parts[1:2] == ["studies"] else 3])


def _local(function: Any) -> str:
    function = inspect.unwrap(function)  # what a decorator such as torch.no_grad makes has another's source
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{function!r} must be defined at module level, got one within a function")
    captured = {name: describe(value) for name, value in _captured(function).items()}
    return f"{_text(function)} with {captured} {describe(function.__defaults__ or ())}"


def local_texts(value: Any) -> str:
    """The texts of lambdas and local functions, whose code no definition holds, and of those that they hold."""
    found: dict[int, str] = {}

    def collect(part: Any) -> None:
        if isinstance(part, functools.partial):
            for inner in (part.func, *part.args, *part.keywords.values()):
                collect(inner)
            return
        function = inspect.unwrap(part) if callable(part) else part
        if isinstance(function, types.FunctionType) and "<" in function.__qualname__ and id(function) not in found:
            found[id(function)] = _text(function)
            for held in _captured(function).values():
                collect(held)

    collect(value)
    return " | ".join(found.values())


def _text(function: types.FunctionType) -> str:
    return " | ".join(definitions.normal_text(tree) for tree in _trees(function.__code__))


def _captured(function: types.FunctionType) -> dict[str, Any]:
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }


def _trees(code: types.CodeType) -> list[ast.AST]:
    """A lambda or local function; all that begin on its line, should there be several."""
    found = _functions(code.co_filename).get(code.co_firstlineno)
    if not found:
        raise TypeError(f"the source of {code.co_name} must be readable for it to have an identity: {code.co_filename}")
    return found


@cache
def _functions(filename: str) -> dict[int, list[ast.AST]]:
    found: dict[int, list[ast.AST]] = {}
    for node in ast.walk(ast.parse("".join(linecache.getlines(filename)) or "pass")):
        if isinstance(node, ast.Lambda | ast.FunctionDef):
            decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
            for line in {node.lineno, *(d.lineno for d in decorators)}:
                found.setdefault(line, []).append(node)
    return found


def roots(value: Any) -> set[Node]:
    """The definitions that a value names."""
    if isinstance(value, Mapping):
        return set[Node]().union(*(roots(part) for part in value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return set[Node]().union(*map(roots, value))
    if isinstance(value, functools.partial):
        return roots(value.func) | roots(value.args) | roots(value.keywords)
    if isinstance(value, types.MethodType):
        return roots(value.__self__)
    if is_dataclass(value) and not isinstance(value, type):
        return roots(type(value)) | roots([getattr(value, f.name) for f in fields(value) if f.compare])
    if isinstance(value, types.FunctionType) and "<" in value.__qualname__:
        value = inspect.unwrap(value)
        named = definitions.used(value.__module__, _trees(value.__code__))
        return named | roots(list(_captured(value).values())) | roots(value.__defaults__ or ())
    if isinstance(value, _PLAIN) or not hasattr(value, "__qualname__"):
        return set()
    module = getattr(value, "__module__", None)
    return {(module, value.__qualname__.partition(".")[0])} if isinstance(module, str) else set()


def code_hash(value: Any) -> str:
    """One hash over the code that a value rests on."""
    return definitions.closure_hash(roots(value))


@cache
def data_hash(name: str) -> str:
    """A checksum of a data set as it is loaded, whatever file it came in.

    Raises:
        DataNotFoundError: it cannot be had on this machine.
    """
    from trimtab import data

    own = {"adult", "captured_motions", "japanese_vowels", "python_sources"}
    held: Any = getattr(data, name)() if name in own else data.load(name)
    total = 0
    for part in fields(held):
        value = getattr(held, part.name)
        if isinstance(value, torch.Tensor):
            value = value.numpy()
        if isinstance(value, np.ndarray):
            total = zlib.crc32(np.ascontiguousarray(value).tobytes(), zlib.crc32(str(value.shape).encode(), total))
    return f"{total:08x}"
