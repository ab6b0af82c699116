"""Every benchmark runs and yields whole rows; how fast things are is for `make bench` to say."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
AREAS = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("name", AREAS)
def test_rows(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module(f"benchmarks.{name}")
    rows = list(module.rows(quick=True))
    assert rows
    for row in rows:
        assert {"what", "ours", "unit"} <= set(row)
        assert row.get("met") in (True, False, None)
    sys.modules.pop(f"benchmarks.{name}")
