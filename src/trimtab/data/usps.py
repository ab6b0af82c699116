"""USPS: handwritten digits off envelopes, of 16 x 16 pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float

from trimtab.data.classification import ClassificationData
from trimtab.data.files import content, require

_FILE, _SHA = "usps.npz", "64a6f91a7b46655c192bdb5c309b0224500e08beba0fae7a26374494076649bc"
_HINT = (
    "arrays x_train (7291, 16, 16), x_test (2007, 16, 16) and y_test (2007,) of unsigned bytes, the ink bright, and "
    "y_train_ge5 (7291,), whether a training digit is at least 5"
)


def usps() -> ClassificationData:
    """The 2,007 test digits, whose labels are at hand; two thirds of them, the same for everybody, to train on."""
    held = _arrays()
    images, labels = _images(held["x_test"]), torch.from_numpy(held["y_test"].astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(labels) // 3], order[len(labels) // 3 :]
    return ClassificationData(
        "usps", images[train], labels[train], images[test], labels[test], 10, source="usps (test part)"
    )


def usps_unlabelled() -> Float[torch.Tensor, "7291 1 16 16"]:
    """The 7,291 training digits, of whose labels only "at least 5" is at hand: images to adapt to.

    None of them is in `load("usps")`.

    Raises:
        DataNotFoundError: the file is missing; says where it goes.
    """
    return _images(_arrays()["x_train"])


def _arrays() -> Mapping[str, npt.NDArray[Any]]:
    with np.load(io.BytesIO(content(require("usps", _FILE, _SHA, hint=_HINT)))) as held:
        return {name: held[name] for name in held.files}


def _images(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).unsqueeze(1)
