"""Who runs, and what one run of it is: its key in the store, and what comes out."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import cast

import joblib
import numpy as np
import torch

from trimtab.data import DataCorruptError, DataNotFoundError
from trimtab.studies.engine.identity import code_hash, data_hash, describe
from trimtab.studies.engine.store import Run, RunKey, now
from trimtab.studies.engine.study import Arm, Budget, Entrant, Setting, Task, Trial, Venue, at_edge, settings_of


@dataclass(frozen=True)
class Contestant:
    """Somebody somewhere.

    Attributes:
        name: for tables.
        paper: the slug of the paper it stands for; empty for a reference.
        venue: the task's variant or the experiment.
        body: what it brings.
    """

    name: str
    paper: str
    venue: Venue
    body: Entrant | Arm

    def obstacle(self, budget: Budget) -> str:
        """Why it cannot run here or on this machine, in words; empty where nothing is in its way."""
        if isinstance(self.venue, Task):
            entrant = cast(Entrant, self.body)
            if entrant.unfit is not None and (reason := entrant.unfit(self.venue)):
                return reason
            needed: Sequence[str] = entrant.requires
        else:
            needed = self.venue.requires.get(self.name, ())
        if missing := [name for name in needed if not _installed(name)]:
            return f"it needs {', '.join(missing)}, which is not installed"
        for name in self.venue.datasets(budget):
            if not _at_hand(name):
                return f"the data set {name} cannot be had here"
        return ""

    def cost(self, budget: Budget) -> float:
        """Seconds of one core that its search and its seeds take, about, by what a run costs at the laptop budget."""
        tries = len(self.grid(budget))
        return (tries * (tries > 1) + self.venue.seeds[budget]) * self.venue.cost

    def grid(self, budget: Budget) -> list[Setting]:
        """The settings it may choose from; the middle one alone where a run takes seconds and shows nothing."""
        if not isinstance(self.venue, Task):
            return [{}]
        settings = settings_of(self.venue.grid(self.body))  # type: ignore[arg-type]
        return [settings[len(settings) // 2]] if budget == "smoke" else settings

    def edge(self, setting: Setting) -> list[str]:
        """The names whose value in a setting is an end of what it may choose from."""
        return at_edge(setting, self.venue.grid(self.body)) if isinstance(self.venue, Task) else []  # type: ignore[arg-type]

    def described(self, setting: Setting, *, searching: bool = False) -> tuple[str, str]:
        """What runs of it are called in full, and the arm in their keys, which is a hash of that."""
        name = f"{describe(self._where)} {describe(self.body)} {describe(dict(setting))}" + " search" * searching
        return name, _short_hash(name)

    def job(self, seed: int, setting: Setting, budget: Budget, device: str, *, searching: bool = False) -> Job:
        """One run of it."""
        name, arm = self.described(setting, searching=searching)
        code = code_hash((self._where, self.body))
        data = " ".join(data_hash(read) for read in self.venue.datasets(budget))
        key = RunKey(arm, seed, budget, torch.device(device).type, _short_hash(f"{code} {data}"))
        return Job(self, key, name, setting, searching, device)

    @property
    def _where(self) -> object:
        return self.venue if isinstance(self.venue, Task) else ""


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a submodule whose package is missing
        return False


@cache
def _at_hand(name: str) -> bool:
    try:
        data_hash(name)
    except (DataNotFoundError, DataCorruptError):
        return False
    return True


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """One run to be done."""

    who: Contestant
    key: RunKey
    identity: str
    setting: Setting
    searching: bool
    device: str

    def execute(self, trial: Trial) -> Run:
        """Run it and describe what came out."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started = time.process_time()
        try:
            venue, body = self.who.venue, self.who.body
            with _global_generators(trial.seed):
                result = venue.run(trial, body) if isinstance(venue, Task) else body(trial)  # type: ignore[operator]
        finally:
            torch.set_num_threads(threads)
        return Run(self.key, self.identity, result, time.process_time() - started, environment(), now())


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Fixes the states that belong to the process, for what draws from them in spite of all, and puts them back."""
    plain, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(array)  # noqa: NPY002


@cache
def environment() -> dict[str, str]:
    """Versions and machine, as a run keeps them."""
    versions = {name: metadata.version(name) for name in ("trimtab", "torch", "numpy", "scipy", "scikit-learn")}
    machine = f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores"
    return {**versions, "python": platform.python_version(), "machine": machine}
