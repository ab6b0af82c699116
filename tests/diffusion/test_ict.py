"""iCT: the paper's numbers for its schedules, the loss by hand, and the flaw of a moving teacher that it repairs."""

import math

import pytest
import torch
from torch import nn

from trimtab.diffusion import (
    EDM,
    ConsistencyPreconditioned,
    Denoiser,
    ImprovedConsistencyTraining,
    VPLinear,
    doubling_levels,
    lognormal_shares,
    neighbours,
    noise_levels,
    pseudo_huber,
)
from trimtab.nets import DenoisingMLP


def test_levels_double_in_equal_stages_as_in_the_paper():
    found = [doubling_levels(k, 400_000) for k in range(0, 400_000, 25_000)]
    assert found == [n for n in (11, 21, 41, 81, 161, 321, 641, 1281) for _ in range(2)]
    assert doubling_levels(49_999, 400_000) == 11
    assert doubling_levels(399_999, 400_000) == 1281


@pytest.mark.parametrize(("s0", "s1", "total"), [(10, 80, 1000), (10, 100, 777), (2, 2, 5), (10, 1280, 3)])
def test_levels_never_fall_and_end_at_the_most(s0, s1, total):
    found = [doubling_levels(k, total, s0, s1) for k in range(total)]
    assert found == sorted(found)
    assert found[0] == s0 + 1
    assert found[-1] <= s1 + 1
    if total >= 100 and s1 == 80:
        assert found[-1] == 81


def test_shares_are_those_of_a_lognormal():
    levels = noise_levels(EDM(), 81)
    shares = lognormal_shares(levels)
    assert shares.shape == (80,)
    torch.testing.assert_close(shares.sum(), torch.ones((), dtype=torch.float64))
    drawn = (-1.1 + 2 * torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()).exp()
    counts = torch.histogram(drawn, levels).hist
    torch.testing.assert_close(shares, counts / counts.sum(), atol=2e-3, rtol=0)


def test_the_scale_of_an_image_of_cifar():
    seen = []

    def distance(a, b, c):
        seen.append(c)
        return pseudo_huber(a, b, c)

    function = Denoiser(lambda x, t: x, EDM(), "x0")
    ImprovedConsistencyTraining(function, 10, s1=10, distance=distance)(torch.zeros(2, 3, 32, 32), 0)
    assert seen[0] == pytest.approx(0.029930, abs=1e-6)


def test_the_loss_by_hand():
    torch.manual_seed(0)
    function = ConsistencyPreconditioned(DenoisingMLP(3, hidden=16)).double()
    for p in function.parameters():
        nn.init.normal_(p, std=0.2)
    training = ImprovedConsistencyTraining(function, 100, s1=40)
    levels = training.levels(50)
    assert len(levels) == 21
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    index = torch.tensor([0, 7, 12, 19])
    loss = training(x0, 50, noise=noise, index=index)
    expected = 0.0
    for i, k in enumerate(index):
        low, high = levels[k], levels[k + 1]
        student = function(x0[i : i + 1] + high * noise[i], high[None])
        target = function(x0[i : i + 1] + low * noise[i], low[None]).detach()
        c = 0.00054 * math.sqrt(3)
        expected = expected + (((student - target).square().sum() + c**2).sqrt() - c) / (high - low) / 4
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, list(function.parameters())) for value in (loss, expected)]
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its)


class Point(nn.Module):
    """The consistency function (s / t) x + (1 - s / t) theta of data that are one point, s being the least noise."""

    schedule, prediction = EDM(), "x0"

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, x, t):
        share = (self.schedule.t_min / t)[:, None]
        return share * x + (1 - share) * self.theta


@pytest.mark.parametrize("count", [20, 2000])
def test_the_flaw_that_iCT_repairs(count):
    """With the student as teacher the weighted gradient pulls to the data, however fine the levels; a teacher that lags
    behind adds a pull to the teacher that grows without bound."""
    m, theta, lag = 0.3, 0.8, 0.1
    levels = noise_levels(EDM(), count)
    i = torch.tensor([count // 2])
    low, high = levels[i], levels[i + 1]
    x0, noise = torch.full((1, 1), m).double(), torch.randn(1, 1).double()

    def gradient(teacher):
        student = Point(theta)
        found, target = neighbours(student, x0, noise, low, high, teacher=teacher)
        ((found - target).square().sum() / (high - low)).sum().backward()
        return student.theta.grad.item()

    s = 0.002
    pull = 2 * (1 - s / high) * s / (low * high) * (theta - m)
    assert gradient(None) == pytest.approx(pull.item(), rel=1e-6)
    behind = 2 * (1 - s / high) * (1 - s / low) * lag / (high - low) + pull
    assert gradient(Point(theta - lag)) == pytest.approx(behind.item(), rel=1e-6)


def test_training_finds_the_point():
    student = Point(0.8)
    training = ImprovedConsistencyTraining(student, 400, s1=40)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for k in range(400):
        loss = training(torch.full((64, 1), 0.3).double(), k, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert student.theta.item() == pytest.approx(0.3, abs=0.02)


def test_the_generator_decides_and_the_global_state_stays():
    function = Denoiser(lambda x, t: x / (1 + t[:, None]), EDM(), "x0")
    training, x0 = ImprovedConsistencyTraining(function, 10, s1=20), torch.randn(8, 2)
    state = torch.get_rng_state()
    one, other, third = (training(x0, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


def test_a_class_reaches_the_function():
    function = ConsistencyPreconditioned(DenoisingMLP(2, num_classes=3, hidden=8))
    loss = ImprovedConsistencyTraining(function, 10, s1=20)(torch.randn(4, 2), 0, torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.isfinite()


def test_bad_input():
    function = Denoiser(lambda x, t: x, EDM(), "x0")
    with pytest.raises(TypeError, match="function must be on the EDM schedule"):
        ImprovedConsistencyTraining(Denoiser(lambda x, t: x, VPLinear(), "x0"), 10)
    with pytest.raises(ValueError, match="s1 must be at least 10"):
        ImprovedConsistencyTraining(function, 10, s1=5)
    with pytest.raises(ValueError, match="c must be positive"):
        ImprovedConsistencyTraining(function, 10, c=0.0)
    with pytest.raises(ValueError, match="total_steps must be at least 1"):
        ImprovedConsistencyTraining(function, 0)
    training = ImprovedConsistencyTraining(function, 10, s1=20)
    with pytest.raises(ValueError, match="step must be in"):
        training(torch.zeros(2, 2), 10)
    with pytest.raises(ValueError, match="index must have shape"):
        training(torch.zeros(2, 2), 0, index=torch.tensor([0]))
    with pytest.raises(ValueError, match="noise must be of shape"):
        training(torch.zeros(2, 2), 0, noise=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="std must be positive"):
        lognormal_shares(torch.tensor([1.0, 2.0]), std=0.0)
    with pytest.raises(ValueError, match="levels must be a vector"):
        lognormal_shares(torch.tensor([1.0]))


@pytest.mark.parametrize("index", [-1, 10])
def test_pairs_of_levels_that_do_not_exist_are_refused(index: int) -> None:
    """The pair before the first would be the last level and the first."""
    training = ImprovedConsistencyTraining(ConsistencyPreconditioned(DenoisingMLP(2, hidden=8)), 100, s1=40)
    assert len(training.levels(0)) == 11
    with pytest.raises(ValueError, match=r"index must be in \[0, 10\)"):
        training(torch.randn(3, 2), 0, index=torch.full((3,), index))
    with pytest.raises(ValueError, match="x0 must have at least one sample"):
        training(torch.randn(0, 2), 0)
    with pytest.raises(ValueError, match="levels must rise from above 0"):
        lognormal_shares(torch.tensor([0.0, 1.0]))
