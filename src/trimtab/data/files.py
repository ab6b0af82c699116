"""Where data files are looked for, and how they are checked before use.

In order: `$TRIMTAB_DATA/<name>/`, folders that a system package installs, the user's cache, a public mirror. A
downloaded file is written under a temporary name, checked against its SHA-256 and only then given its name.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs


class DataNotFoundError(FileNotFoundError):
    """The data set is not on this machine and could not be fetched; the message says which file goes where."""


class DataCorruptError(ValueError):
    """A data file is truncated or is not what it should be."""


def cache_folder(name: str) -> Path:
    """The per-user folder of a data set."""
    return Path(platformdirs.user_cache_dir("trimtab")) / "data" / name


def folders(name: str, system: Sequence[str] = ()) -> list[Path]:
    """The folders searched for a data set's files, first to last."""
    own = os.environ.get("TRIMTAB_DATA")
    return [*([Path(own) / name] if own else []), *map(Path, system), cache_folder(name)]


def find(name: str, file: str, system: Sequence[str] = ()) -> Path | None:
    """The first file of that name, plain or gzipped, in the data set's folders."""
    for folder in folders(name, system):
        for candidate in (folder / file, folder / f"{file}.gz"):
            if candidate.is_file():
                return candidate
    return None


def require(
    name: str, file: str, sha256: str, *, system: Sequence[str] = (), mirrors: Sequence[str] = (), hint: str = ""
) -> Path:
    """The path of a data file, fetched into the user's cache if it is nowhere on this machine.

    Args:
        name: the data set, which is also its folder's name.
        file: the file's usual name, without ".gz".
        sha256: of the unpacked content.
        system: further folders to look in.
        mirrors: base addresses that serve `<file>.gz`.
        hint: how else one may get the file.

    Raises:
        DataNotFoundError: not here and not to be had; says where to put it.
        DataCorruptError: the file does not match its checksum.
    """
    path = find(name, file, system)
    if path is not None:
        _check(path, sha256)
        return path
    reasons = []
    for mirror in mirrors:
        try:
            return _download(f"{mirror.rstrip('/')}/{file}.gz", cache_folder(name) / f"{file}.gz", sha256)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reasons.append(f"{mirror}: {error}")
    target = folders(name)[0]
    raise DataNotFoundError(
        f"data set {name!r}: file {file!r} is not on this machine and could not be downloaded. "
        f"Put {file} or {file}.gz into {target}" + (f"; {hint}" if hint else "") + "".join(f"\n  {r}" for r in reasons)
    )


def content(path: Path) -> bytes:
    """The unpacked bytes of a plain or gzipped file.

    Raises:
        DataCorruptError: the gzip stream is broken.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        raise DataCorruptError(f"{path} is truncated or damaged ({error}); delete it and fetch it again") from error


def _check(path: Path, sha256: str) -> None:
    found = hashlib.sha256(content(path)).hexdigest()
    if found != sha256:
        raise DataCorruptError(
            f"{path} is not the expected file: its SHA-256 is {found[:12]}…, wanted {sha256[:12]}…; "
            "it may be truncated or altered. Delete it and fetch it again"
        )


def _download(url: str, target: Path, sha256: str) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with urllib.request.urlopen(url, timeout=30) as answer:
        data: bytes = answer.read()
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".gz", delete=False) as part:
        part.write(data)
    try:
        _check(Path(part.name), sha256)
        Path(part.name).replace(target)
    finally:
        Path(part.name).unlink(missing_ok=True)
    return target


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes (the format of MNIST).

    Raises:
        DataCorruptError: the header or the length is wrong.
    """
    data = content(path)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08":
        raise DataCorruptError(f"{path} is not an IDX file of unsigned bytes")
    rank = data[3]
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", rank, offset=4))
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if body.size != int(np.prod(shape)):
        raise DataCorruptError(f"{path} is truncated: its header says {shape}, it holds {body.size} bytes")
    return body.reshape(shape)
