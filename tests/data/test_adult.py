"""The Adult census table, where its files are, and what becomes of it where they are not."""

import gzip

import pytest
import torch

from trimtab.data import DataCorruptError, DataNotFoundError, files
from trimtab.data.adult import TableData, adult

here = all(files.find("adult", file) for file in ("train.csv", "test.csv"))
needs_adult = pytest.mark.skipif(not here, reason="adult is not on this machine")


@needs_adult
def test_sizes_and_kinds_of_columns():
    data = adult()
    assert data is adult()
    assert (data.train.shape, data.test.shape) == ((32_561, 15), (16_281, 15))
    assert data.train.dtype == torch.float64
    sizes = {name: column for name, column in zip(data.columns, data.domain, strict=True) if isinstance(column, int)}
    assert sizes == {
        "workclass": 9,
        "education": 16,
        "marital_status": 7,
        "occupation": 15,
        "relationship": 6,
        "race": 5,
        "sex": 2,
        "native_country": 42,
        "income": 2,
    }


@needs_adult
def test_values_are_of_their_domain_and_reach_its_ends():
    data = adult()
    both = torch.cat([data.train, data.test])
    for j, column in enumerate(data.domain):
        low, high = column if isinstance(column, tuple) else (0, column - 1)
        assert (both[:, j].min(), both[:, j].max()) == (low, high)
        assert len(data.categories[j]) == (column if isinstance(column, int) else 0)


@needs_adult
def test_codes_stand_for_what_the_file_says():
    data = adult()
    first = data.train[0].tolist()
    row = dict(zip(data.columns, first, strict=True))
    names = dict(zip(data.columns, data.categories, strict=True))
    assert (row["age"], row["fnlwgt"], row["hours_per_week"]) == (39, 77516, 40)
    assert names["workclass"][int(row["workclass"])] == "State-gov"
    assert names["native_country"][int(row["native_country"])] == "United-States"
    assert float(data.select(["income"]).train.mean()) == pytest.approx(0.241, abs=1e-3)


@pytest.fixture
def empty_house(monkeypatch, tmp_path):
    """A machine without the files."""
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    monkeypatch.setattr(files, "cache_folder", lambda name: tmp_path / "cache" / name)
    adult.cache_clear()
    yield tmp_path
    adult.cache_clear()


def test_without_the_files_the_error_says_what_goes_where(empty_house):
    with pytest.raises(DataNotFoundError, match=r"train\.csv.* into .*adult.*UCI"):
        adult()


def test_an_altered_file_is_refused(empty_house):
    (empty_house / "adult").mkdir()
    (empty_house / "adult" / "train.csv.gz").write_bytes(gzip.compress(b"age,income\n39,<=50K\n"))
    with pytest.raises(DataCorruptError, match="is not the expected file"):
        adult()


def test_selected_columns_keep_their_order_and_meaning():
    table = TableData(
        torch.tensor([[1.0, 0.5, 0.0]]),
        torch.tensor([[0.0, 0.1, 1.0]]),
        ("kind", "size", "sex"),
        (2, (0.0, 1.0), 2),
        (("a", "b"), (), ("f", "m")),
    )
    part = table.select(["sex", "size"])
    assert torch.equal(part.train, torch.tensor([[0.0, 0.5]]))
    assert (part.domain, part.categories) == ((2, (0.0, 1.0)), (("f", "m"), ()))
    with pytest.raises(ValueError, match="got weight"):
        table.select(["weight"])
