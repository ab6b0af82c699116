"""Real text that every machine has: the sources of Python's own standard library."""

from __future__ import annotations

import platform
import string
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.data.files import DataNotFoundError

CHARACTERS = "\n" + "".join(sorted(string.digits + string.ascii_letters + string.punctuation + " "))


@dataclass(frozen=True)
class TextData:
    """Text as character codes, with its own train and test part.

    Attributes:
        train, test: int64 codes, positions in `characters`.
        characters: the vocabulary.
        source: where the text came from, for the record.
    """

    train: Int[Tensor, " train"]
    test: Int[Tensor, " test"]
    characters: str
    source: str = ""

    def decode(self, codes: Int[Tensor, " n"]) -> str:
        """The text that the codes stand for."""
        return "".join(self.characters[int(code)] for code in codes)


@cache
def python_sources(folder: str | None = None) -> TextData:
    """The top-level modules of the standard library, in the order of their names; every tenth is for testing.

    Characters other than printable ASCII and the line feed are left out. The text differs between Python versions.

    Args:
        folder: read this folder's modules instead.

    Raises:
        DataNotFoundError: there are fewer than ten modules, as in a Python without sources.

    Example:
        >>> text = python_sources()
        >>> len(text.train) > 1_000_000, len(text.characters)
        (True, 96)
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("*.py"))
    if len(files) < 10:
        raise DataNotFoundError(f"python_sources: {root} holds {len(files)} modules (*.py); at least 10 are needed")
    code = torch.full((256,), -1)
    code[torch.tensor([ord(character) for character in CHARACTERS])] = torch.arange(len(CHARACTERS))
    parts = []
    for file in files:
        read = code[torch.frombuffer(bytearray(file.read_bytes() + b"\n"), dtype=torch.uint8).long()]
        parts.append(read[read >= 0])
    return TextData(
        torch.cat([part for i, part in enumerate(parts) if i % 10]),
        torch.cat(parts[::10]),
        CHARACTERS,
        source=f"Python {platform.python_version()} standard library",
    )
