"""A part of CIFAR-10, and what people took its images for."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int

from trimtab.data.classification import ClassificationData
from trimtab.data.files import content, require

_FILES = {
    "train10k.npz": "676066d337a6cd58085aa73bc36a8cf867ff8d232e9698e281808cc068bd3f0e",
    "test2k.npz": "56ddbe711e7c1af75fc63ae8be4f8ee5baf4969aa664ac1f4485171ee5100e12",
}
_HUMAN_KINDS = {
    "aggregate": "aggre_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
    "worse": "worse_label",
}
_HUMAN_FILE = ("cifar10n_labels.npz", "6024485a143efa682792c21d7f2adfdef5a374dce699bb2fcd4d62cd55cc4852")


def cifar10() -> ClassificationData:
    """10,000 and 2,000 images of CIFAR-10."""
    hint = "10,000 training and 2,000 test images as arrays x (n, 32, 32, 3) and y (n,); orig_index for training"
    train, test = (_arrays(require("cifar10", file, sha, hint=hint)) for file, sha in _FILES.items())
    x_train, x_test = (
        torch.from_numpy(part["x"].astype(np.float32) / 255.0).permute(0, 3, 1, 2).contiguous()
        for part in (train, test)
    )
    return ClassificationData(
        "cifar10", x_train, _labels(train["y"]), x_test, _labels(test["y"]), 10, source="cifar10 (10,000 + 2,000)"
    )


def human_labels(
    kind: Literal["aggregate", "random1", "random2", "random3", "worse"] = "worse",
) -> Int[torch.Tensor, " train"]:
    """What people took the training images of `load("cifar10")` for: CIFAR-10N, in the order of `y_train`.

    Wei et al., "Learning with Noisy Labels Revisited: A Study Using Real-World Human Annotations", ICLR 2022,
    arXiv 2110.12088.

    Args:
        kind: the majority of three annotators (9 % wrong), one of them (17 to 18 % wrong), or a wrong one wherever
            one of the three was wrong (40 % wrong).

    Raises:
        ValueError: the kind is unknown.
        DataNotFoundError: a file is missing; says which file goes where.
    """
    if kind not in _HUMAN_KINDS:
        raise ValueError(f"kind must be one of {', '.join(_HUMAN_KINDS)}, got {kind!r}")
    labels = _arrays(require("cifar10n", *_HUMAN_FILE, hint="the labels of github.com/UCSC-REAL/cifar-10-100n"))
    file, sha = next(iter(_FILES.items()))
    index = _arrays(require("cifar10", file, sha))["orig_index"]
    return _labels(labels[_HUMAN_KINDS[kind]][index])


def _arrays(path: Path) -> Mapping[str, npt.NDArray[Any]]:
    with np.load(io.BytesIO(content(path))) as held:
        return {name: held[name] for name in held.files}


def _labels(labels: npt.NDArray[np.uint8]) -> Int[torch.Tensor, " n"]:
    return torch.from_numpy(labels.astype(np.int64))
