"""What code a function or a class rests on, definition by definition, read from the text.

Two texts of a definition count as the same code where they give the same numbers: comments, docstrings, annotations,
and what is raised when something is wrong do not matter. So an edit of a docstring, of an error message or of a
neighbour in the same file changes nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from trimtab import sources

Node = tuple[str, str]
"""A module and a name at its top level; the empty name stands for what the module does when it is imported."""

# How runs are kept and shown, how arguments are read, which saved states are refused and how data are loaded decides
# no number: data sets count by the checksum of what is loaded.
_NO_INFLUENCE = (
    "trimtab.studies.engine",
    "trimtab.data",
    "trimtab.ops.arguments",
    "trimtab.ops.whole_state",
    "trimtab.catalog",
    "trimtab.faces",
)
_INSTALLED = tuple({Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_NO_INFLUENCE_IN_TASKS = frozenset(
    {"name", "metrics", "accepts", "needs_images", "tries", "search", "seeds", "cost"}
    | {"references", "variants", "datasets"}
)


class _Normal(ast.NodeTransformer):
    """Takes out what decides no number."""

    def _body(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            held = getattr(node, name, None)
            if isinstance(held, list) and not held and name == "body":
                node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        for arg in ast.walk(node.args):
            if isinstance(arg, ast.arg):
                arg.annotation = None
        return self._body(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.bases = [base for base in node.bases if not (isinstance(base, ast.Name) and base.id == "WholeState")]
        if any(isinstance(base, ast.Name) and base.id == "Task" for base in map(_plain_base, node.bases)):
            node.body = [part for part in node.body if not set(_bound(part)) & _NO_INFLUENCE_IN_TASKS]
        return self._body(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if not node.orelse and all(isinstance(part, ast.Raise) for part in node.body):
            return None
        return self._body(node)

    visit_For = visit_While = visit_With = visit_Try = visit_ExceptHandler = _body  # noqa: N815

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise()

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        node.annotation = ast.Constant(None)
        return node


def _plain_base(base: ast.expr) -> ast.expr:
    return base.value if isinstance(base, ast.Subscript) else base


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for target in targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
    elif isinstance(statement, ast.TypeAlias if hasattr(ast, "TypeAlias") else ()):
        yield statement.name.id


@dataclass(frozen=True)
class _Module:
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)


def _file(module: str) -> Path | None:
    if module.partition(".")[0] == sources.PACKAGE.name:
        return sources.module_file(module)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@cache
def _read(module: str) -> _Module:
    path = _file(module)
    if path is None:
        return _Module()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = _Module()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                found.imports[name] = (alias.name if alias.asname else name, None)
        elif isinstance(node, ast.ImportFrom):
            source = sources.absolute(node, module, is_package=path.name == "__init__.py")
            for alias in node.names:
                found.imports[alias.asname or alias.name] = (source, alias.name)
    for statement in tree.body:
        names = list(_bound(statement))
        if not names and isinstance(statement, ast.Expr | ast.For | ast.While) and not _is_text(statement):
            names = [""]
        elif not names and isinstance(statement, ast.If | ast.Try | ast.With) and not _only_imports(statement):
            names = [n for part in ast.walk(statement) if isinstance(part, ast.stmt) for n in _bound(part)]
        for name in names:
            found.definitions.setdefault(name, []).append(statement)
    return found


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _only_imports(statement: ast.stmt) -> bool:
    inner = [part for part in ast.walk(statement) if isinstance(part, ast.stmt) and part is not statement]
    return all(isinstance(part, ast.Import | ast.ImportFrom | ast.Pass) for part in inner)


@cache
def _counts(module: str) -> bool:
    """Whether a module is of this package or a user's own: what is installed beside it counts by its version."""
    if any(module == name or module.startswith(f"{name}.") for name in _NO_INFLUENCE):
        return False
    if module.partition(".")[0] == sources.PACKAGE.name:
        return True
    path = _file(module)
    return path is not None and not any(path.is_relative_to(folder) for folder in _INSTALLED)


def resolve(module: str, name: str, _depth: int = 0) -> Node | None:
    """Where a name that a module knows is defined; None for what is not ours."""
    if _depth > 20:
        return None
    held = _read(module)
    if name in held.definitions:
        return module, name
    # A package that hands out its own modules imports them from itself.
    if name in held.imports and held.imports[name] != (module, name):
        source, attribute = held.imports[name]
        if attribute is None:
            return (source, "*") if _file(source) else None
        return resolve(source, attribute, _depth + 1)
    exported = sources.exports(module).get(name, module)
    if exported != module:
        return resolve(exported, name, _depth + 1)
    return (f"{module}.{name}", "*") if _file(f"{module}.{name}") else None


def used(module: str, trees: Iterable[ast.AST]) -> set[Node]:
    """The definitions that pieces of a module's code name, directly."""
    found: set[Node] = set()
    for tree in trees:
        inner: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and id(node) not in inner:
                chain, part = [], node
                while isinstance(part, ast.Attribute):
                    inner.add(id(part))
                    chain.append(part.attr)
                    part = part.value  # type: ignore[assignment]
                if isinstance(part, ast.Name):
                    inner.add(id(part))
                    found |= _follow(module, [part.id, *reversed(chain)])
            elif isinstance(node, ast.Name) and id(node) not in inner:
                found |= _follow(module, [node.id])
    return found


def _follow(module: str, chain: list[str]) -> set[Node]:
    """The definition behind `a.b.c`, where `a` may be a module."""
    node = resolve(module, chain[0])
    for name in chain[1:]:
        if node is None or node[1] != "*":
            break
        node = resolve(node[0], name)
    return set() if node is None else {node}


@cache
def _text_and_uses(node: Node) -> tuple[str, frozenset[Node]]:
    module, name = node
    statements = [_normal(statement) for statement in _read(module).definitions.get(name, ())]
    return "\n".join(ast.unparse(part) for part in statements), frozenset(used(module, statements))


def _normal(statement: ast.stmt) -> ast.stmt:
    copy = ast.parse(ast.unparse(statement)).body[0]
    normal = _Normal().visit(copy)
    return ast.fix_missing_locations(normal) if normal is not None else ast.Pass()


def normal_text(tree: ast.AST) -> str:
    """A lambda's or a function's text without what decides no number."""
    copy = ast.parse(ast.unparse(tree)).body[0]
    normal = _Normal().visit(copy)
    return ast.unparse(ast.fix_missing_locations(normal)) if normal is not None else ""


@cache
def closure(roots: frozenset[Node]) -> dict[Node, str]:
    """Everything of this package, and of a user's own modules, that the roots rest on: node -> text."""
    todo, found = set(roots), dict[Node, str]()
    while todo:
        node = todo.pop()
        module, name = node
        if node in found or not _counts(module):
            continue
        if name == "*":  # the module itself is passed around: all of it counts
            found[node] = ""
            todo |= {(module, other) for other in _read(module).definitions}
            continue
        text, uses = _text_and_uses(node)
        found[node] = text
        todo |= uses
        if "" in _read(module).definitions:
            todo.add((module, ""))
    return found


def closure_hash(roots: Iterable[Node]) -> str:
    """One hash over all that the roots rest on, wherever it stands: code that moves is the same code."""
    held = closure(frozenset(roots))
    lines = sorted(f"{name} {text}" for (_, name), text in held.items() if text)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
