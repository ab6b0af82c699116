"""Distances and coverage in closed form."""

from __future__ import annotations

import pytest
import torch

from trimtab.studies.tools.sample_quality import frechet_distance, knn_recall, sliced_wasserstein


def test_frechet_distance_of_gaussians() -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    x = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Exact moments: mean 0 and covariance I.
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    stds, mean = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    expected = 5.0 + 1.0 + 0.25
    assert frechet_distance(x, mean, torch.diag(stds**2)) == pytest.approx(expected)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    rotated = rotation @ torch.diag(stds**2) @ rotation.T
    assert frechet_distance(x @ rotation.T, rotation @ mean, rotated) == pytest.approx(expected)


def test_sliced_wasserstein_of_a_shift() -> None:
    """A shift by v: the root of its mean squared projection, |v| / sqrt(dim)."""
    x = torch.randn(300, 5, dtype=torch.float64)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0], dtype=torch.float64)
    distance = sliced_wasserstein(x, x + shift, projections=4000, generator=torch.Generator().manual_seed(0))
    assert distance == pytest.approx(5 / 5**0.5, rel=0.03)
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0.0, abs=1e-12)


def test_recall_counts_covered_modes() -> None:
    """On a grid the 3rd neighbour is one spacing away: all of the covered mode is recalled, none of the other."""
    mode = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    real = torch.cat([mode + 0.25, mode + 100.0])
    assert knn_recall(mode, real) == 0.5
    assert knn_recall(real, mode) == 1.0
