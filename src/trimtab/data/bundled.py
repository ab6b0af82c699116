"""The sets that come with scikit-learn."""

from __future__ import annotations

from dataclasses import replace

import torch

from trimtab.data.classification import ClassificationData


def digits() -> ClassificationData:
    """1,797 handwritten digits of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images / 16.0, dtype=torch.float32).unsqueeze(1)
    return _split("digits", images, torch.tensor(bunch.target, dtype=torch.int64), 10)


def breast_cancer() -> ClassificationData:
    """569 tumours by 30 measurements."""
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
