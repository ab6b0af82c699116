"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from trimtab.data.arrays import npz
from trimtab.data.bundled import breast_cancer, digits
from trimtab.data.cifar import cifar10
from trimtab.data.classification import ClassificationData
from trimtab.data.files import DataCorruptError, DataNotFoundError
from trimtab.data.idx_images import fashion_mnist, mnist
from trimtab.data.usps import usps

_LOADERS: dict[str, Callable[[], ClassificationData]] = {
    "breast_cancer": breast_cancer,
    "cifar10": cifar10,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "usps": usps,
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
    machine, as has `usps`, the 2,007 test digits of that set. `digits` and `breast_cancer` come with scikit-learn and
    need nothing. The returned tensors are shared between callers: do not change them in place.

    Args:
        name: one of `names()`, or the path of an `.npz` file with `x_train`, `y_train`, `x_test` and `y_test`, or with
            `x` and `y`, of which a fixed random fifth is tested on.

    Raises:
        ValueError: the name is unknown, or the file does not hold such arrays.
        DataNotFoundError: a file is missing and cannot be downloaded; says which file goes where.
        DataCorruptError: a file is truncated or altered.

    Example:
        >>> data = load("digits")
        >>> data.in_shape, data.num_classes
        ((1, 8, 8), 10)
    """
    if name.endswith(".npz"):
        return npz(name)
    if name not in _LOADERS:
        raise ValueError(f"name must be one of {', '.join(names())}, got {name!r}")
    return _LOADERS[name]()


def available(name: str) -> bool:
    """Whether `load(name)` would succeed (it may download to find out)."""
    try:
        load(name)
    except (DataNotFoundError, DataCorruptError):
        return False
    return True
