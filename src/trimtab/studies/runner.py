"""How studies are run: what is stored is not run again, what is missing runs in parallel, each run is kept at once.

Every run of an arm uses one thread, so that its numbers do not depend on where it runs: in this process, in
joblib's workers, on a Dask or on a Ray cluster.
"""

from __future__ import annotations

import hashlib
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trimtab.studies.identity import identity, sources_hash
from trimtab.studies.outcome import Outcome
from trimtab.studies.store import Run, RunKey, Store, now
from trimtab.studies.study import BUDGETS, Arm, Budget, Study, Trial

Backend = Literal["loky", "dask", "ray"]


class RunError(RuntimeError):
    """Some runs failed; the others are stored."""


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
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device: {self.device!r} is not a torch device string") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: {self.device!r} is not on this machine; PyTorch sees no CUDA device")


@dataclass(frozen=True)
class Job:
    """One run to be done: an arm on a seed."""

    arm: Arm
    key: RunKey
    identity: str
    device: str

    def execute(self, trial: Trial) -> Run:
        """Run the arm and describe what came out."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        started = time.perf_counter()
        try:
            result = self.arm(trial)
        finally:
            torch.set_num_threads(threads)
        return Run(self.key, self.identity, result, time.perf_counter() - started, environment(), now())


@cache
def environment() -> dict[str, str]:
    """Versions and machine, as a run keeps them."""
    versions = {name: metadata.version(name) for name in ("trimtab", "torch", "numpy", "scipy", "scikit-learn")}
    machine = f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores"
    return {**versions, "python": platform.python_version(), "machine": machine}


def make_jobs(arm: Arm, seeds: Sequence[int], budget: Budget, device: str) -> list[Job]:
    """The runs of an arm."""
    name = identity(arm)
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    kind, code = torch.device(device).type, sources_hash(arm)
    return [Job(arm, RunKey(digest, seed, budget, kind, code), name, device) for seed in seeds]


def _work(job: Job, store: Path | None, artifacts: Path | None, rerun: bool = False) -> Run:
    """What a worker does. With a store it keeps its run itself; without, it hands the run back."""
    trial = Trial(seed=job.key.seed, budget=job.key.budget, device=job.device, artifacts=artifacts)  # type: ignore[arg-type]
    if store is None:
        return job.execute(trial)
    with Store(store) as kept:
        while not kept.claim(job.key):
            if (run := kept.get(job.key)) is not None and not rerun:
                return run
            if run is not None:
                kept.remove(job.key)
                continue
            time.sleep(0.2)  # another living process has it
        try:
            run = job.execute(replace(trial, report=_Reporter(kept, job.key)))
        except BaseException:
            kept.release(job.key)
            raise
        kept.add(run)
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
    """One failed arm must not take the others with it."""
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
    """
    wanted = {job.key: job for job in jobs}
    done = {} if plan.rerun else {key: run for key in wanted if (run := store.get(key)) is not None}
    missing = [job for key, job in wanted.items() if key not in done]
    failures: list[_Failure] = []
    with _progress(console, title, store.path, len(wanted), len(done)) as advance:
        try:
            for finished in _execute(missing, store, plan):
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
        lines = "\n".join(f"  seed {f.job.key.seed} of {f.job.identity[:160]}: {f.error}" for f in failures)
        raise RunError(f"{len(failures)} of {len(wanted)} runs failed, the others are stored:\n{lines}")
    return done


def _execute(jobs: Sequence[Job], store: Store, plan: Plan) -> Iterator[Run | _Failure]:
    """The runs as they finish."""
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


def run_studies(studies: Sequence[Study], store: Store, plan: Plan, console: Console | None = None) -> list[Outcome]:
    """Run studies and judge them; an arm that several of them share runs once.

    Args:
        studies: what to run.
        store: where runs are kept.
        plan: how to run.
        console: shows progress there; None shows nothing.

    Raises:
        RunError: some runs failed. The others were done and stored first.
    """
    jobs = {
        (study.paper, name): make_jobs(arm, range(plan.seeds or study.num_seeds(plan.budget)), plan.budget, plan.device)
        for study in studies
        for name, arm in study.arms.items()
    }
    title = studies[0].paper if len(studies) == 1 else f"{len(studies)} studies"
    runs = run_jobs([job for held in jobs.values() for job in held], store, plan, console, title)
    return [
        Outcome(study, plan.budget, {name: [runs[job.key] for job in jobs[study.paper, name]] for name in study.arms})
        for study in studies
    ]


def run_arms(
    arms: Mapping[str, Arm], store: Store, plan: Plan, console: Console | None = None, title: str = "arms"
) -> dict[str, list[Run]]:
    """Run contestants side by side, without claims: name -> one run a seed.

    Raises:
        RunError: some runs failed. The others were done and stored first.
    """
    seeds = range(plan.seeds or Study.DEFAULT_SEEDS[plan.budget])
    jobs = {name: make_jobs(arm, seeds, plan.budget, plan.device) for name, arm in arms.items()}
    runs = run_jobs([job for held in jobs.values() for job in held], store, plan, console, title)
    return {name: [runs[job.key] for job in held] for name, held in jobs.items()}
