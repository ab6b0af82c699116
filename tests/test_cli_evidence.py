"""`trimtab run`, `compare` and `report`: what they show, store and write, and what they say when something is wrong."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from trimtab import cli, data
from trimtab.studies import library
from trimtab.studies.study import Arm

SLUG = "deis"


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
    assert study.claims[0].arm in out
    result = json.loads((tmp_path / "out" / f"{SLUG}.json").read_text())
    assert result["seeds"] == [0, 1]
    assert set(result["arms"]) == set(study.arms)
    assert {claim["verdict"] for claim in result["claims"]} <= {"holds", "partly", "fails", "not shown"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{SLUG}.json"], "something half-written"


def test_a_study_that_fails_keeps_no_other_from_being_written(call, tmp_path, monkeypatch):
    found = library.find_study

    def find(slug):
        study = found(slug)
        if slug == "apg":

            def fail(trial):
                raise RuntimeError("out of luck")

            arms = {**study.arms, study.claims[0].arm: Arm(fail)}
            return replace(study, arms=arms)
        return study

    monkeypatch.setattr(library, "find_study", find)
    code, _, err = call(*smoke("run", "apg", SLUG), "--results", tmp_path / "out")
    assert code == 1
    assert "out of luck" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{SLUG}.json"]


def test_second_run_takes_what_is_stored(call, store):
    call(*smoke("run", SLUG))
    before = store.read_bytes()
    code, out, _ = call(*smoke("run", SLUG), "--json")
    assert code == 0
    assert json.loads(out)[0]["paper"] == SLUG
    with sqlite3.connect(store) as connection:
        assert connection.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    assert len(before) > 0


def test_report(call, tmp_path):
    call(*smoke("run", SLUG))
    code, out, _ = call("report", "--budget", "smoke", "--csv", tmp_path / "all.csv", "--figures", tmp_path / "figures")
    assert code == 0
    assert "fresh runs" in out
    with (tmp_path / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["state"] for row in rows} == {"fresh"}
    assert any(row["arm"].startswith(f"{SLUG}: ") for row in rows)
    assert (tmp_path / "figures" / f"{SLUG}.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = call("report", SLUG, "--budget", "smoke", "--json")
    assert json.loads(out)[0]["stale_runs"] == 0


def test_runs_of_earlier_code_are_shown_as_stale(call, store, tmp_path):
    call(*smoke("run", SLUG))
    other = tmp_path / "old.sqlite"
    with sqlite3.connect(store) as connection, sqlite3.connect(other) as copy:
        connection.backup(copy)
        copy.execute("UPDATE runs SET sources = 'earlier'")
    code, out, _ = call("report", "--budget", "smoke", "--store", other, keep=False)
    assert code == 0
    assert "stale" in out
    assert "no seed is complete" in out


def test_compare(call, tmp_path):
    figure = tmp_path / "board.png"
    code, out, err = call(*smoke("compare", "mixture-sampling"), "--figure", figure, "--results", tmp_path)
    assert code == 0, err
    assert "DDIM" in out
    assert figure.read_bytes()[:4] == b"\x89PNG"
    board = json.loads((tmp_path / "leaderboards" / "mixture-sampling.json").read_text())
    assert SLUG in {arm["paper"] for arm in board["arms"].values()}


def test_digits_stand_in_for_missing_data_and_it_is_said(call, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "available", lambda name: False)
    code, out, err = call(*smoke("compare", "label-noise", "--methods", "elr"), "--json")
    assert code == 0, err
    assert "digits" in err
    assert "dataset='digits'" in json.loads(out)["variant"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "elrr"), "did you mean 'elr'"),
        (("run",), "--all"),
        (("run", "elr", "--all"), "--all"),
        (("run", "wgsef"), "no study yet"),
        (("run", "--area", "loses"), "did you mean 'losses'"),
        (("run", "elr", "--budget", "tiny"), "budget must be one of"),
        (("run", "elr", "--seeds", "0"), "seeds must be at least 1"),
        (("run", "elr", "--jobs", "0"), "jobs must be at least 1"),
        (("run", "elr", "--backend", "slurm"), "backend must be one of"),
        (("run", "elr", "--address", "tcp://127.0.0.1:1"), "address"),
        (("run", "elr", "--device", "warp"), "device"),
        (("compare", "label-nose"), "did you mean 'label-noise'"),
        (("compare", "label-noise", "--set", "rte=0.1"), "no setting 'rte'"),
        (("compare", "label-noise", "--set", "rate=much"), "rate"),
        (("compare", "label-noise", "--set", "kind=odd"), "symmetric, asymmetric"),
        (("compare", "label-noise", "--set", "rate"), "NAME=VALUE"),
        (("compare", "label-noise", "--methods", "elrr"), "did you mean 'elr'"),
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


@pytest.mark.timeout(120)
def test_ctrl_c_keeps_what_is_done(tmp_path):
    path = tmp_path / "runs.sqlite"
    command = [sys.executable, "-m", "trimtab.cli", "run", SLUG, "--budget", "smoke", "--seeds", "200", "--jobs", "2"]
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
    _, err = process.communicate(timeout=60)
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
