"""What consistency models share: levels, distances with known limits, pairs on one path, multistep sampling."""

import math

import pytest
import torch
from torch import nn

from trimtab.diffusion import (
    EDM,
    AnalyticGMM,
    ConsistencyPreconditioned,
    Denoiser,
    cauchy,
    consistency_sample,
    geman_mcclure,
    neighbours,
    noise_levels,
    pseudo_huber,
)
from trimtab.nets import DenoisingMLP

DISTANCES = {"pseudo_huber": pseudo_huber, "cauchy": cauchy, "geman_mcclure": geman_mcclure}


def apart(lengths, dim: int = 3):
    """Pairs of samples at given distances, in random directions."""
    direction = torch.randn(len(lengths), dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.randn(len(lengths), dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return b + torch.tensor(lengths, dtype=torch.float64)[:, None] * direction / direction.norm(dim=1, keepdim=True), b


def test_levels_rise_from_least_to_most_as_karras_has_them():
    found = noise_levels(EDM(), 11)
    assert found[0] == 0.002
    assert found[-1] == 80.0
    steps = found ** (1 / 7)
    torch.testing.assert_close(steps.diff(), torch.full((10,), (80 ** (1 / 7) - 0.002 ** (1 / 7)) / 10).double())


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_small_distances_are_quadratic(distance):
    c, small = 0.7, [1e-6, 1e-5, 1e-4]
    scale = c if distance is pseudo_huber else c**2  # the pseudo-Huber distance has the unit of its argument
    expected = torch.tensor(small, dtype=torch.float64) ** 2 / (2 * scale)
    torch.testing.assert_close(distance(*apart(small), c), expected, rtol=1e-6, atol=0)


def test_large_distances():
    large = [1e4, 1e6]
    r = torch.tensor(large, dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(*apart(large), 0.5), r - 0.5, rtol=1e-7, atol=0)
    torch.testing.assert_close(cauchy(*apart(large), 0.5), 2 * r.log() - math.log(0.5), rtol=1e-7, atol=0)
    torch.testing.assert_close(geman_mcclure(*apart(large), 0.5), torch.full((2,), 2.0).double(), rtol=1e-6, atol=0)


def test_how_hard_a_sample_pulls():
    """The pseudo-Huber distance pulls at most with 1, Cauchy's most at sqrt(2) c, and less and less beyond."""
    c = 0.3
    lengths = [0.01, 0.1, math.sqrt(2) * c, 1.0, 30.0]
    pulls = {}
    for name, distance in DISTANCES.items():
        a, b = apart(lengths)
        a.requires_grad_()
        distance(a, b, c).sum().backward()
        pulls[name] = a.grad.norm(dim=1)
    assert bool((pulls["pseudo_huber"].diff() > 0).all())
    assert pulls["pseudo_huber"][-1].item() == pytest.approx(1, abs=1e-3)
    assert pulls["cauchy"].argmax() == 2
    assert pulls["cauchy"][2].item() == pytest.approx(1 / (math.sqrt(2) * c))
    assert pulls["cauchy"][-1].item() == pytest.approx(2 / 30, rel=1e-3)
    assert pulls["geman_mcclure"][-1] < pulls["cauchy"][-1] / 100


@pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)
def test_distances_are_per_sample_over_all_numbers_and_differentiable_at_zero(distance):
    a, b = torch.randn(2, 4, 1, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(distance(a, b, 0.1), distance(a.flatten(1), b.flatten(1), 0.1))
    torch.testing.assert_close(distance(a[:1], b[:1], 0.1), distance(a, b, 0.1)[:1])
    same = a.clone().requires_grad_()
    distance(same, a, 0.1).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(a))
    assert torch.autograd.gradcheck(lambda a: distance(a, b, 0.1), a.clone().requires_grad_())
    with pytest.raises(ValueError, match="b must be of shape"):
        distance(a, b[:2], 0.1)
    with pytest.raises(ValueError, match="c must be positive"):
        distance(a, b, 0.0)


def test_neighbours_lie_on_one_path():
    seen = []
    function = Denoiser(lambda x, t: seen.append((x, t)) or x, EDM(), "x0")
    x0, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    low, high = torch.linspace(0.1, 1, 5).double(), torch.linspace(0.2, 2, 5).double()
    student, target = neighbours(function, x0, noise, low, high)
    torch.testing.assert_close(student, x0 + high[:, None] * noise)
    torch.testing.assert_close(target, x0 + low[:, None] * noise)
    assert [t is level for (_, t), level in zip(seen, (high, low), strict=True)] == [True, True]


def test_the_teacher_gets_no_gradient_and_the_same_dropout():
    torch.manual_seed(0)
    function = ConsistencyPreconditioned(DenoisingMLP(3, hidden=32, dropout=0.5))
    nn.init.normal_(function.net.outward.weight)
    nn.init.normal_(function.net.blocks[0].second.weight)
    x0, noise, level = torch.randn(8, 3), torch.randn(8, 3), torch.full((8,), 1.3)
    before = torch.get_rng_state()
    student, target = neighbours(function, x0, noise, level, level)
    assert torch.equal(student, target)
    assert not target.requires_grad
    # The random state is the one that the student alone would have left.
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    function(x0, level)
    assert torch.equal(torch.get_rng_state(), after)
    other, _ = neighbours(function, x0, noise, level, level)
    assert not torch.equal(other, student)


def test_a_teacher_of_its_own():
    function, teacher = (Denoiser(lambda x, t, s=s: s * x, EDM(), "x0") for s in (2.0, 3.0))
    x0, noise, level = torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1)
    student, target = neighbours(function, x0, noise, level, level, teacher=teacher)
    assert (student.item(), target.item()) == (2.0, 3.0)


GAUSSIAN = AnalyticGMM.isotropic(torch.tensor([[0.5, -1.0]], dtype=torch.float64), 0.6)


def exact(x, t):
    """The consistency function of a Gaussian: samples keep their number of standard deviations along the path."""
    spread = torch.sqrt((0.6**2 + 0.002**2) / (0.6**2 + t**2))
    return GAUSSIAN.means + spread[:, None] * (x - GAUSSIAN.means)


@pytest.mark.parametrize("times", [[80.0, 0.002], [80.0, 0.8, 0.002], [80.0, 5.0, 0.5, 0.002]])
def test_an_exact_function_samples_exactly_in_any_number_of_steps(times):
    generator = torch.Generator().manual_seed(0)
    x = GAUSSIAN.sample(40_000, generator=generator) + 80 * torch.randn(
        40_000, 2, dtype=torch.float64, generator=generator
    )
    found = consistency_sample(Denoiser(exact, EDM(), "x0"), x, torch.tensor(times), generator=generator)
    torch.testing.assert_close(found.mean(0), GAUSSIAN.means[0], atol=0.015, rtol=0)
    torch.testing.assert_close(found.std(0), torch.full((2,), 0.6).double(), atol=0.01, rtol=0)


def test_bad_input():
    function = Denoiser(exact, EDM(), "x0")
    x0, noise = torch.zeros(2, 4, 2).double()
    with pytest.raises(ValueError, match="count must be at least 2"):
        noise_levels(EDM(), 1)
    with pytest.raises(ValueError, match="noise must be of shape"):
        neighbours(function, x0, noise[:2], torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="low must have shape"):
        neighbours(function, x0, noise, torch.ones(1), torch.ones(4))
    with pytest.raises(ValueError, match="times must"):
        consistency_sample(function, x0, torch.tensor([1.0, 2.0]))
