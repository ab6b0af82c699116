"""Lets the API pages show the docstrings' examples as code.

Griffe knows the section `Examples:` only; the docstrings here say `Example:`, since there is one.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_HEADING = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class PluralExamples(griffe.Extension):  # type: ignore[misc]  # optional, so not seen by the type checker
    """Renames the section of every docstring that griffe reads."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object of the package."""
        if obj.docstring:
            obj.docstring.value = _HEADING.sub(r"\1Examples:", obj.docstring.value)
