"""What the studies of distillation measure with, where the answer is known."""

from __future__ import annotations

import itertools
import math

import torch

from trimtab.studies.diffusion.agd import JointJudge
from trimtab.studies.diffusion.ctm import sliced_wasserstein_1
from trimtab.studies.diffusion.dcm import Scale, videos


def test_digits_move_by_a_pixel_a_frame() -> None:
    made = videos(40, torch.Generator().manual_seed(0))
    assert made.shape == (40, 1, 5, 8, 8)
    assert made.min() >= -1
    assert made.max() <= 1
    speeds = set()
    for video in made[:, 0]:
        found = [s for s in (-1, 1) if all(torch.equal(b, a.roll(s, 1)) for a, b in itertools.pairwise(video))]
        assert found
        speeds.update(found)
    assert speeds == {-1, 1}


def test_distances_of_videos() -> None:
    data = videos(3000, torch.Generator().manual_seed(0))
    scale = Scale.of(data)
    assert abs(scale.frechet(data)) < 1e-8
    torch.testing.assert_close(scale.cov.diagonal().mean(), torch.tensor(1.0, dtype=torch.float64))
    assert scale.frechet(torch.randn_like(data)) > scale.frechet(0.9 * data) > 0.01


def test_wasserstein_distance_of_a_shift() -> None:
    """The mean over directions of the plane of |cos| is 2 / pi."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    found = sliced_wasserstein_1(x + torch.tensor([3.0, 0.0]), x, torch.Generator().manual_seed(1))
    assert abs(found / (3 * 2 / math.pi) - 1) < 0.1
    assert sliced_wasserstein_1(x, x, torch.Generator().manual_seed(1)) == 0


def test_features_and_classes_weigh_about_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (5000,), generator=generator)
    joint = JointJudge.joint(torch.randn(5000, 32, generator=generator), labels)
    variance = joint.var(0)
    assert joint.shape == (5000, 42)
    assert abs(float(variance[32:].sum() / variance[:32].sum()) - 1) < 0.1
