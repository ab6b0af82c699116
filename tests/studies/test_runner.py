"""The runner: nothing lost, nothing repeated, the same numbers everywhere."""

import contextlib
import importlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from trimtab.studies.engine import pool
from trimtab.studies.engine.contestants import Contestant
from trimtab.studies.engine.plan import Plan
from trimtab.studies.engine.pool import BackendError, RunError
from trimtab.studies.engine.runner import run_contestants, stored
from trimtab.studies.engine.store import Store, StoreError
from trimtab.studies.engine.study import Curve, Experiment, Metric, Result, Trial


def draw(trial: Trial, shift: float = 0.0) -> Result:
    value = torch.randn(1000, generator=trial.generator()).sum().item() + shift
    return Result({"value": value}, {"line": Curve([1.0, 2.0], [value, shift])})


def logged(trial: Trial, log: str = "", name: str = "") -> Result:
    with Path(log).open("a") as file:
        file.write(f"{name} {trial.seed} {time.time()}\n")
    time.sleep(0.02)
    return Result({"value": trial.seed + len(name)})


def diverging(trial: Trial) -> Result:
    raise FloatingPointError("loss is nan")


def killed(trial: Trial) -> Result:
    os._exit(9)


def slow(trial: Trial) -> Result:
    time.sleep(0.5)
    return Result({"value": 1.0})


def who(name: str, arm, **options) -> Contestant:
    metrics = {"value": Metric("value")}
    return Contestant(name, "elr", Experiment("toy", {name: arm}, metrics, **options), arm)


def crowd(log: Path, count: int) -> list[Contestant]:
    return [who(f"arm-{n}", partial(logged, log=str(log), name="x" * (n + 1))) for n in range(count)]


def starts(log: Path) -> list[tuple[str, int, float]]:
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(name, int(seed), float(when)) for name, seed, when in lines]


SMOKE = Plan(budget="smoke", seeds=3, jobs=1)
PAIR = Plan(budget="smoke", seeds=3, jobs=2)


def test_stored_runs_are_not_run_again(tmp_path):
    log = tmp_path / "log"
    with Store(tmp_path / "runs.sqlite") as store:
        first = run_contestants(crowd(log, 2), store, SMOKE)
        again = run_contestants(crowd(log, 3), store, SMOKE)
    assert len(starts(log)) == 9
    assert [run.finished for run in first[0].runs] == [run.finished for run in again[0].runs]


def test_one_contestant_of_two_names_runs_once(tmp_path):
    log = tmp_path / "log"
    base = partial(logged, log=str(log), name="base")
    with Store(tmp_path / "runs.sqlite") as store:
        ran = run_contestants([who("base", base), who("reference", base)], store, SMOKE)
    assert len(starts(log)) == 3
    assert [held.who.name for held in ran] == ["base", "reference"]


def test_what_is_stored_is_found_only_when_every_seed_is_there(tmp_path):
    (one,) = crowd(tmp_path / "log", 1)
    with Store(tmp_path / "runs.sqlite") as store:
        run_contestants([one], store, SMOKE)
        found = stored(one, store, SMOKE)
        assert found is not None
        assert found.values("value") == [1.0, 2.0, 3.0]
        assert stored(one, store, Plan(budget="smoke", seeds=4)) is None


def test_rerun_replaces_what_is_stored(tmp_path):
    log = tmp_path / "log"
    with Store(tmp_path / "runs.sqlite") as store:
        (before,) = run_contestants(crowd(log, 1), store, SMOKE)
        (after,) = run_contestants(crowd(log, 1), store, Plan(budget="smoke", seeds=3, jobs=1, rerun=True))
        kept = store.all()
    assert len(starts(log)) == 6
    assert len(kept) == 3
    assert after.runs[0].finished > before.runs[0].finished


def test_a_rerun_that_is_killed_leaves_the_stored_run(tmp_path):
    log, path = tmp_path / "log", tmp_path / "runs.sqlite"
    (one,) = crowd(log, 1)
    with Store(path) as store:
        (before,) = run_contestants([one], store, SMOKE)
    gate = tmp_path / "gate"
    child = os.fork()
    if child == 0:
        import trimtab.studies.engine.store as stores

        def wait(self, run, *, replace=False):
            gate.touch()
            time.sleep(60)

        stores.Store.add = wait  # between the new run's end and its being stored
        with Store(path) as store:
            run_contestants([one], store, Plan(budget="smoke", seeds=3, jobs=1, rerun=True))
        os._exit(0)
    _wait_until(gate.exists)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Store(path) as store:
        assert {run.key: run for run in store.all()} == {run.key: run for run in before.runs}
        assert stored(one, store, SMOKE) == before


@pytest.mark.timeout(120)
def test_kill_9_loses_nothing_and_repeats_nothing(tmp_path):
    """Killed again and again at random moments, and started again each time."""
    log, path = tmp_path / "log", tmp_path / "runs.sqlite"
    wanted, chance, kills, seen = crowd(log, 6), random.Random(0), 0, {}
    plan = Plan(budget="smoke", seeds=5, jobs=1)
    with Store(path):
        pass
    while True:
        child = os.fork()
        if child == 0:
            try:
                with Store(path) as store:
                    run_contestants(wanted, store, plan)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        gone = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += gone
        with Store(path) as store:
            now = {run.key: run for run in store.all()}
        assert {key: now.get(key) for key in seen} == seen, "a finished run was lost or changed"
        seen = now
        if len(seen) == 30 and not gone:
            break
    assert kills >= 4
    finished = {(run.key.seed, int(run.result.metrics["value"]) - run.key.seed): run.finished for run in seen.values()}
    for name, seed, when in starts(log):
        assert when < finished[seed, len(name)], "a run was started again after it had been stored"


@pytest.mark.timeout(200)
def test_kill_9_with_parallel_workers(tmp_path):
    """The same with joblib's workers: the orphans of a killed parent neither lose nor double a run."""
    log, path = tmp_path / "log", tmp_path / "runs.sqlite"
    script = tmp_path / "go.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_runner import crowd
        from trimtab.studies.engine.plan import Plan
        from trimtab.studies.engine.runner import run_contestants
        from trimtab.studies.engine.store import Store
        with Store({str(path)!r}) as store:
            print("ready", flush=True)
            run_contestants(crowd(Path({str(log)!r}), 6), store, Plan(budget="smoke", seeds=25, jobs=2))
        """)
    )
    kills = 0
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        if attempt < 1:
            _wait_for_runs(path, more=5)
            process.kill()  # the parent alone: its workers become orphans
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        process.stdout.close()
        if process.returncode == 0:
            break
    assert kills == 1
    assert len(_stored(path)) == 150
    count = {(name, seed): 0 for name, seed, _ in starts(log)}
    for name, seed, _ in starts(log):
        count[name, seed] += 1
    # Only a run that a kill cut short may start twice: at most one a worker and kill.
    assert sum(number - 1 for number in count.values()) <= 2 * kills


def _stored(path: Path) -> list[object]:
    with Store(path) as store:
        return list(store.all())


def _wait_for_runs(path: Path, more: int) -> None:
    before = len(_stored(path))
    _wait_until(lambda: len(_stored(path)) >= before + more)


def _wait_until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


@pytest.fixture
def importable_by_workers(monkeypatch):
    # loky's processes import what they run by its module's name.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    import test_runner

    return test_runner


@pytest.mark.timeout(200)
def test_a_worker_that_is_killed_is_named_and_the_others_finish(tmp_path, importable_by_workers):
    here = importable_by_workers
    wanted = [here.who("suicidal", here.killed), *here.crowd(tmp_path / "log", 3)]
    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(RunError, match=r"3 of 12 runs failed.*\n.*suicidal.*its process was killed twice"):
            run_contestants(wanted, store, PAIR)
        assert len(store.all()) == 9
        assert store.running() == {}


def test_a_store_deleted_under_a_run_is_an_error(tmp_path):
    path = tmp_path / "runs.sqlite"

    def delete(trial: Trial) -> Result:
        if trial.seed == 1:
            for file in tmp_path.glob("runs.sqlite*"):
                file.unlink()
        return Result({"value": 0.0})

    with Store(path) as store, pytest.raises(StoreError, match="deleted while it was in use"):
        run_contestants([who("deleting", delete)], store, SMOKE)


def test_after_a_clean_end_all_is_in_the_main_file(tmp_path):
    path = tmp_path / "runs.sqlite"
    with Store(path) as store:
        run_contestants(crowd(tmp_path / "log", 1), store, SMOKE)
    log = path.with_name("runs.sqlite-wal")
    assert not log.exists() or log.stat().st_size == 0
    assert len(_stored(path)) == 3


@pytest.mark.timeout(200)
def test_dask_cluster_of_processes_gives_the_same_numbers(tmp_path):
    """A scheduler and two workers as separate processes, reached by address."""
    pytest.importorskip("distributed")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    wanted = [who("plain", draw), who("shifted", partial(draw, shift=2.5))]
    file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    command += ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file)]
    worker += ["--nthreads", "1", "--no-dashboard", "--no-nanny", "--local-directory", str(tmp_path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    processes = [subprocess.Popen(command, **quiet)]
    try:
        _wait_until(file.exists)
        processes += [subprocess.Popen(worker, **quiet) for _ in range(2)]
        import json

        address = json.loads(file.read_text())["address"]
        with Store(tmp_path / "dask.sqlite") as store, Store(tmp_path / "local.sqlite") as other:
            remote = run_contestants(wanted, store, Plan(budget="smoke", seeds=4, backend="dask", address=address))
            local = run_contestants(wanted, other, Plan(budget="smoke", seeds=4, jobs=1))
            assert len(store.all()) == 8
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for one, same in zip(remote, local, strict=True):
        assert [run.result for run in one.runs] == [run.result for run in same.runs]


@pytest.mark.timeout(200)
def test_ray_gives_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with Store(tmp_path / "ray.sqlite") as store, Store(tmp_path / "local.sqlite") as other:
        (remote,) = run_contestants([who("plain", draw)], store, Plan(budget="smoke", seeds=3, jobs=2, backend="ray"))
        (local,) = run_contestants([who("plain", draw)], other, SMOKE)
    assert [run.result for run in remote.runs] == [run.result for run in local.runs]


def test_no_scheduler_at_the_address(tmp_path):
    pytest.importorskip("distributed")
    with Store(tmp_path / "runs.sqlite") as store, pytest.raises(BackendError, match="127.0.0.1:9"):
        run_contestants(
            [who("a", draw)], store, Plan(budget="smoke", seeds=2, backend="dask", address="tcp://127.0.0.1:9")
        )


def test_one_failing_contestant_does_not_take_the_others_with_it(tmp_path):
    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(RunError, match=r"3 of 6 runs failed.*\n.*bad on toy, seed 0: FloatingPointError: loss is"):
            run_contestants([who("bad", diverging), who("good", draw)], store, SMOKE)
        assert len(store.all()) == 3
        assert store.running() == {}


def test_interrupt_says_what_is_stored(tmp_path):
    def interrupted(trial: Trial) -> Result:
        if trial.seed == 2:
            raise KeyboardInterrupt
        return draw(trial)

    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(KeyboardInterrupt, match="2 of 3 runs are stored"):
            run_contestants([who("a", interrupted)], store, SMOKE)
        assert len(store.all()) == 2
        assert store.running() == {}


@pytest.mark.parametrize("after", ["a dead pool", "a finished run"])
def test_an_interrupt_that_gets_lost_in_the_pool_still_ends_the_run(tmp_path, monkeypatch, after):
    def swallow(jobs, path, artifacts, plan):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        if after == "a dead pool":
            raise TerminatedWorkerError("the workers died of it")
        yield pool._guarded(jobs[0], path, artifacts, plan.rerun)
        raise AssertionError("went on")

    monkeypatch.setattr(pool, "_in_pool", swallow)
    before = signal.getsignal(signal.SIGINT)
    with (
        Store(tmp_path / "runs.sqlite") as store,
        pytest.raises(KeyboardInterrupt, match=r"of 6 runs are stored, the same command does the others"),
    ):
        run_contestants(crowd(tmp_path / "log", 2), store, PAIR)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_draws_from_the_process_draws_the_same_everywhere(tmp_path):
    def careless(trial: Trial) -> Result:
        return Result({"value": random.random() + np.random.rand() + torch.rand(()).item()})  # noqa: NPY002

    job = who("a", careless).job(3, {}, "smoke", "cpu")
    states = random.getstate(), torch.get_rng_state()
    values = {job.execute(Trial(seed=3)).result.metrics["value"] for _ in range(3)}
    assert len(values) == 1
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert job.execute(Trial(seed=4)).result.metrics["value"] not in values


def test_threads_are_given_back(tmp_path):
    before = torch.get_num_threads()
    seen = []

    def look(trial: Trial) -> Result:
        seen.append(torch.get_num_threads())
        return Result({"value": 0.0})

    with Store(tmp_path / "runs.sqlite") as store:
        run_contestants([who("a", look)], store, Plan(budget="smoke", seeds=1, jobs=1))
    assert (seen, torch.get_num_threads()) == ([1], before)


def test_what_measures_speed_runs_last_and_alone(tmp_path, importable_by_workers):
    here = importable_by_workers
    log = tmp_path / "log"
    timed = here.who("timed", partial(here.logged, log=str(log), name="timed"), alone=True)
    with Store(tmp_path / "runs.sqlite") as store:
        run_contestants([timed, *here.crowd(log, 2)], store, PAIR)
    assert [name for name, *_ in sorted(starts(log), key=lambda start: start[2])][-3:] == ["timed"] * 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": "huge"}, "budget"),
        ({"backend": "threads"}, "backend"),
        ({"seeds": 0}, "seeds"),
        ({"jobs": -1}, "jobs"),
        ({"address": "tcp://x:1"}, "address"),
        ({"device": "tpu9000"}, "device"),
        ({"device": "meta"}, "device"),
    ],
)
def test_bad_plans_name_the_argument(options, named):
    with pytest.raises(ValueError, match=named):
        Plan(**options)


def test_who_lacks_a_package_or_data_says_so():
    toy = Experiment("toy", {"a": draw}, {"value": Metric("value")}, requires={"a": ("no_such_package.inner",)})
    assert Contestant("a", "", toy, draw).obstacle("smoke") == "it needs no_such_package.inner, which is not installed"
    assert who("a", draw).obstacle("smoke") == ""


def test_shared_parts_are_built_once_and_damage_heals(tmp_path):
    made = []

    def build() -> torch.Tensor:
        made.append(1)
        return torch.arange(3)

    trial = Trial(artifacts=tmp_path)
    assert torch.equal(trial.cached(build, key="a"), trial.cached(build, key="a"))
    assert len(made) == 1
    (file,) = tmp_path.glob("*.pt")
    file.write_bytes(b"not a tensor")
    with pytest.warns(UserWarning, match=rf"(?s){file.name} cannot be read.*moved to {file.stem}\.damaged"):
        assert torch.equal(trial.cached(build, key="a"), torch.arange(3))
    assert len(made) == 2
    assert torch.equal(trial.cached(build, key="a"), torch.arange(3))
    assert len(made) == 2
    trial.cached(build, key="b")
    Trial().cached(build, key="a")
    assert len(made) == 4


def test_a_part_may_be_trained_where_the_run_has_gradients_turned_off(tmp_path):
    def build() -> torch.Tensor:
        weight = torch.ones(2, requires_grad=True)
        weight.square().sum().backward()
        return weight.grad

    with torch.no_grad():
        for trial in (Trial(), Trial(artifacts=tmp_path)):
            assert trial.cached(build, key="gradient").tolist() == [2.0, 2.0]
        assert not torch.is_grad_enabled()


def test_a_shared_part_is_built_anew_where_its_code_has_changed(tmp_path, monkeypatch):
    (tmp_path / "builders.py").write_text(
        textwrap.dedent(
            """
            import torch

            def first(trial):
                def value():
                    return 1

                return trial.cached(lambda: torch.tensor(value()), key="part")

            def second(trial):
                def value():
                    return 2

                return trial.cached(lambda: torch.tensor(value()), key="part")
            """
        )
    )
    monkeypatch.syspath_prepend(tmp_path)
    builders = importlib.import_module("builders")
    trial = Trial(artifacts=tmp_path / "artifacts")
    assert [int(builders.first(trial)), int(builders.second(trial)), int(builders.first(trial))] == [1, 2, 1]
    assert len(list((tmp_path / "artifacts").glob("*.pt"))) == 2
