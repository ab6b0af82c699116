"""How many runs are done at once: in this process, in joblib's workers, on a Dask or on a Ray cluster.

What is stored is not run again, what is missing runs in parallel, each run is kept at once. Every run uses one thread,
so that its numbers do not depend on where it runs.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import joblib
from joblib.externals.loky.process_executor import TerminatedWorkerError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trimtab.studies.engine.contestants import Job
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.store import Run, RunKey, Store
from trimtab.studies.engine.study import Trial


class RunError(RuntimeError):
    """Some runs failed; the others, `done`, are stored."""

    def __init__(self, message: str, done: Mapping[RunKey, Run] | None = None) -> None:
        super().__init__(message)
        self.done = dict(done or {})


class BackendError(RuntimeError):
    """The cluster cannot be reached."""


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
    with _progress(console, title, store.path, len(wanted), len(done)) as advance, _interrupts() as interrupted:
        try:
            for finished in _execute(missing, store, plan, interrupted):
                store.check_still_there()
                if isinstance(finished, _Failure):
                    failures.append(finished)
                    continue
                if plan.backend != "loky":
                    store.add(finished, replace=plan.rerun)
                done[finished.key] = finished
                advance()
                if interrupted():
                    raise KeyboardInterrupt
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) or interrupted()):
                raise
            text = f"interrupted: {len(done)} of {len(wanted)} runs are stored, the same command does the others"
            raise KeyboardInterrupt(text) from None
    if failures:
        alike: dict[str, list[_Failure]] = {}
        for failure in failures:
            job = failure.job
            alike.setdefault(f"{job.who.name} on {job.who.venue.name}: {failure.error}", []).append(failure)
        lines = "\n".join(
            f"  {held[0].job.who.name} on {held[0].job.who.venue.name}, seed {held[0].job.key.seed}: {held[0].error}"
            + (f" (and {len(held) - 1} more)" if len(held) > 1 else "")
            for held in alike.values()
        )
        raise RunError(f"{len(failures)} of {len(wanted)} runs failed, the others are stored:\n{lines}", done)
    return done


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Says whether Ctrl-C was pressed.

    The exception alone does not tell: workers that die of the same signal while they start raise another one over it.
    """
    seen = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield seen.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.set()
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def announce(jobs: Sequence[Job], plan: Plan, console: Console | None, title: str) -> None:
    """Say how much there is to do, where it takes more than a minute."""
    if console is None or plan.budget != "laptop" or not jobs:
        return
    cores = plan.jobs or joblib.cpu_count()
    minutes = math.fsum(job.who.venue.cost for job in jobs) / cores / 60
    if minutes > 1:
        console.print(f"{title}: {len(jobs)} runs to do, about {minutes:.0f} minutes on {cores} cores", highlight=False)


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


def _execute(
    jobs: Sequence[Job], store: Store, plan: Plan, interrupted: Callable[[], bool]
) -> Iterator[Run | _Failure]:
    """The runs as they finish; those that measure speed at the end, one at a time."""
    for alone in (False, True):
        group = [job for job in jobs if getattr(job.who.venue, "alone", False) == alone]
        how = replace(plan, jobs=1) if alone and plan.backend == "loky" else plan
        yield from _execute_together(group, store, how, interrupted)


def _execute_together(
    jobs: Sequence[Job], store: Store, plan: Plan, interrupted: Callable[[], bool]
) -> Iterator[Run | _Failure]:
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
            if interrupted():
                raise
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
