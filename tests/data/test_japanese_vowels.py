"""Japanese Vowels, where its files are, and what becomes of it where they are not."""

import gzip

import pytest
import torch

from trimtab.data import DataCorruptError, DataNotFoundError, files, japanese_vowels

here = all(files.find("japanese_vowels", f"JapaneseVowels_{part}.ts") for part in ("TRAIN", "TEST"))
needs_vowels = pytest.mark.skipif(not here, reason="japanese_vowels is not on this machine")


@needs_vowels
def test_sizes_speakers_and_lengths():
    data = japanese_vowels()
    assert data is japanese_vowels()
    assert (data.x_train.shape, data.x_test.shape) == ((270, 29, 12), (370, 29, 12))
    assert data.x_train.dtype == torch.float32
    assert data.num_classes == 9
    assert data.y_train.bincount().tolist() == [30] * 9
    assert data.y_test.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    for part in (data.x_train, data.x_test):
        there = ~part.isnan()
        assert torch.equal(there.any(2), there.all(2))  # a step has all of its features or none
        lengths = there[:, :, 0].sum(1)
        assert torch.equal(there[:, :, 0], torch.arange(29) < lengths[:, None])
        assert (lengths.min(), lengths.max()) == (7, 26 if part is data.x_train else 29)


@needs_vowels
def test_numbers_are_those_of_the_file():
    first = japanese_vowels().x_train[0]
    torch.testing.assert_close(first[:3, 0], torch.tensor([1.860936, 1.891651, 1.939205]))
    torch.testing.assert_close(first[0, :3], torch.tensor([1.860936, -0.207383, 0.261557]))


@pytest.fixture
def empty_house(monkeypatch, tmp_path):
    """A machine without the files."""
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path))
    monkeypatch.setattr(files, "cache_folder", lambda name: tmp_path / "cache" / name)
    japanese_vowels.cache_clear()
    yield tmp_path
    japanese_vowels.cache_clear()


def test_without_the_files_the_error_says_what_goes_where(empty_house):
    with pytest.raises(DataNotFoundError, match=r"JapaneseVowels_TRAIN\.ts.* into .*japanese_vowels.*UEA"):
        japanese_vowels()


def test_an_altered_file_is_refused(empty_house):
    (empty_house / "japanese_vowels").mkdir()
    (empty_house / "japanese_vowels" / "JapaneseVowels_TRAIN.ts.gz").write_bytes(gzip.compress(b"@data\n1,2:3,4:1\n"))
    with pytest.raises(DataCorruptError, match="is not the expected file"):
        japanese_vowels()
