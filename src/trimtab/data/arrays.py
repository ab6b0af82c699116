"""A user's own data: arrays in an `.npz` file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from trimtab.data.classification import ClassificationData
from trimtab.data.files import DataNotFoundError

_PARTS = ("x_train", "y_train", "x_test", "y_test")
_HELD_OUT = 5  # one in five is tested on where the file does not say


def npz(path: str) -> ClassificationData:
    """The data of an `.npz` file.

    It holds `x_train`, `y_train`, `x_test` and `y_test`, or `x` and `y`, of which a fixed random fifth is tested on.
    Samples are images, (n, channels, height, width) or (n, height, width) in [0, 1] or as bytes from 0 to 255, or rows
    of numbers, (n, features). Labels are integers from 0 or strings; classes are numbered in sorted order.

    Raises:
        DataNotFoundError: there is no such file.
        ValueError: the file is not an `.npz`, lacks an array, or an array is not of this form.
    """
    held = _read(Path(path))
    if set(_PARTS) <= set(held):
        x_train, y_train, x_test, y_test = (held[part] for part in _PARTS)
    elif {"x", "y"} <= set(held):
        x, y = _samples("x", held["x"]), _labels("y", held["y"], len(held["x"]))
        order = np.random.default_rng(0).permutation(len(x))
        test, train = order[: len(x) // _HELD_OUT], order[len(x) // _HELD_OUT :]
        x_train, y_train, x_test, y_test = x[train], y[train], x[test], y[test]
    else:
        raise ValueError(
            f"data must hold {', '.join(_PARTS)}, or x and y, got {', '.join(held) or 'nothing'} in {path}"
        )
    x_train, x_test = _samples("x_train", x_train), _samples("x_test", x_test)
    y_train, y_test = _labels("y_train", y_train, len(x_train)), _labels("y_test", y_test, len(x_test))
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"x_test must have samples of shape {x_train.shape[1:]}, got {x_test.shape[1:]}")
    classes = np.unique(y_train)
    if len(classes) < 2:
        raise ValueError("y_train must have at least two classes, got one")
    if len(unknown := np.setdiff1d(y_test, classes)):
        raise ValueError(f"y_test must be labels that y_train has, got {unknown[0]}")
    samples = [torch.from_numpy(part[:, None] if part.ndim == 3 else part) for part in (x_train, x_test)]
    labels = [torch.from_numpy(np.searchsorted(classes, part)) for part in (y_train, y_test)]
    return ClassificationData(path, samples[0], labels[0], samples[1], labels[1], len(classes), source=path)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataNotFoundError(f"data must be an .npz file that is there, got {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, AttributeError) as error:
        raise ValueError(f"data must be an .npz file of plain arrays, got {path} ({error})") from None


def _samples(name: str, x: np.ndarray) -> np.ndarray:
    if x.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, got {x.dtype}")
    if x.ndim not in (2, 3, 4) or len(x) < 2:
        raise ValueError(f"{name} must be two samples or more of 1 to 3 dimensions, got shape {x.shape}")
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(x, dtype=np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite as float32, got NaN, infinity or more than 3e38")
    return numbers / np.float32(255) if x.dtype == np.uint8 and x.ndim > 2 else numbers


def _labels(name: str, y: np.ndarray, count: int) -> np.ndarray:
    if y.dtype.kind not in "iubU":
        raise ValueError(f"{name} must be integers or strings, got {y.dtype}")
    if y.shape != (count,):
        raise ValueError(f"{name} must be one label a sample, shape ({count},), got {y.shape}")
    if y.dtype.kind == "i" and y.min() < 0:
        raise ValueError(f"{name} must be labels from 0, got {y.min()}")
    return y
