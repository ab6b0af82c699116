"""USPS, where its file is."""

import pytest
import torch

from trimtab.data import files, load, usps_unlabelled

pytestmark = pytest.mark.skipif(files.find("usps", "usps.npz") is None, reason="usps is not on this machine")

# Of the test part, as published.
COUNTS = [359, 264, 198, 166, 200, 160, 170, 147, 166, 177]


def test_images_and_labels():
    data = load("usps")
    assert data.in_shape == (1, 16, 16)
    assert (len(data.y_train), len(data.y_test)) == (1338, 669)
    assert torch.bincount(torch.cat([data.y_train, data.y_test])).tolist() == COUNTS
    together = torch.cat([data.x_train, data.x_test])
    assert (float(together.min()), float(together.max())) == (0, 1)
    assert float(together[:, :, :2, :2].mean()) < 0.1  # the ground is dark


def test_parts_do_not_overlap():
    data, unlabelled = load("usps"), usps_unlabelled()
    assert unlabelled.shape == (7291, 1, 16, 16)
    parts = [{tuple(image.flatten().tolist()) for image in part} for part in (data.x_train, data.x_test)]
    assert not parts[0] & parts[1]


def test_labels_belong_to_the_images():
    """Means of classes know three quarters of the digits; labels in another order than the images would a tenth."""
    data = load("usps")
    means = torch.stack([data.x_train[data.y_train == c].mean(0) for c in range(10)]).flatten(1)
    nearest = torch.cdist(data.x_test.flatten(1), means).argmin(1)
    assert float((nearest == data.y_test).float().mean()) > 0.75
