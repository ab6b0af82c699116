"""NMI of clustered embeddings: its ends, its invariances, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.metric import nmi


def clusters(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    return torch.eye(3)[labels] + spread * torch.randn(120, 3, generator=generator), labels


def test_separate_classes_score_one_and_noise_next_to_nothing():
    assert nmi(*clusters(0.02)) == pytest.approx(1.0)
    noise = torch.randn(120, 3, generator=torch.Generator().manual_seed(1))
    assert nmi(noise, clusters(0.02)[1]) < 0.1
    assert 0.1 < nmi(*clusters(0.6)) < 0.95


def test_lengths_and_names_of_classes_do_not_matter():
    points, labels = clusters(0.3)
    lengths = torch.rand(120, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    assert nmi(points * lengths, 10 - 4 * labels) == pytest.approx(nmi(points, labels))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("labels", lambda e, y: nmi(e, torch.zeros_like(y))),
        ("labels", lambda e, y: nmi(e, y[:-1])),
        ("embeddings", lambda e, y: nmi(e * math.nan, y)),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call(*clusters(0.1))
