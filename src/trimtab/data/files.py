"""Where data files are looked for, and how they are checked before use.

In order: `$TRIMTAB_DATA/<name>/`, folders that a system package installs, the user's cache, the public mirrors, one
after the other. A downloaded file is written under a temporary name, unpacked piece by piece up to a bound, checked
against its SHA-256 and only then given its name.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import platformdirs

_PIECE = 1 << 20
_LARGEST = 1 << 28  # bytes, packed or unpacked; the largest file of any data set has 47 million


class DataNotFoundError(FileNotFoundError):
    """The data set is not on this machine and could not be fetched; the message says which file goes where."""


class DataCorruptError(ValueError):
    """A data file is truncated or is not what it should be."""


class _UnusableError(Exception):
    """Bytes from a file or a mirror are of no use; says why."""


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
        mirrors: base addresses that serve `<file>.gz`; where one sends nothing or something else, the next is asked.
        hint: how else one may get the file.

    Raises:
        DataNotFoundError: not here and not to be had, or the cache cannot be written; says where to put the file and
            what each mirror did.
        DataCorruptError: the file on this machine does not match its checksum.
    """
    path = find(name, file, system)
    if path is not None:
        try:
            _check(path, sha256, packed=path.suffix == ".gz")
        except _UnusableError as error:
            raise _corrupt(path, error) from error
        return path
    target, where = cache_folder(name) / f"{file}.gz", folders(name)[0]
    place = f"Put {file} or {file}.gz into {where}" + (f"; {hint}" if hint else "")
    reasons = []
    for mirror in mirrors:
        try:
            return _download(f"{mirror.rstrip('/')}/{file}.gz", target, sha256)
        except _UnusableError as error:
            reasons.append(f"\n  {mirror}: {error}")
        except OSError as error:
            raise DataNotFoundError(
                f"data set {name!r}: {target} cannot be written ({error.strerror or error}); make room there, or allow "
                f"writing. {place}"
            ) from error
    raise DataNotFoundError(
        f"data set {name!r}: file {file!r} is not on this machine and could not be downloaded. {place}"
        + "".join(reasons)
    )


def content(path: Path) -> bytes:
    """The unpacked bytes of a plain or gzipped file.

    Raises:
        DataCorruptError: the file cannot be read, its gzip stream is broken, or it unpacks to more than any data set
            holds.
    """
    try:
        return b"".join(_unpacked(path, packed=path.suffix == ".gz"))
    except _UnusableError as error:
        raise _corrupt(path, error) from error


def _corrupt(path: Path, reason: Exception) -> DataCorruptError:
    return DataCorruptError(f"{path} is not the expected file: {reason}. Delete it and fetch it again")


def _unpacked(path: Path, *, packed: bool) -> Iterator[bytes]:
    """The content piece by piece, so that a small file that unpacks to a huge one is given up in time."""
    size = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                size += len(piece)
                if size > _LARGEST:
                    raise _UnusableError(f"it unpacks to more than {_LARGEST:,} bytes")
                yield piece
    except (EOFError, zlib.error, OSError) as error:
        raise _UnusableError(f"it is truncated or damaged ({error})") from error


def _check(path: Path, sha256: str, *, packed: bool) -> None:
    digest = hashlib.sha256()
    for piece in _unpacked(path, packed=packed):
        digest.update(piece)
    found = digest.hexdigest()
    if found != sha256:
        raise _UnusableError(f"its SHA-256 is {found[:12]}…, wanted {sha256[:12]}…, so it is truncated or altered")


def _received(url: str) -> Iterator[bytes]:
    """What an address sends, piece by piece, all that it promised."""
    size = 0
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            promised = answer.headers.get("Content-Length")
            while piece := answer.read(_PIECE):
                size += len(piece)
                if size > _LARGEST:
                    raise _UnusableError(f"it sends more than {_LARGEST:,} bytes")
                yield piece
    except (http.client.HTTPException, OSError) as error:
        raise _UnusableError(str(error) or type(error).__name__) from error
    if promised is not None and promised != str(size):
        raise _UnusableError(f"it broke off after {size:,} of {promised} bytes")


def _download(url: str, target: Path, sha256: str) -> Path:
    """Fetch a file into the cache. An OSError is one of the cache's disk, never of the network."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.NamedTemporaryFile(dir=target.parent, suffix=".part", delete=False)  # noqa: SIM115
    held = Path(part.name)
    try:
        with part:
            for piece in _received(url):
                part.write(piece)
        try:
            _check(held, sha256, packed=True)
        except _UnusableError as error:
            raise _UnusableError(f"what it sent is not the file: {error}") from error
        held.replace(target)
    finally:
        held.unlink(missing_ok=True)
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
