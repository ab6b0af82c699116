"""What a user can put right, told in one line on stderr."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Never

import click


class _Interrupted(click.ClickException):
    exit_code = 130


def fail(message: str) -> Never:
    """Ends the command with one line on stderr."""
    raise click.ClickException(" ".join(message.split())) from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What can go wrong in running studies ends the command with one line."""
    from trimtab.catalog import UnknownNameError
    from trimtab.data import DataCorruptError, DataNotFoundError
    from trimtab.studies.engine.library import NoStudyError
    from trimtab.studies.engine.pool import BackendError, RunError
    from trimtab.studies.engine.store import StoreError

    expected = (UnknownNameError, NoStudyError, StoreError, RunError, BackendError, ImportError, TypeError, ValueError)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            yield
    except (DataNotFoundError, DataCorruptError, *expected) as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot write {error.filename}: {error.strerror}")
    except KeyboardInterrupt as error:
        # typer would end without a word
        raise _Interrupted(str(error) or "interrupted") from None


def _warn(message: Warning | str, kind: type[Warning], file: str, *_: object, **__: object) -> None:
    """What the library itself warns of, in one line; others' warnings are not for the user of a command."""
    if kind is UserWarning and "trimtab" in Path(file).parts:
        print(f"trimtab: {' '.join(str(message).split())}", file=sys.stderr)
