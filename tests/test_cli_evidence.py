"""`trimtab run`, `compare`, `tasks`, `report`: what they show, store and write, and say when something is wrong."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from trimtab import cli, data
from trimtab.studies.engine import library
from trimtab.studies.engine.study import Experiment
from trimtab.studies.tasks.label_noise import LabelNoise, human, symmetric

SLUG = "elr"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "runs.sqlite"


@pytest.fixture
def call(monkeypatch, capsys, store):
    def run(*arguments, keep=True):
        kept = ["--store", str(store)] if keep and arguments[0] in ("run", "compare", "report") else []
        monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, arguments), *kept])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


def smoke(*arguments):
    return (*arguments, "--budget", "smoke", "--seeds", "2", "--jobs", "1")


def test_run_writes_stores_and_shows(call, tmp_path):
    code, out, err = call(*smoke("run", SLUG), "--results", tmp_path / "out")
    assert code == 0, err
    study = library.find_study(SLUG)
    assert "elr: the headline " in out
    assert " points of final test accuracy " in out
    assert "label-noise: pair flip on digits (smoke, 2 seeds)" in out, "what ran is named, not what was asked for"
    result = json.loads((tmp_path / "out" / f"{SLUG}.json").read_text())
    assert [venue["variant"] for venue in result["venues"]] == [task.label for task in study.on]
    assert all(venue["seeds"] == 2 and venue["data"] == ["digits"] for venue in result["venues"])
    assert {claim["verdict"] for claim in result["claims"]} <= {"holds", "fails", "not shown"}
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    boards = {f"tasks/label-noise/{name}.json" for name in ("symmetric", "pair-flip", "instance", "human")}
    boards |= {"tasks/image-classification/ten-thousand.json", "tasks/domain-adaptation/source-free.json"}
    assert written == {f"{SLUG}.json", *boards}, "something half-written"
    board = json.loads((tmp_path / "out" / "tasks" / "label-noise" / "symmetric.json").read_text())
    assert {"ELR", "ELR+", "cross-entropy"} <= set(board["arms"])
    assert "LDR-KL" not in board["arms"], "who has not run is not there yet"


def failing(trial):
    raise RuntimeError("out of luck")


def test_a_study_that_fails_keeps_no_other_from_being_written(call, tmp_path, monkeypatch):
    found = library.find_study

    def find(slug):
        study = found(slug)
        if slug == "ldr":
            extra = Experiment("toy", {"bad": failing}, {"value": study.on[0].metrics["ece"]})
            return replace(study, experiments=[extra])
        return study

    monkeypatch.setattr(library, "find_study", find)
    code, _, err = call(*smoke("run", "ldr", SLUG), "--results", tmp_path / "out")
    assert code == 1
    assert "bad on toy, seed 0: RuntimeError: out of luck" in err
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == [f"{SLUG}.json"]


def test_who_cannot_run_here_is_skipped_by_name_and_the_rest_is_judged(call, monkeypatch):
    from trimtab.studies.engine import contestants

    monkeypatch.setattr(contestants, "_at_hand", lambda name: name != "cifar10")
    monkeypatch.setattr(LabelNoise, "datasets", lambda self, budget: ("cifar10" if self == human else "digits",))
    code, out, err = call(*smoke("run", SLUG), "--json")
    assert code == 0, err
    assert "elr: ELR was skipped: the data set cifar10 cannot be had here" in err
    (result,) = json.loads(out)
    reasons = [claim["reason"] for claim in result["claims"] if claim["venue"] == "label-noise: human"]
    assert reasons == ["ELR: the data set cifar10 cannot be had here"]


def test_second_run_takes_what_is_stored(call, store):
    call(*smoke("run", SLUG))
    before = store.read_bytes()
    code, out, _ = call(*smoke("run", SLUG), "--json")
    assert code == 0
    assert json.loads(out)[0]["paper"] == SLUG
    with sqlite3.connect(store) as connection:
        assert connection.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    assert len(before) > 0


def test_report(call, tmp_path, store):
    call(*smoke("run", SLUG))
    store.chmod(0o444)
    arguments = ("--budget", "smoke", "--seeds", 2)
    try:
        code, out, err = call(
            "report", SLUG, *arguments, "--csv", tmp_path / "all.csv", "--figures", tmp_path / "figures"
        )
    finally:
        store.chmod(0o644)
    assert code == 0, err
    assert "elr: 28 fresh runs\n" in out
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["paper", "task", "variant", "arm", "seed", "metric", "value", "budget", "state"]
    mine = [row for row in rows if row["paper"] == SLUG]
    assert {row["task"] for row in mine} == {"label-noise", "image-classification", "domain-adaptation"}
    assert {(row["state"], row["budget"]) for row in mine} == {("fresh", "smoke")}
    assert {"symmetric", "pair flip"} <= {row["variant"] for row in mine}
    assert (tmp_path / "figures" / f"{SLUG}.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = call("report", SLUG, *arguments, "--json")
    assert json.loads(out)[0]["stale_runs"] == 0


def test_runs_of_earlier_code_are_counted_as_stale(call, store, tmp_path):
    call(*smoke("run", SLUG))
    other = tmp_path / "old.sqlite"
    with sqlite3.connect(store) as connection, sqlite3.connect(other) as copy:
        connection.backup(copy)
        copy.execute("UPDATE runs SET sources = 'earlier'")
    code, out, _ = call("report", SLUG, "--budget", "smoke", "--store", other, keep=False)
    assert code == 0
    assert "elr: 0 fresh runs, 28 stale (the code or the data have changed since); nobody has all seeds" in out


def test_compare(call, tmp_path):
    figure = tmp_path / "board.png"
    code, out, err = call(
        *smoke("compare", "label-noise", "--methods", SLUG, "--variant", "pair-flip"),
        *("--figure", figure, "--results", tmp_path),
    )
    assert code == 0, err
    assert "label-noise: pair flip on digits (smoke, 2 seeds)" in out
    for heading in (
        "rank",
        "contestant",
        "calibration error (%)",
        "chosen setting",
        "surely ahead of",
        "surely behind",
    ):
        assert heading in out
    assert figure.read_bytes()[:4] == b"\x89PNG"
    board = json.loads((tmp_path / "tasks" / "label-noise" / "pair-flip.json").read_text())
    assert {arm["paper"] for arm in board["arms"].values()} == {"", SLUG}
    assert not any(character in out for character in "│┃━\x1b")


def test_compare_over_all_variants(call, monkeypatch):
    code, out, err = call(*smoke("compare", "label-noise", "--methods", SLUG, "--all-variants"))
    assert code == 0, err
    assert "label-noise, over all variants" in out
    assert "pairwise wins (%)" in out
    monkeypatch.setattr(LabelNoise, "variants", classmethod(lambda cls: {"symmetric": symmetric}))
    code, out, _ = call(*smoke("compare", "label-noise", "--methods", SLUG, "--all-variants"), "--json")
    assert [board["variant"] for board in json.loads(out)] == ["symmetric"]


def test_compare_a_combination(call):
    code, out, err = call(*smoke("compare", "label-noise", "--combine", "elr+saf+adabelief"), "--json")
    assert code == 0, err
    board = json.loads(out)
    assert {"ELR", "SAF", "AdaBelief", "ELR + SAF + AdaBelief", "cross-entropy"} <= set(board["arms"])
    assert board["arms"]["ELR + SAF + AdaBelief"]["paper"] == "elr+saf+adabelief"


def test_compare_on_ones_own_data(call, tmp_path):
    digits = data.load("digits")
    path = tmp_path / "mine.npz"
    np.savez(path, x=digits.x_train[:300].double().numpy(), y=digits.y_train[:300].numpy())
    arguments = ("--data", path, "--set", "kind=given", "--methods", SLUG)
    code, out, err = call(*smoke("compare", "label-noise", *arguments), "--json")
    assert code == 0, err
    board = json.loads(out)
    assert board["data"] == [str(path)]
    assert "ELR" in board["arms"]
    other = tmp_path / "other.npz"
    np.savez(other, x=digits.x_train[:300].numpy())
    code, out, err = call(*smoke("compare", "label-noise", "--data", other))
    assert (code, out) == (1, "")
    assert "data must hold" in err
    np.savez(other, x=digits.x_train[:300].flatten(1).numpy(), y=digits.y_train[:300].numpy())
    code, out, err = call(*smoke("compare", "few-labels", "--data", other))
    assert (code, out) == (1, "")
    assert "x must be images" in err
    assert "got rows of 64 numbers" in err


def test_compare_on_ones_own_task(call, tmp_path, monkeypatch):
    (tmp_path / "task_of_mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from trimtab.studies.tasks.label_noise import LabelNoise\n\n\n"
        "@dataclass(frozen=True)\nclass Mild(LabelNoise):\n    rate: float = 0.1\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*smoke("compare", "task_of_mine:Mild", "--methods", SLUG), "--json")
    assert code == 0, err
    assert {"ELR", "ELR+", "cross-entropy"} <= set(json.loads(out)["arms"])


def test_a_comparison_shows_who_ran_where_another_fails(call, monkeypatch):
    run = LabelNoise.run

    def fail(self, trial, entrant):
        if entrant.rule is not None:
            raise RuntimeError("out of luck")
        return run(self, trial, entrant)

    monkeypatch.setattr(LabelNoise, "run", fail)
    code, out, err = call(*smoke("compare", "label-noise", "--methods", SLUG, "--set", "rate=0.3"))
    assert code == 1
    assert "ELR+ on label-noise, seed 0: RuntimeError: out of luck" in err
    assert "cross-entropy" in out
    assert "ELR+" not in out


def test_digits_stand_in_for_missing_data_and_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(data, "available", lambda name: False)
    assert cli.tasks._with_data_at_hand(symmetric, "laptop") == LabelNoise(dataset="digits")
    assert "fashion_mnist cannot be had on this machine: running on scikit-learn's digits" in capsys.readouterr().err
    assert cli.tasks._with_data_at_hand(symmetric, "smoke") == symmetric, "digits are what runs there anyway"


def test_tasks(call, monkeypatch):
    monkeypatch.setattr(library, "task_names", lambda: ["label-noise"])
    code, out, _ = call("tasks", "--json")
    (task,) = json.loads(out)
    assert code == 0
    assert task["variants"] == ["symmetric", "pair flip", "instance", "human"]
    assert {"elr", "ldr"} <= set(task["papers"])
    assert "cross-entropy" in task["references"]
    assert task["minutes"] > 1
    code, out, _ = call("tasks")
    assert out.startswith("label-noise\n  Train a small CNN on wrong labels")
    assert "variants: symmetric; pair flip; instance; human" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "elrr"), "did you mean 'elr'"),
        (("run",), "--all"),
        (("run", "elr", "--all"), "--all"),
        (("run", "solver_regularized_ode"), "no study yet"),
        (("run", "--area", "loses"), "did you mean 'losses'"),
        (("run", "elr", "--budget", "tiny"), "budget must be one of"),
        (("run", "elr", "--seeds", "0"), "seeds must be at least 1"),
        (("run", "elr", "--jobs", "0"), "jobs must be at least 1"),
        (("run", "elr", "--backend", "slurm"), "backend must be one of"),
        (("run", "elr", "--address", "tcp://127.0.0.1:1"), "address"),
        (("run", "elr", "--device", "warp"), "device"),
        (("run", "elr", "--device", "meta"), "device"),
        (("compare", "label-nose"), "did you mean 'label-noise'"),
        (("compare", "nope"), "image-classification, "),
        (("compare", "label-noise", "--variant", "pear flip"), "did you mean 'pair flip'"),
        (("compare", "label-noise", "--set", "rate=2"), "rate must be in [0, 1), got 2.0"),
        (("compare", "label-noise", "--methods", "sface"), "sface cannot enter label-noise, which takes Training"),
        (("compare", "label-noise", "--combine", "elr+ldr"), "elr and ldr both bring loss"),
        (("compare", "label-noise", "--data", "nowhere.npz"), "data must be an .npz file that is there"),
        (("compare", "nowhere:Task"), "nowhere"),
        (("compare", "label-noise", "--all-variants", "--set", "rate=0.1"), "all-variants"),
        (("compare", "label-noise", "--set", "rte=0.1"), "no setting 'rte'"),
        (("compare", "label-noise", "--set", "rate=much"), "rate"),
        (("compare", "label-noise", "--set", "kind=odd"), "symmetric, asymmetric"),
        (("compare", "label-noise", "--set", "rate"), "NAME=VALUE"),
        (("compare", "label-noise", "--methods", "elrr"), "did you mean 'elr'"),
        (("compare", "label-noise", "--methods", "elrr,elr,zzz"), "did you mean 'elr'?; unknown paper 'zzz'"),
        (("compare", "label-noise", "--data", "README.md"), "data must be an .npz file, got README.md"),
        (("report", "elrr"), "did you mean 'elr'"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_exit(call, arguments, message):
    code, out, err = call(*arguments)
    assert code != 0
    assert message in err
    assert err.startswith("trimtab: ")
    assert len(err.strip().splitlines()) == 1
    assert out == ""


def test_results_folder_that_cannot_be_written_is_found_before_running(call, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(*smoke("run", SLUG), "--results", tmp_path / "file" / "out")
    assert code != 0
    assert "cannot write" in err


def test_damaged_store(call, tmp_path):
    path = tmp_path / "runs.sqlite"
    path.write_bytes(b"garbage" * 1000)
    code, _, err = call(*smoke("run", SLUG), "--store", path, keep=False)
    assert code != 0
    assert "damaged" in err
    assert (tmp_path / "runs.sqlite.damaged-1").read_bytes() == b"garbage" * 1000


@pytest.mark.timeout(150)
def test_ctrl_c_keeps_what_is_done(tmp_path):
    path = tmp_path / "runs.sqlite"
    command = [sys.executable, "-m", "trimtab", "run", SLUG, "--budget", "smoke", "--seeds", "200", "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--store", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 90
    while time.monotonic() < end and _count(path) < 2:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, err = process.communicate(timeout=40)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "runs are stored, the same command does the others" in err
    assert "Traceback" not in err
    assert _count(path) >= 2


def _count(path) -> int:
    if not path.exists():
        return 0
    with sqlite3.connect(path, timeout=10) as connection:
        try:
            return connection.execute("SELECT count(*) FROM runs").fetchone()[0]
        except sqlite3.OperationalError:
            return 0
