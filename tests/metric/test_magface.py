from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from trimtab.metric import MagFaceLoss, MarginSoftmaxLoss


def head(**options) -> MagFaceLoss:
    torch.manual_seed(0)
    return MagFaceLoss(5, 4, lengths=(1.0, 3.0), margins=(0.2, 0.6), scale=8.0, **options).double()


def test_the_margin_grows_with_the_length_and_is_arcfaces_at_each():
    loss = head(weight=0.0)
    direction = F.normalize(torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1)
    for length, margin in ((0.5, 0.2), (1.0, 0.2), (2.0, 0.4), (3.0, 0.6), (9.0, 0.6)):
        arcface = MarginSoftmaxLoss(5, 4, margin=margin, scale=8.0).double()
        arcface.classifier = loss.classifier
        labels = torch.tensor([2])
        torch.testing.assert_close(loss(length * direction, labels), arcface(direction, labels))


def test_length_is_rewarded_up_to_the_largest():
    loss = head(weight=2.0)
    lengths = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    values = [loss.penalty(torch.eye(5, dtype=torch.float64)[:1] * length).item() for length in lengths]
    assert values == pytest.approx([2 * (length / 9 + 1 / length) for length in lengths.tolist()])
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lengths": (3.0, 1.0)}, "lengths"),
        ({"margins": (0.5, 0.1)}, "margins"),
        ({"margins": (0.5, 4.0)}, "margins"),
        ({"scale": math.nan}, "scale"),
        ({"weight": -1.0}, "weight"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        MagFaceLoss(5, 4, **options)
