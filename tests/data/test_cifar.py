"""The part of CIFAR-10, and what people took its images for, where the files are."""

import pytest
import torch

from trimtab.data import files, human_labels, load

here = all(files.find(*file) for file in (("cifar10", "train10k.npz"), ("cifar10n", "cifar10n_labels.npz")))
pytestmark = pytest.mark.skipif(not here, reason="cifar10 or cifar10n is not on this machine")


def test_images_and_labels():
    data = load("cifar10")
    assert data.in_shape == (3, 32, 32)
    assert (len(data.y_train), len(data.y_test)) == (10_000, 2_000)
    assert torch.equal(torch.bincount(data.y_train), torch.full((10,), 1000))
    assert 0 <= float(data.x_train.min()) < float(data.x_train.max()) <= 1


@pytest.mark.parametrize(("kind", "wrong"), [("aggregate", 0.09), ("random1", 0.17), ("worse", 0.40)])
def test_people_are_wrong_as_often_as_published(kind, wrong):
    """Labels in another order than the images would be wrong nine times in ten."""
    share = (human_labels(kind) != load("cifar10").y_train).double().mean()
    assert float(share) == pytest.approx(wrong, abs=0.02)
