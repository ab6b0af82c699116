"""The runner: nothing lost, nothing repeated, the same numbers everywhere."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from trimtab.studies.runner import BackendError, Plan, RunError, make_jobs, run_arms, run_jobs, run_studies
from trimtab.studies.store import Store
from trimtab.studies.study import Arm, Claim, Curve, Metric, Result, Study, Task, Trial


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


def arms(log: Path, count: int) -> dict[str, Arm]:
    return {f"arm-{n}": Arm(logged, {"log": str(log), "name": "x" * (n + 1)}) for n in range(count)}


def starts(log: Path) -> list[tuple[str, int, float]]:
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(name, int(seed), float(when)) for name, seed, when in lines]


SMOKE = Plan(budget="smoke", seeds=3, jobs=1)


def test_stored_runs_are_not_run_again(tmp_path):
    log = tmp_path / "log"
    with Store(tmp_path / "runs.sqlite") as store:
        first = run_arms(arms(log, 2), store, SMOKE)
        again = run_arms(arms(log, 3), store, SMOKE)
    assert len(starts(log)) == 9
    assert [r.result for r in first["arm-0"]] == [r.result for r in again["arm-0"]]
    assert [r.finished for r in first["arm-0"]] == [r.finished for r in again["arm-0"]]


def test_an_arm_that_studies_share_runs_once(tmp_path):
    log = tmp_path / "log"
    base = Arm(logged, {"log": str(log), "name": "base"})
    studies = [
        Study(paper, {"base": base, paper: Arm(logged, {"log": str(log), "name": paper})},
              [Claim(paper, beats="base", on="value")])
        for paper in ("elr", "ldr")
    ]  # fmt: skip
    with Store(tmp_path / "runs.sqlite") as store:
        outcomes = run_studies(studies, store, SMOKE)
    assert [name for name, *_ in starts(log)].count("base") == 3
    assert [outcome.study.paper for outcome in outcomes] == ["elr", "ldr"]


def test_rerun_replaces_what_is_stored(tmp_path):
    log = tmp_path / "log"
    with Store(tmp_path / "runs.sqlite") as store:
        before = run_arms(arms(log, 1), store, SMOKE)
        after = run_arms(arms(log, 1), store, Plan(budget="smoke", seeds=3, jobs=1, rerun=True))
        kept = store.all()
    assert len(starts(log)) == 6
    assert len(kept) == 3
    assert after["arm-0"][0].finished > before["arm-0"][0].finished


@pytest.mark.timeout(120)
def test_kill_9_loses_nothing_and_repeats_nothing(tmp_path):
    """Killed again and again at random moments, and started again each time."""
    log, path = tmp_path / "log", tmp_path / "runs.sqlite"
    wanted, chance, kills, seen = arms(log, 6), random.Random(0), 0, {}
    plan = Plan(budget="smoke", seeds=5, jobs=1)
    with Store(path):
        pass
    while True:
        child = os.fork()
        if child == 0:
            try:
                with Store(path) as store:
                    run_arms(wanted, store, plan)
            finally:
                os._exit(0)
        time.sleep(chance.uniform(0.0, 0.15))
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += killed
        with Store(path) as store:
            now = {run.key: run for run in store.all()}
        assert {key: now.get(key) for key in seen} == seen, "a finished run was lost or changed"
        seen = now
        if len(seen) == 30 and not killed:
            break
    assert kills >= 5
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
        from test_runner import arms
        from trimtab.studies.runner import Plan, run_arms
        from trimtab.studies.store import Store
        with Store({str(path)!r}) as store:
            print("ready", flush=True)
            run_arms(arms(Path({str(log)!r}), 12), store, Plan(budget="smoke", seeds=25, jobs=2))
        """)
    )
    kills = 0
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        if attempt < 2:
            _wait_for_runs(path, more=5)
            process.kill()  # the parent alone: its workers become orphans
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        process.stdout.close()
        if process.returncode == 0:
            break
    assert kills == 2
    runs = _stored(path)
    assert len(runs) == 300
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


@pytest.mark.timeout(200)
def test_dask_cluster_of_processes_gives_the_same_numbers(tmp_path):
    """A scheduler and two workers as separate processes, reached by address."""
    pytest.importorskip("distributed")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    wanted = {"plain": Arm(draw), "shifted": Arm(draw, {"shift": 2.5})}
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
            remote = run_arms(wanted, store, Plan(budget="smoke", seeds=4, backend="dask", address=address))
            local = run_arms(wanted, other, Plan(budget="smoke", seeds=4, jobs=1))
            assert len(store.all()) == 8
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for name in wanted:
        assert [run.result for run in remote[name]] == [run.result for run in local[name]]


@pytest.mark.timeout(200)
def test_ray_gives_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    wanted = {"plain": Arm(draw)}
    with Store(tmp_path / "ray.sqlite") as store, Store(tmp_path / "local.sqlite") as other:
        remote = run_arms(wanted, store, Plan(budget="smoke", seeds=3, jobs=2, backend="ray"))
        local = run_arms(wanted, other, Plan(budget="smoke", seeds=3, jobs=1))
    assert [run.result for run in remote["plain"]] == [run.result for run in local["plain"]]


def test_no_scheduler_at_the_address(tmp_path):
    pytest.importorskip("distributed")
    with Store(tmp_path / "runs.sqlite") as store, pytest.raises(BackendError, match="127.0.0.1:9"):
        run_arms({"a": Arm(draw)}, store, Plan(budget="smoke", backend="dask", address="tcp://127.0.0.1:9"))


def test_one_failing_arm_does_not_take_the_others_with_it(tmp_path):
    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(RunError, match="3 of 6 runs failed.*\n.*FloatingPointError: loss is nan"):
            run_arms({"bad": Arm(diverging), "good": Arm(draw)}, store, SMOKE)
        assert len(store.all()) == 3
        assert store.running() == {}


def test_interrupt_says_what_is_stored(tmp_path):
    def interrupted(trial: Trial) -> Result:
        if trial.seed == 2:
            raise KeyboardInterrupt
        return draw(trial)

    with Store(tmp_path / "runs.sqlite") as store:
        with pytest.raises(KeyboardInterrupt, match="2 of 3 runs are stored"):
            run_jobs(make_jobs(Arm(interrupted), range(3), "smoke", "cpu"), store, SMOKE)
        assert len(store.all()) == 2
        assert store.running() == {}


def test_threads_are_given_back(tmp_path):
    before = torch.get_num_threads()
    seen = []

    def look(trial: Trial) -> Result:
        seen.append(torch.get_num_threads())
        return Result({"value": 0.0})

    with Store(tmp_path / "runs.sqlite") as store:
        run_jobs(make_jobs(Arm(look), [0], "smoke", "cpu"), store, SMOKE)
    assert (seen, torch.get_num_threads()) == ([1], before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"budget": "huge"}, "budget"),
        ({"backend": "threads"}, "backend"),
        ({"seeds": 0}, "seeds"),
        ({"jobs": -1}, "jobs"),
        ({"address": "tcp://x:1"}, "address"),
        ({"device": "tpu9000"}, "device"),
    ],
)
def test_bad_plans_name_the_argument(options, named):
    with pytest.raises(ValueError, match=named):
        Plan(**options)


class Sum(Task):
    name = "sum"
    metrics = {"value": Metric("sum")}

    def run(self, trial: Trial, **options: object) -> Result:
        return draw(trial, **options)


def test_shared_parts_are_built_once(tmp_path):
    made = []

    def build() -> torch.Tensor:
        made.append(1)
        return torch.arange(3)

    trial = Trial(artifacts=tmp_path)
    assert torch.equal(trial.cached(build, key="a"), trial.cached(build, key="a"))
    assert len(made) == 1
    trial.cached(build, key="b")
    assert len(made) == 2
    Trial().cached(build, key="a")
    assert len(made) == 3
