"""What the docstrings of public names say, read from the files; nothing of the library is imported."""

from __future__ import annotations

import ast
import copy
import doctest
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from trimtab import sources


@cache
def _module(name: str) -> ast.Module:
    """The module that defines a public name; an empty one where there is none."""
    package, _, attribute = name.rpartition(".")
    path = sources.module_file(sources.exports(package).get(attribute, ""))
    return ast.parse(path.read_text(encoding="utf-8")) if path else ast.Module([], [])


def _definition(name: str) -> ast.ClassDef | ast.FunctionDef | None:
    for node in _module(name).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name.rpartition(".")[2]:
            return node
    return None


def documented(name: str) -> bool:
    """Whether a public name is a class or function that exists.

    Example:
        >>> documented("trimtab.losses.Nothing")
        False
    """
    return _definition(name) is not None


def summary(name: str) -> str:
    """The first line of the docstring of a public name, a class, a function or a module; empty without one.

    Example:
        >>> summary("trimtab.optim.SAM")
        'Sharpness-aware minimisation: the gradient is taken a distance `rho` up the steepest slope.'
    """
    path = sources.module_file(name)
    node = _definition(name) or (ast.parse(path.read_text(encoding="utf-8")) if path else None)
    text = (ast.get_docstring(node) if node else None) or ""
    return " ".join(text.partition("\n\n")[0].split())


def signature(name: str) -> str:
    """How a public name is called, without annotations; empty where there is no such class or function.

    Example:
        >>> signature("trimtab.losses.elr_penalty")
        "elr_penalty(probs, past, reduction='mean')"
        >>> signature("trimtab.finetune.SoMAConfig").startswith("SoMAConfig(target_modules")
        True
    """
    node = _definition(name)
    if node is None:
        return ""
    if isinstance(node, ast.FunctionDef):
        return f"{node.name}({_arguments(node.args, method=False)})"
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return f"{node.name}({_arguments(part.args, method=True)})"
    return f"{node.name}({', '.join(_fields(name).values())})" if "dataclass" in ast.dump(node) else node.name


def _fields(name: str) -> dict[str, str]:
    """Field -> how a dataclass of an area takes it; what it inherits from another of the area comes first."""
    node = _definition(name)
    found: dict[str, str] = {}
    if isinstance(node, ast.ClassDef):
        for base in (base for base in node.bases if isinstance(base, ast.Name)):
            found |= _fields(f"{name.rpartition('.')[0]}.{base.id}")
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                default = f"={ast.unparse(part.value)}" if part.value else ""
                found[part.target.id] = part.target.id + default
    return found


def _arguments(arguments: ast.arguments, *, method: bool) -> str:
    plain = copy.deepcopy(arguments)
    for argument in ast.walk(plain):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(plain)
    return text.removeprefix("self").removeprefix(", ") if method else text


def example(name: str) -> str:
    """The example in the docstring of a public name as a script: imports first, no checks; empty without one.

    What only looks at a number is left out, unless nothing else uses the name or what was made for it; then it is
    printed.
    """
    node = _definition(name)
    steps = doctest.DocTestParser().get_examples((ast.get_docstring(node) if node else None) or "")
    looks = [step for step in steps if step.want and not step.source.startswith("from ") and _is_expression(step)]
    own = name.rpartition(".")[2]
    kept = [step for step in steps if step not in looks]
    if not any(own in step.source for step in kept):
        kept = steps
    elif idle := _idle(kept):
        look = next((look for look in looks if idle & _names(look, ast.Load)), None)
        kept = [step for step in steps if step in kept or step is look]
    lines = [f"print({_unpunctuated(step)})" if step in looks else _said(step) for step in kept]
    return _with_imports(name, lines) if steps else ""


def _names(step: doctest.Example, kind: type[ast.expr_context]) -> set[str]:
    nodes = ast.walk(ast.parse(step.source))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}


def _idle(steps: Sequence[doctest.Example]) -> set[str]:
    """What the last step makes of nothing that was made before, and so for a use that is yet to come."""
    made = {name for step in steps[:-1] for name in _names(step, ast.Store)}
    last = steps[-1]
    return set() if made & _names(last, ast.Load) or len(steps) == 1 else _names(last, ast.Store)


def _unpunctuated(step: doctest.Example) -> str:
    """An expression on one line, without a comment that would hide a bracket behind it."""
    source = step.source.strip()
    return ast.unparse(ast.parse(source)) if "\n" in source or "#" in source else source


def _said(step: doctest.Example) -> str:
    """A step as a script has it: statements on lines of their own, and none thrown away by an underscore."""
    tree = ast.parse(step.source)
    if len(tree.body) > 1 and "\n" not in step.source.strip():
        return "\n".join(ast.unparse(part) for part in tree.body)
    return re.sub(r"^_ = ", "", step.source.rstrip())


def _is_expression(step: doctest.Example) -> bool:
    tree = ast.parse(step.source)
    return all(isinstance(part, ast.Expr) for part in tree.body)


def _with_imports(name: str, lines: Iterable[str]) -> str:
    code, imports = list[str](), list[str]()
    for line in lines:
        (imports if line.startswith(("import ", "from ")) else code).append(line)
    text = "\n".join(_spaced(code))
    bound = {alias.asname or alias.name for line in imports for alias in _aliases(ast.parse(line))}
    wanted = {*imports, *_imports(name, text, bound)}
    ordered = sorted(
        _joined(wanted), key=lambda line: (line.startswith("from trimtab"), line.startswith("from "), line)
    )
    return "\n".join([*ordered, *([""] if ordered else []), text])


def _spaced(code: Sequence[str]) -> Iterator[str]:
    """The steps of a script, with an empty line on either side of what defines something."""
    for place, step in enumerate(code):
        defines = re.match(r"(class|def|@)", step.lstrip("# "))
        if place and (defines or re.match(r"(class|def|@)", code[place - 1])):
            yield ""
        yield step


def _joined(imports: Iterable[str]) -> Iterator[str]:
    """Each module that names come from once."""
    names: dict[str, set[str]] = {}
    for line in imports:
        source, _, held = line.partition(" import ")
        if source.startswith("from "):
            names.setdefault(source, set()).update(part.strip() for part in held.split(","))
        else:
            yield line
    yield from (f"{source} import {', '.join(sorted(held))}" for source, held in names.items())


def _imports(name: str, code: str, bound: set[str]) -> Iterator[str]:
    """What the example takes from the module around it: public names of the area, and the module's own imports."""
    package = name.rpartition(".")[0]
    tree = ast.parse(code)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = bound | {alias.asname or alias.name for alias in _aliases(tree)}
    bound |= {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    needed = {node.id for node in nodes} - bound
    public = sorted(needed & set(sources.exports(package)))
    if public:
        yield f"from {package} import {', '.join(public)}"
    for node in copy.deepcopy(_module(name).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name) in needed - set(public)]
            if node.names:
                yield ast.unparse(node)


def _aliases(tree: ast.AST) -> Iterator[ast.alias]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from node.names
