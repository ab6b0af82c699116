"""Which source files a piece of code rests on, and a hash of each that ignores comments.

Used to tell whether a stored result still belongs to the code that stands here. Nothing is imported or run: the
files are read as text, so the answer is there in milliseconds and without PyTorch.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from trimtab import faces

PACKAGE = Path(__file__).parent
"""The folder of the package `trimtab`; source names are paths relative to its parent."""

# How runs are kept, scheduled and shown does not change what an arm computes.
_NO_INFLUENCE = frozenset(
    f"trimtab.studies.{name}"
    for name in ("study", "identity", "store", "runner", "verdict", "outcome", "report", "figure")
)

# A list of things by name: what it lists counts, but not that there is one more.
_LISTS = frozenset({"trimtab.data.catalogue"})


def raw_hash(path: Path) -> str:
    """Hash of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@cache
def code_hash(path: Path) -> str:
    """Hash of the file's code: comments, docstrings and blank lines do not count."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in _docstrings(ast.parse(text)):
        for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
            lines[row - 1] = ""
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _docstrings(tree: ast.AST) -> Iterator[ast.stmt]:
    """Every statement that is only a string: docstrings, and the notes under an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node


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
                source = _absolute(node, module, is_package=True)
                return module if source == module else _defining(source, name)
    return module


def _absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*base, *([node.module] if node.module else [])])


def resolve(package: str, name: str) -> set[str]:
    """The modules that `from package import name` rests on: never a whole area for one of its names."""
    source = exports(package).get(name, package)
    if source != package:
        return {source} if module_file(source) else set()
    submodule = f"{package}.{name}"
    return {package if module_file(submodule) is None else submodule}


@cache
def _direct_imports(module: str) -> frozenset[str]:
    path = module_file(module)
    if path is None:
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    packages: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, module, is_package=path.name == "__init__.py")
            for alias in node.names:
                for target in resolve(source, alias.name):
                    file = module_file(target)
                    if file is not None and file.name == "__init__.py" and exports(target):
                        packages[alias.asname or alias.name] = target
                    else:
                        found.add(target)
    # `from trimtab import losses` counts only for the names that are then used as `losses.NAME`.
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages:
            found |= resolve(packages[node.value.id], node.attr)
    return frozenset(name for name in found if module_file(name) is not None)


def import_closure(modules: Iterable[str]) -> list[Path]:
    """All files of this package that the modules import, directly or not, themselves included; sorted.

    Left out are the modules that have no influence on what an arm computes, and those that only list others.
    """
    todo, seen = set(modules), set()
    while todo:
        module = todo.pop()
        if module in seen or module in _NO_INFLUENCE or module_file(module) is None:
            continue
        seen.add(module)
        todo |= _direct_imports(module)
    return sorted({path for module in seen - _LISTS if (path := module_file(module)) is not None})


def is_fresh(sources: dict[str, dict[str, str]]) -> bool:
    """Whether every file of a stored source list still has the code it had.

    Args:
        sources: file name -> `{"raw": …, "code": …}`, as `describe_sources` gave it.
    """
    for name, hashes in sources.items():
        if name.removesuffix(".py").replace("/", ".") in _LISTS:
            continue
        path = PACKAGE.parent / name
        if not path.is_file():
            return False
        # The raw hash is fast and nearly always decides; only an edited file has to be tokenised.
        if raw_hash(path) != hashes["raw"] and code_hash(path) != hashes["code"]:
            return False
    return True


def describe_sources(files: Iterable[Path]) -> dict[str, dict[str, str]]:
    """File name -> raw and code hash, the form in which a result keeps its sources."""
    return {name_of(path): {"raw": raw_hash(path), "code": code_hash(path)} for path in files}
