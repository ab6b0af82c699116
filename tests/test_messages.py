"""Errors about arguments have one form: what must be, and what came."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import trimtab

PACKAGE = Path(trimtab.__file__).parent
AREAS = sorted(path.parent for path in PACKAGE.glob("*/papers.toml"))
# Two sentences that scikit-learn's own checks look for, and messages that are passed on with a name in front.
PASSED_ON = ("Only binary classification is supported", "layer ", "")


def _messages(path: Path) -> list[tuple[int, str]]:
    """Line and text of every ValueError and TypeError that is raised with a text; what is filled in is left empty."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        name, text = node.exc.func, node.exc.args[0]
        if not (isinstance(name, ast.Name) and name.id in ("ValueError", "TypeError")):
            continue
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        words = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        if words:
            found.append((node.lineno, "".join(words)))
    return found


@pytest.mark.parametrize("folder", [*AREAS, PACKAGE / "ops", PACKAGE / "data", PACKAGE / "nets"], ids=lambda p: p.name)
def test_messages_say_what_must_be(folder: Path) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {text}"
        for path in sorted(folder.rglob("*.py"))
        for line, text in _messages(path)
        if ("must" not in text or "; it must" in text or "; they must" in text)
        and not any(text.startswith(start) for start in PASSED_ON if start)
    ]
    assert not wrong, "\n".join(wrong)
