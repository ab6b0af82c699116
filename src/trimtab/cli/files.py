"""The files that commands keep runs in and write into."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.studies.engine.store import Store


def open_store(path: Path | None, *, read_only: bool = False) -> Store:
    """The store of runs at a path, or this user's."""
    from trimtab.studies.engine.store import Store, default_path

    return Store(path or default_path(), read_only=read_only)


def must_be_writable(folder: Path | None) -> None:
    """Find out before hours of work, not after."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
