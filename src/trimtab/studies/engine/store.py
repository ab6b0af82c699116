"""Where finished runs are kept: one SQLite file, each run in its own transaction.

A run is known by its `RunKey`: who ran (the contestant's identity), on what seed, budget and device, with which code
and data. Whoever starts a run claims it first; a claim of a process that has died is void. So nothing that was
finished is lost by a kill, and nothing is run twice, also when two runners work on one store.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import platformdirs
import torch

from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Result

VERSION = 2
T = TypeVar("T")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    arm TEXT NOT NULL, seed INTEGER NOT NULL, budget TEXT NOT NULL, device TEXT NOT NULL, sources TEXT NOT NULL,
    identity TEXT NOT NULL, result TEXT NOT NULL, seconds REAL NOT NULL, environment TEXT NOT NULL,
    finished REAL NOT NULL,
    PRIMARY KEY (arm, seed, budget, device, sources)
);
CREATE TABLE IF NOT EXISTS damaged (finished REAL NOT NULL, row TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS claims (
    arm TEXT NOT NULL, seed INTEGER NOT NULL, budget TEXT NOT NULL, device TEXT NOT NULL, sources TEXT NOT NULL,
    host TEXT NOT NULL, pid INTEGER NOT NULL, born REAL NOT NULL, progress REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (arm, seed, budget, device, sources)
);
"""
_WHERE = "arm = ? AND seed = ? AND budget = ? AND device = ? AND sources = ?"


class StoreError(RuntimeError):
    """The store cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class RunKey:
    """What makes a run the same run.

    Attributes:
        arm: hash of the contestant's identity.
        seed: the trial's seed.
        budget: the trial's budget.
        device: the trial's device type.
        sources: hash over the code and the data that it rests on.
    """

    arm: str
    seed: int
    budget: str
    device: str
    sources: str

    def values(self) -> tuple[str, int, str, str, str]:
        """The columns, in the store's order."""
        return (self.arm, self.seed, self.budget, self.device, self.sources)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        key: which run it is.
        identity: the contestant in words.
        result: what it returned.
        seconds: how long it took.
        environment: versions and machine.
        finished: seconds since the epoch.
    """

    key: RunKey
    identity: str
    result: Result
    seconds: float
    environment: Mapping[str, str]
    finished: float


def default_path() -> Path:
    """`$TRIMTAB_STORE`, or a file in the user's data folder."""
    own = os.environ.get("TRIMTAB_STORE")
    return Path(own) if own else Path(platformdirs.user_data_dir("trimtab")) / "runs.sqlite"


class Store:
    """Finished runs in one file, safe to share between processes of one machine.

    Args:
        path: the file; made, with its folder, where it does not exist.
        timeout: seconds to wait for another process that is writing.
        read_only: only look, never write; the file must be there.

    A row that cannot be read is set aside in the table `damaged`, with a warning, and the rest goes on.

    Raises:
        StoreError: the file is locked, read-only, of another version, or corrupt (then it is moved aside, whole).
    """

    def __init__(self, path: str | Path, timeout: float = 30.0, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._connection: sqlite3.Connection | None = None
        if read_only:
            if not self.path.is_file():
                raise StoreError(f"store {self.path} is not there; `trimtab run` makes one")
            with self._explained():
                # A file on a medium that cannot be written has no log to look for.
                mode = "mode=ro" if os.access(self.path.parent, os.W_OK) else "immutable=1"
                self._connection = sqlite3.connect(f"{self.path.resolve().as_uri()}?{mode}", uri=True, timeout=timeout)
                self._check_version()
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"store {self.path}: its folder cannot be made ({error.strerror})") from error
        with self._explained():
            self._connection = sqlite3.connect(self.path, timeout=timeout, isolation_level=None)
            self._prepare()

    def _check_version(self) -> int:
        version: int = self._sql("PRAGMA user_version").fetchone()[0]
        if version > VERSION or 0 < version < VERSION:
            self.close()
            age = "a newer" if version > VERSION else "an older"
            raise StoreError(
                f"store {self.path} was written by {age} trimtab (format {version}, this one knows {VERSION}); "
                "name another file with --store"
            )
        return version

    def _prepare(self) -> None:
        self._check_version()
        if self._sql("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("database disk image is malformed")
        self._sql("PRAGMA journal_mode = WAL")
        self._sql("PRAGMA synchronous = FULL")
        with self._transaction():
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._sql(statement)
            self._sql(f"PRAGMA user_version = {VERSION}")

    def _sql(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        if self._connection is None:
            raise StoreError(f"store {self.path} is closed")
        return self._connection.execute(statement, values)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what SQLite reports into one sentence that says what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                reason = "is locked by another process; wait for it, or name another file with --store"
            elif "readonly" in text or "read-only" in text:
                reason = "is read-only; make it writable, or name another file with --store"
            elif "unable to open" in text:
                reason = "cannot be opened; is it a folder, or not readable?"
            elif "full" in text:
                reason = "cannot grow: the disk is full. Runs that were reported as stored are safe"
            else:
                reason = f"cannot be used: {text}"
            raise StoreError(f"store {self.path} {reason}") from error
        except sqlite3.DatabaseError as error:
            aside = self._set_aside()
            raise StoreError(
                f"store {self.path} is damaged ({error}); it was moved to {aside} unchanged. "
                "Run the command again to start with a new one"
            ) from error

    def _set_aside(self) -> Path:
        self.close()
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        self.path.rename(aside)
        # The log belongs to the damaged file: it may hold what can still be recovered, and must not meet a new file.
        for suffix in ("-wal", "-shm"):
            log = self.path.with_name(self.path.name + suffix)
            if log.exists():
                log.rename(aside.with_name(aside.name + suffix))
        return aside

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._sql("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._sql("ROLLBACK")
            raise
        self._sql("COMMIT")

    def close(self) -> None:
        """Release the file, with all that was stored in it and nothing left in its log."""
        if self._connection is not None:
            try:
                if not self.read_only:
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.Error:
                pass  # another process is writing and will do it
            finally:
                self._connection.close()
                self._connection = None

    def check_still_there(self) -> None:
        """Find out whether the file was deleted under this store.

        Raises:
            StoreError: it was; what is written from now on would be lost.
        """
        if not self.path.is_file():
            raise StoreError(f"store {self.path} was deleted while it was in use; runs of this command are lost")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self, key: RunKey, *, again: bool = False) -> bool:
        """Take a run for this process: False if it is finished, or if a living process has it.

        Args:
            key: which run.
            again: take it although it is finished; the stored one stays until the new one replaces it.
        """
        with self._explained(), self._transaction():
            if not again and self._sql(f"SELECT 1 FROM runs WHERE {_WHERE}", key.values()).fetchone():
                return False
            held = self._sql(f"SELECT host, pid, born FROM claims WHERE {_WHERE}", key.values()).fetchone()
            if held and _alive(*held):
                return False
            self._sql(
                "INSERT OR REPLACE INTO claims (arm, seed, budget, device, sources, host, pid, born) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*key.values(), socket.gethostname(), os.getpid(), _born(os.getpid())),
            )
            return True

    def progress(self, key: RunKey, fraction: float) -> None:
        """Note how far a claimed run has come."""
        with self._explained():
            self._sql(f"UPDATE claims SET progress = ? WHERE {_WHERE}", (fraction, *key.values()))

    def running(self) -> dict[RunKey, float]:
        """The claimed runs and how far they have come, 0 to 1; those of dead processes left out."""
        with self._explained():
            rows = self._sql("SELECT arm, seed, budget, device, sources, host, pid, born, progress FROM claims")
            return {RunKey(*row[:5]): row[8] for row in rows.fetchall() if _alive(*row[5:8])}

    def abandoned(self) -> set[RunKey]:
        """The runs that a process had claimed when it died."""
        with self._explained():
            rows = self._sql("SELECT arm, seed, budget, device, sources, host, pid, born FROM claims").fetchall()
        return {RunKey(*row[:5]) for row in rows if not _alive(*row[5:8])}

    def release(self, key: RunKey) -> None:
        """Give a claim back without a result."""
        with self._explained():
            self._sql(f"DELETE FROM claims WHERE {_WHERE}", key.values())

    def add(self, run: Run, *, replace: bool = False) -> None:
        """Keep a finished run and drop its claim, in one transaction. A run that is there already stays.

        Args:
            run: the run.
            replace: overwrite one with the same key.
        """
        verb = "REPLACE" if replace else "IGNORE"
        record = (
            *run.key.values(),
            run.identity,
            _encode(run.result),
            run.seconds,
            json.dumps(dict(run.environment)),
            run.finished,
        )
        with self._explained(), self._transaction():
            self._sql(f"INSERT OR {verb} INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", record)
            self._sql(f"DELETE FROM claims WHERE {_WHERE}", run.key.values())

    def get(self, key: RunKey) -> Run | None:
        """A finished run, or None."""
        with self._explained():
            row = self._sql(f"SELECT * FROM runs WHERE {_WHERE}", key.values()).fetchone()
        return self._decoded(row) if row else None

    def all(self) -> list[Run]:
        """Every finished run, oldest first."""
        with self._explained():
            rows = self._sql("SELECT * FROM runs ORDER BY finished").fetchall()
        return [run for row in rows if (run := self._decoded(row)) is not None]

    def _decoded(self, row: tuple[Any, ...]) -> Run | None:
        try:
            return _decode(row)
        except (ValueError, KeyError, TypeError) as error:
            who = f"seed {row[1]} of {str(row[5])[:80]}"
            warnings.warn(f"store {self.path}: the run {who} cannot be read ({error}) and is set aside", stacklevel=3)
            if not self.read_only:
                with self._explained(), self._transaction():
                    self._sql("INSERT INTO damaged VALUES (?, ?)", (time.time(), repr(row)))
                    self._sql(f"DELETE FROM runs WHERE {_WHERE}", tuple(row[:5]))
            return None


def _encode(result: Result) -> str:
    return json.dumps(
        {
            "metrics": {name: float(value) for name, value in result.metrics.items()},
            "curves": {name: asdict(curve) for name, curve in result.curves.items()},
            "score": None if result.score is None else float(result.score),
            "pictures": {name: asdict(picture) for name, picture in result.pictures.items()},
        }
    )


def _decode(row: tuple[Any, ...]) -> Run:
    held = json.loads(row[6])
    curves = {name: Curve(**curve) for name, curve in held["curves"].items()}
    pictures = {name: Picture(**picture) for name, picture in held.get("pictures", {}).items()}
    result = Result(held["metrics"], curves, held["score"], pictures)
    return Run(RunKey(*row[:5]), row[5], result, row[7], json.loads(row[8]), row[9])


def _born(pid: int) -> float:
    """When a process started, so that a number used again is not taken for the old process; 0 if unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return float(fields[19])


def _alive(host: str, pid: int, born: float) -> bool:
    if host != socket.gethostname():
        return False  # only processes of this machine write here
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _born(pid) == born and not _zombie(pid)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def read_or_build(folder: Path, key: str, build: Callable[[], T]) -> T:
    """A trained part from the folder, or built now and kept there. Two processes may build it at once; one stays.

    A file that cannot be read is set aside, with a warning, and the part is built anew.
    """
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.pt"
    if path.is_file():
        try:
            kept: T = torch.load(path, weights_only=True)
            return kept
        except Exception as error:
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            warnings.warn(f"{path} cannot be read ({error}); it was moved to {aside.name}", stacklevel=2)
    value = build()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:
        torch.save(value, part)
    Path(part.name).replace(path)
    return value


def now() -> float:
    """Seconds since the epoch."""
    return time.time()
