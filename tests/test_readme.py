"""The README says what is true: its example runs, its table is the catalogue's, its files are there."""

import re
from pathlib import Path

import torch

from trimtab.catalog import Catalog

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_and_learns():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(code, names)
    assert names["accuracy"] > 0.9


def test_the_table_of_areas():
    catalog = Catalog()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (\d+) \|$", TEXT, re.MULTILINE)
    assert rows == [(area, text.rstrip("."), str(len(catalog.area(area)))) for area, text in catalog.areas.items()]


def test_what_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
