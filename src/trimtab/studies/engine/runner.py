"""How contestants are run: settings are tried first, then every seed runs with the chosen one.

What is stored is not run again, what is missing runs in parallel, each run is kept at once. Every run uses one thread,
so that its numbers do not depend on where it runs: in this process, in joblib's workers, on a Dask or on a Ray cluster.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import multiprocessing
import platform
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trimtab.data import DataCorruptError, DataNotFoundError
from trimtab.studies.engine.identity import code_hash, data_hash, describe
from trimtab.studies.engine.store import Run, RunKey, Store, now
from trimtab.studies.engine.study import (
    BUDGETS,
    SEARCH_SEED,
    Arm,
    Budget,
    Entrant,
    Setting,
    Task,
    Trial,
    Venue,
    at_edge,
    settings_of,
)

Backend = Literal["loky", "dask", "ray"]


class RunError(RuntimeError):
    """Some runs failed; the others, `done`, are stored."""

    def __init__(self, message: str, done: Mapping[RunKey, Run] | None = None) -> None:
        super().__init__(message)
        self.done = dict(done or {})


class BackendError(RuntimeError):
    """The cluster cannot be reached."""


@dataclass(frozen=True)
class Plan:
    """How to run.

    Attributes:
        budget: the budget of every run.
        seeds: number of seeds; None leaves it to each study.
        jobs: parallel runs; None means one for each core (of the cluster, where there is one).
        backend: "loky" (processes on this machine), "dask" or "ray".
        address: of the cluster's scheduler; None starts one on this machine.
        device: a torch device string.
        rerun: run again what is stored.
    """

    budget: Budget = "laptop"
    seeds: int | None = None
    jobs: int | None = None
    backend: Backend = "loky"
    address: str | None = None
    device: str = "cpu"
    rerun: bool = False

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {self.budget!r}")
        if self.backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {self.backend!r}")
        for name, value in (("seeds", self.seeds), ("jobs", self.jobs)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.address is not None and self.backend == "loky":
            raise ValueError("address names a cluster's scheduler: give it with backend 'dask' or 'ray'")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            why = str(error).partition("\n")[0]
            raise ValueError(f"device must be one that PyTorch has here, got {self.device!r} ({why})") from None


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
        """Why it cannot run on this machine, in words; empty where nothing is in its way."""
        if isinstance(self.venue, Task):
            needed: Sequence[str] = self.body.requires  # type: ignore[union-attr]
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

    def job(self, seed: int, setting: Setting, budget: Budget, device: str, *, searching: bool = False) -> Job:
        """One run of it."""
        where = self.venue if isinstance(self.venue, Task) else ""
        name = f"{describe(where)} {describe(self.body)} {describe(dict(setting))}" + " search" * searching
        code = code_hash((where, self.body))
        data = " ".join(data_hash(read) for read in self.venue.datasets(budget))
        key = RunKey(_short_hash(name), seed, budget, torch.device(device).type, _short_hash(f"{code} {data}"))
        return Job(self, key, name, setting, searching, device)


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
            result = venue.run(trial, body) if isinstance(venue, Task) else body(trial)  # type: ignore[operator]
        finally:
            torch.set_num_threads(threads)
        return Run(self.key, self.identity, result, time.process_time() - started, environment(), now())


@cache
def environment() -> dict[str, str]:
    """Versions and machine, as a run keeps them."""
    versions = {name: metadata.version(name) for name in ("trimtab", "torch", "numpy", "scipy", "scikit-learn")}
    machine = f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores"
    return {**versions, "python": platform.python_version(), "machine": machine}


def _work(job: Job, store: Path | None, artifacts: Path | None, rerun: bool = False) -> Run:
    """What a worker does. With a store it keeps its run itself; without, it hands the run back."""
    trial = Trial(
        seed=job.key.seed,
        budget=job.key.budget,  # type: ignore[arg-type]
        device=job.device,
        setting=job.setting,
        searching=job.searching,
        artifacts=artifacts,
    )
    if store is None:
        return job.execute(trial)
    with Store(store) as kept:
        while not kept.claim(job.key, again=rerun):
            if (run := kept.get(job.key)) is not None and not rerun:
                return run
            time.sleep(0.2)  # another living process has it
        try:
            run = job.execute(replace(trial, report=_Reporter(kept, job.key)))
            kept.add(run, replace=rerun)
        except BaseException:
            kept.release(job.key)
            raise
    return run


class _Reporter:
    """Notes progress in the store, at most once a second."""

    def __init__(self, store: Store, key: RunKey) -> None:
        self.store, self.key, self.last = store, key, time.monotonic()

    def __call__(self, fraction: float) -> None:
        if time.monotonic() - self.last > 1.0:
            self.last = time.monotonic()
            self.store.progress(self.key, fraction)


@dataclass(frozen=True)
class _Failure:
    job: Job
    error: str


def _guarded(job: Job, store: Path | None, artifacts: Path | None, rerun: bool) -> Run | _Failure:
    """One failed run must not take the others with it."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the workers too; the parent decides
    try:
        return _work(job, store, artifacts, rerun)
    except Exception as error:
        return _Failure(job, f"{type(error).__name__}: {error}")


def run_jobs(
    jobs: Sequence[Job], store: Store, plan: Plan, console: Console | None = None, title: str = "runs"
) -> dict[RunKey, Run]:
    """Do what is missing and return every run.

    Args:
        jobs: the runs wanted; the same one may be named several times.
        store: where they are kept.
        plan: how to run.
        console: shows progress there; None shows nothing.
        title: what the progress bar says.

    Raises:
        RunError: some runs failed. The others were done and stored first.
        StoreError: the store was deleted under the runs.
    """
    wanted = {job.key: job for job in jobs}
    done = {} if plan.rerun else {key: run for key in wanted if (run := store.get(key)) is not None}
    missing = [job for key, job in wanted.items() if key not in done]
    failures: list[_Failure] = []
    announce(missing, plan, console, title)
    with _progress(console, title, store.path, len(wanted), len(done)) as advance:
        try:
            for finished in _execute(missing, store, plan):
                store.check_still_there()
                if isinstance(finished, _Failure):
                    failures.append(finished)
                    continue
                if plan.backend != "loky":
                    store.add(finished, replace=plan.rerun)
                done[finished.key] = finished
                advance()
        except KeyboardInterrupt:
            text = f"interrupted: {len(done)} of {len(wanted)} runs are stored, the same command does the others"
            raise KeyboardInterrupt(text) from None
    if failures:
        lines = "\n".join(
            f"  {f.job.who.name} on {f.job.who.venue.name}, seed {f.job.key.seed}: {f.error}" for f in failures
        )
        raise RunError(f"{len(failures)} of {len(wanted)} runs failed, the others are stored:\n{lines}", done)
    return done


def announce(jobs: Sequence[Job], plan: Plan, console: Console | None, title: str) -> None:
    """Say how much there is to do, where it takes more than a minute."""
    if console is None or plan.budget != "laptop" or not jobs:
        return
    cores = plan.jobs or joblib.cpu_count()
    minutes = math.fsum(job.who.venue.cost for job in jobs) / cores / 60
    if minutes > 1:
        console.print(f"{title}: {len(jobs)} runs to do, about {minutes:.0f} minutes on {cores} cores", highlight=False)


def _execute(jobs: Sequence[Job], store: Store, plan: Plan) -> Iterator[Run | _Failure]:
    """The runs as they finish; those that measure speed at the end, one at a time."""
    for alone in (False, True):
        group = [job for job in jobs if getattr(job.who.venue, "alone", False) == alone]
        yield from _execute_together(group, store, replace(plan, jobs=1) if alone and plan.backend == "loky" else plan)


def _execute_together(jobs: Sequence[Job], store: Store, plan: Plan) -> Iterator[Run | _Failure]:
    if not jobs:
        return
    local = plan.backend == "loky"
    path = store.path.resolve() if local else None
    # Workers of a cluster may sit on another machine: they keep nothing and train shared parts themselves.
    artifacts = store.path.resolve().parent / "artifacts" if local else None
    if local and (plan.jobs == 1 or len(jobs) == 1):
        for job in jobs:
            yield _guarded(job, path, artifacts, plan.rerun)
        return
    if plan.backend == "ray":
        yield from _on_ray(jobs, plan)
        return
    # A worker that is killed takes the pool with it. What it held is tried once more; a second time, it is the run's
    # own doing, and the others go on without it.
    suspects: set[RunKey] = set()
    left = {job.key: job for job in jobs}
    while left:
        try:
            for finished in _in_pool(list(left.values()), path, artifacts, plan):
                left.pop(finished.job.key if isinstance(finished, _Failure) else finished.key, None)
                yield finished
            return
        except TerminatedWorkerError:
            store.check_still_there()
            held = store.abandoned() & set(left)
            for key in held & suspects:
                yield _Failure(left.pop(key), "its process was killed twice (out of memory?)")
            suspects |= held
            if not held:
                raise RunError("the worker processes are killed before they start a run") from None


def _in_pool(jobs: Sequence[Job], path: Path | None, artifacts: Path | None, plan: Plan) -> Iterator[Run | _Failure]:
    with _joblib(plan) as workers:
        # No more in the queue than can run: what an interrupt cancels while it waits there, loky stumbles over.
        parallel = joblib.Parallel(n_jobs=workers, batch_size=1, pre_dispatch=workers, return_as="generator_unordered")
        yield from parallel(joblib.delayed(_guarded)(job, path, artifacts, plan.rerun) for job in jobs)


@contextmanager
def _joblib(plan: Plan) -> Iterator[int]:
    """Choose joblib's backend; yields the number of workers."""
    if plan.backend == "loky":
        with joblib.parallel_config(backend="loky"):
            yield plan.jobs or joblib.cpu_count()
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ImportError("backend 'dask' needs the extra: pip install 'trimtab[dask]'") from error
    cluster: AbstractContextManager[Any] = nullcontext(plan.address)
    if plan.address is None:
        cluster = LocalCluster(n_workers=plan.jobs or joblib.cpu_count(), threads_per_worker=1, dashboard_address=None)
    try:
        with cluster as where, Client(where, timeout="20s") as client:
            client.wait_for_workers(1, timeout=20)
            with joblib.parallel_config(backend="dask"):
                yield plan.jobs or sum(client.nthreads().values())
    except OSError as error:
        raise BackendError(f"no Dask scheduler answers at {plan.address}: {error}") from error


def _on_ray(jobs: Sequence[Job], plan: Plan) -> Iterator[Run | _Failure]:
    # Ray's own joblib backend hands results back only when all are done; each run must be kept as it finishes.
    try:
        import ray
    except ImportError as error:
        raise ImportError("backend 'ray' needs the extra: pip install 'trimtab[ray]'") from error
    try:
        ray.init(address=plan.address, num_cpus=None if plan.address else plan.jobs, include_dashboard=False)
    except ConnectionError as error:
        raise BackendError(f"no Ray cluster answers at {plan.address}: {error}") from error
    try:
        remote = ray.remote(num_cpus=1)(_guarded)
        waiting = [remote.remote(job, None, None, plan.rerun) for job in jobs]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)
    finally:
        ray.shutdown()


@contextmanager
def _progress(console: Console | None, title: str, path: Path, total: int, done: int) -> Iterator[Any]:
    """A bar over all runs that also moves within them, as far as they report."""
    if console is None or done == total:
        yield lambda: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    finished, ended = done, threading.Event()

    def watch(bar: Progress, task: Any) -> None:
        with Store(path) as store:
            while not ended.wait(0.5):
                parts = sum(store.running().values())
                bar.update(task, completed=min(total, finished + parts), runs=f"{finished}/{total} runs")

    with Progress(
        columns[0], columns[1], TextColumn("{task.fields[runs]}"), columns[3], console=console, transient=False
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, runs=f"{done}/{total} runs")

        def advance() -> None:
            nonlocal finished
            finished += 1
            bar.update(task, completed=finished, runs=f"{finished}/{total} runs")

        watcher = threading.Thread(target=watch, args=(bar, task), daemon=True)
        watcher.start()
        try:
            yield advance
        finally:
            ended.set()
            watcher.join()


@dataclass(frozen=True)
class Ran:
    """The finished runs of a contestant.

    Attributes:
        who: the contestant.
        runs: one a seed, in the order of the seeds.
        setting: what the search chose.
        edge: the names whose chosen value sits at the edge of its grid.
    """

    who: Contestant
    runs: tuple[Run, ...]
    setting: Setting
    edge: tuple[str, ...] = ()

    def values(self, metric: str) -> list[float]:
        """The metric of each seed, NaN where a run does not have it."""
        return [float(run.result.metrics.get(metric, math.nan)) for run in self.runs]


def search_jobs(who: Contestant, plan: Plan) -> list[Job]:
    """The runs that try its settings; none where there is nothing to choose."""
    settings = who.grid(plan.budget)
    if len(settings) == 1:
        return []
    return [who.job(SEARCH_SEED, setting, plan.budget, plan.device, searching=True) for setting in settings]


def choose(who: Contestant, plan: Plan, runs: Sequence[Run]) -> tuple[Setting, tuple[str, ...]]:
    """The setting of the best score, the first of equals, and the names that sit at the edge of their grid."""
    settings = who.grid(plan.budget)
    if len(settings) == 1:
        return settings[0], ()
    given = (run.result.score for run in runs)
    scores = [-math.inf if score is None or math.isnan(score) else score for score in given]
    best = max(range(len(settings)), key=scores.__getitem__)
    grid = who.venue.grid(who.body)  # type: ignore[union-attr, arg-type]
    return settings[best], tuple(at_edge(settings[best], grid))


def seed_jobs(who: Contestant, setting: Setting, plan: Plan) -> list[Job]:
    """Its runs with the chosen setting, one a seed."""
    seeds = plan.seeds or who.venue.seeds[plan.budget]
    return [who.job(seed, setting, plan.budget, plan.device) for seed in range(seeds)]


def run_contestants(
    contestants: Sequence[Contestant], store: Store, plan: Plan, console: Console | None = None, title: str = "runs"
) -> list[Ran]:
    """Try settings, then run every seed; a contestant that several studies share runs once.

    Raises:
        RunError: some runs failed. The others were done and stored first.
    """
    problems: list[str] = []

    def run_what_can(jobs: Sequence[Job], title: str) -> dict[RunKey, Run]:
        try:
            return run_jobs(jobs, store, plan, console, title)
        except RunError as error:
            problems.append(str(error))
            return error.done

    searches = [search_jobs(who, plan) for who in contestants]
    tried = run_what_can([job for held in searches for job in held], f"{title}, search")
    chosen = {
        place: choose(contestants[place], plan, [tried[job.key] for job in held])
        for place, held in enumerate(searches)
        if all(job.key in tried for job in held)
    }
    jobs = {place: seed_jobs(contestants[place], setting, plan) for place, (setting, _) in chosen.items()}
    runs = run_what_can([job for held in jobs.values() for job in held], title)
    if problems:
        raise RunError("\n".join(problems), runs)
    return [Ran(contestants[i], tuple(runs[job.key] for job in held), *chosen[i]) for i, held in jobs.items()]


def stored(who: Contestant, store: Store, plan: Plan) -> Ran | None:
    """What the store holds of a contestant with the code and data as they stand; None unless every seed is there."""
    if who.obstacle(plan.budget):
        return None
    found = [store.get(job.key) for job in search_jobs(who, plan)]
    if any(run is None for run in found):
        return None
    setting, edge = choose(who, plan, [run for run in found if run is not None])
    runs = [store.get(job.key) for job in seed_jobs(who, setting, plan)]
    if any(run is None for run in runs):
        return None
    return Ran(who, tuple(run for run in runs if run is not None), setting, edge)
