"""The store: what goes wrong with a file is said in one sentence, and nothing is lost."""

import os
import sqlite3
import subprocess
import sys
import time

import pytest

from trimtab.studies.engine.store import Run, RunKey, Store, StoreError
from trimtab.studies.engine.study import Curve, Result

KEY = RunKey("arm", 0, "smoke", "cpu", "code")


def a_run(seed: int = 0, value: float = 1.0) -> Run:
    key = RunKey("arm", seed, "smoke", "cpu", "code")
    result = Result({"accuracy": value, "nothing": float("inf")}, {"line": Curve([1.0, 2.0], [0.5, value])})
    return Run(key, "who", result, 1.5, {"torch": "2"}, 100.0 + seed)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "runs.sqlite"


def test_round_trip(path):
    with Store(path) as store:
        store.add(a_run())
    with Store(path) as store:
        assert store.get(KEY) == a_run()
        assert store.get(RunKey("arm", 1, "smoke", "cpu", "code")) is None


def test_what_is_there_stays_unless_replaced(path):
    with Store(path) as store:
        store.add(a_run())
        store.add(a_run(value=2.0))
        assert store.get(KEY) == a_run()
        store.add(a_run(value=2.0), replace=True)
        assert store.get(KEY) == a_run(value=2.0)


def test_claims(path):
    with Store(path) as store, Store(path) as other:
        assert store.claim(KEY)
        assert not other.claim(KEY)
        store.progress(KEY, 0.25)
        assert other.running() == {KEY: 0.25}
        store.release(KEY)
        assert other.claim(KEY)
        other.add(a_run())
        assert not store.claim(KEY)
        assert store.running() == {}


def test_the_claim_of_a_dead_process_is_void(path):
    with Store(path):
        pass
    child = os.fork()
    if child == 0:
        Store(path).claim(KEY)
        os._exit(0)
    os.waitpid(child, 0)
    with Store(path) as store:
        assert store.running() == {}
        assert store.claim(KEY)


def test_locked(path):
    with Store(path):
        pass
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="locked by another process"):
        Store(path, timeout=0.1)
    other.execute("ROLLBACK")
    other.close()


def test_lock_that_is_released_is_waited_for(path):
    with Store(path):
        pass
    script = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); time.sleep(0.5); c.execute('ROLLBACK')"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    started = time.monotonic()
    with Store(path) as store:
        store.add(a_run())
    assert time.monotonic() - started > 0.2
    process.wait()
    process.stdout.close()


def test_newer_version_is_left_alone(path):
    with Store(path) as store:
        store.add(a_run())
    with sqlite3.connect(path) as raw:
        raw.execute("PRAGMA user_version = 99")
    raw.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer trimtab.*99"):
        Store(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["garbage", "truncated", "overwritten"])
def test_damaged_file_is_kept_aside(path, damage):
    with Store(path) as store:
        for seed in range(200):
            store.add(a_run(seed))
    whole = path.read_bytes()
    bad = {
        "garbage": b"not a database at all" * 50,
        "truncated": whole[: len(whole) // 2],
        "overwritten": whole[:4096] + b"\xff" * 4096 + whole[8192:],
    }[damage]
    path.write_bytes(bad)
    with pytest.raises(StoreError, match="moved to .*damaged-1"):
        Store(path)
    aside = path.with_name("runs.sqlite.damaged-1")
    assert aside.read_bytes() == bad
    assert not path.exists()
    with Store(path) as store:
        assert store.all() == []
    path.write_bytes(bad)
    with pytest.raises(StoreError, match="damaged-2"):
        Store(path)
    assert aside.read_bytes() == bad


def test_a_damaged_row_is_set_aside_and_named_and_the_rest_goes_on(path):
    with Store(path) as store:
        for seed in range(3):
            store.add(a_run(seed))
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE runs SET result = '{' WHERE seed = 1")
    raw.close()
    with Store(path, read_only=True) as store, pytest.warns(UserWarning, match="seed 1 of who cannot be read"):
        assert [run.key.seed for run in store.all()] == [0, 2]
    with Store(path) as store:
        with pytest.warns(UserWarning, match="set aside"):
            assert [run.key.seed for run in store.all()] == [0, 2]
        assert [run.key.seed for run in store.all()] == [0, 2]
        assert store.claim(RunKey("arm", 1, "smoke", "cpu", "code")), "it can be run again"
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT count(*) FROM damaged").fetchone() == (1,)


def test_a_read_only_store_changes_nothing(path):
    with pytest.raises(StoreError, match="is not there"):
        Store(path, read_only=True)
    with Store(path) as store:
        store.add(a_run())
    before = path.read_bytes()
    with Store(path, read_only=True) as store:
        assert store.all() == [a_run()]
        with pytest.raises(StoreError, match="read-only"):
            store.add(a_run(1))
    assert path.read_bytes() == before


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="folder cannot be made"):
        Store(tmp_path / "file" / "runs.sqlite")


def test_folder_instead_of_a_file(tmp_path):
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_as_a_user(path):
    with Store(path):
        pass
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        with pytest.raises(StoreError, match="read-only"):
            Store(path)
    finally:
        path.parent.chmod(0o755)


def test_read_only_medium(path, monkeypatch):
    """What SQLite itself reports on a read-only medium, which root cannot be kept from writing to otherwise."""
    with Store(path) as store:
        store.add(a_run())
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda p, **options: connect(f"file:{p}?mode=ro", uri=True, **options))
    with pytest.raises(StoreError, match="read-only"):
        Store(path).add(a_run(1))
