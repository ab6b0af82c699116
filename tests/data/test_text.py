"""The text of the standard library as character codes."""

import pytest
import torch

from trimtab.data import DataNotFoundError, python_sources


def test_every_tenth_module_is_for_testing(tmp_path):
    for i in range(11):
        (tmp_path / f"m{i:02}.py").write_text(f"x = {i}\n")
    text = python_sources(str(tmp_path))
    assert text.decode(text.test) == "x = 0\n\nx = 10\n\n"
    assert text.decode(text.train[:14]) == "x = 1\n\nx = 2\n\n"
    assert text.train.dtype == torch.int64


def test_other_characters_are_left_out(tmp_path):
    for i in range(10):
        (tmp_path / f"m{i}.py").write_bytes("né\tx\r\n".encode())
    assert python_sources(str(tmp_path)).decode(python_sources(str(tmp_path)).test) == "nx\n\n"


def test_a_folder_without_sources_is_named(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"holds 0 modules"):
        python_sources(str(tmp_path))


def test_standard_library_is_read_once():
    text = python_sources()
    assert text is python_sources()
    assert len(text.train) > 5 * len(text.test) > 0
    assert "import" in text.decode(text.train[:20_000])
