from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.solvers import (
    BanditResult,
    FarFieldChannel,
    beam_grid,
    holobeam,
    line_search_elimination,
    sequential_halving,
    successive_rejects,
    unimodal_elimination,
)
from trimtab.solvers.bandits import Tally

ALL = [unimodal_elimination, line_search_elimination, sequential_halving, successive_rejects]
UNIMODAL = ALL[:2]


def peaked(n_arms: int, peak: int) -> Tensor:
    """Rises and falls by steps of different sizes."""
    steps = torch.rand(n_arms, generator=torch.Generator().manual_seed(n_arms), dtype=torch.float64) + 0.1
    height = steps.cumsum(0)
    return -(height - height[peak]).abs()


def exact(means: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda arms, count: means[arms, None].expand(-1, count)


def noisy(means: Tensor, scale: float, seed: int = 0) -> Callable[[Tensor, int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda arms, count: means[arms, None] + scale * torch.randn(len(arms), count, generator=generator)


@pytest.mark.parametrize("identify", ALL)
@pytest.mark.parametrize("n_arms", [1, 2, 3, 4, 5, 7, 12, 21])
def test_without_noise_every_peak_is_found(identify: Callable[..., BanditResult], n_arms: int) -> None:
    for peak in range(n_arms):
        result = identify(exact(peaked(n_arms, peak)), n_arms, 150)
        assert result.arm == peak
        assert result.n_used <= 150
        assert result.history[0] == n_arms


@pytest.mark.parametrize("identify", UNIMODAL)
def test_without_noise_every_peak_of_201_is_found_with_fewer_pulls_than_arms(
    identify: Callable[..., BanditResult],
) -> None:
    for peak in range(201):
        result = identify(exact(peaked(201, peak)), 201, 60)
        assert result.arm == peak
        assert result.n_used <= 60 < 201


@given(n_arms=st.integers(1, 300), budget=st.integers(60, 700), which=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_budget_is_kept_and_nearly_used(n_arms: int, budget: int, which: int) -> None:
    pulls = []

    def pull(arms: Tensor, count: int) -> Tensor:
        pulls.append(len(arms) * count)
        return torch.randn(len(arms), count)

    result = ALL[which](pull, n_arms, budget, generator=torch.Generator().manual_seed(0))
    assert 0 <= result.arm < n_arms
    assert sum(pulls) == result.n_used <= budget
    if n_arms > 1 and which != 3:  # the phases of rejects are rounded up and down as its authors do
        assert result.n_used > budget - 4


def test_rounds_get_budgets_that_grow_by_half() -> None:
    counts: list[int] = []

    def pull(arms: Tensor, count: int) -> Tensor:
        counts.append(count)
        return torch.zeros(len(arms), count)

    result = unimodal_elimination(pull, 101, 100_000)
    assert result.history == (101, 68, 46, 31, 21, 15, 11, 8, 6, 5, 4)
    assert len(counts) == math.ceil(math.log(101 / 3, 1.5)) + 2  # thirds are rounded down, and the last round
    for before, after in itertools.pairwise(counts):
        assert after / before == pytest.approx(1.5, rel=0.02)


def test_a_quarter_that_cannot_hold_the_peak_is_dropped() -> None:
    asked: list[list[int]] = []

    def pull(arms: Tensor, count: int) -> Tensor:
        asked.append(arms.tolist())
        return -(arms[:, None] - 3.0).abs().expand(-1, count)

    assert unimodal_elimination(pull, 10, 100).arm == 3
    assert asked[0] == [0, 3, 6, 9]
    assert asked[1] == [0, 2, 4, 6]  # right of 6 nothing can be best
    assert asked[2] == [0, 1, 3, 4]
    assert asked[-1][0] <= 3 <= asked[-1][-1]


def test_means_are_over_all_rewards_of_an_arm() -> None:
    rewards = iter([torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[5.0]])])
    tally = Tally(lambda arms, count: next(rewards), 4)
    assert tally.pull(torch.tensor([2, 0]), 2).tolist() == [2.0, 0.0]
    assert tally.pull(torch.tensor([2]), 1).tolist() == [3.0]
    assert tally.used == 5


def test_halving_and_rejects_keep_the_better_arms() -> None:
    means = torch.tensor([0.0, 5.0, 1.0, 4.0, 2.0, 3.0, -1.0, -2.0])
    halving = sequential_halving(noisy(means, 0.1), 8, 96)
    assert (halving.arm, halving.n_used, halving.history) == (1, 96, (8, 4, 2, 1))
    rejects = successive_rejects(noisy(means, 0.1), 8, 96)
    assert rejects.arm == 1
    assert rejects.history == (8, 7, 6, 5, 4, 3, 2, 1)
    assert 80 < rejects.n_used <= 96


def test_phases_of_rejects_are_those_of_its_authors() -> None:
    counts: list[tuple[int, int]] = []

    def pull(arms: Tensor, count: int) -> Tensor:
        counts.append((len(arms), count))
        return arms[:, None].double().expand(-1, count)

    assert successive_rejects(pull, 4, 100).arm == 3
    norm = 0.5 + 1 / 2 + 1 / 3 + 1 / 4
    ends = [math.ceil(96 / (norm * left)) for left in (4, 3, 2)]
    assert counts == [(4, ends[0]), (3, ends[1] - ends[0]), (2, ends[2] - ends[1])]


def test_more_pulls_fewer_mistakes() -> None:
    means = peaked(21, 8)

    def mistakes(identify: Callable[..., BanditResult], budget: int) -> float:
        return sum(identify(noisy(means, 1.5, seed), 21, budget).arm != 8 for seed in range(100)) / 100

    for identify in ALL:
        assert mistakes(identify, 1600) < 0.5 * mistakes(identify, 120)


@pytest.mark.parametrize("k", [1, 2, 7.5, 10, 33, 100])
def test_gains_on_the_grid_have_one_peak(k: float) -> None:
    grid = beam_grid(k)
    for a in (2 * torch.rand(60, generator=torch.Generator().manual_seed(int(k)), dtype=torch.float64) - 1).tolist():
        gains = FarFieldChannel(k, 1, a, 0.0).gain(grid, torch.zeros_like(grid))
        best = int(gains.argmax())
        if len(grid) > 1:
            assert best == int((grid - a).abs().argmin())
        assert (gains[: best + 1].diff() > 0).all()
        assert (gains[best:].diff() < 0).all()
        # The form of the docstring, without the sinc.
        delta = k * (a - grid[best])
        steps = torch.arange(len(grid)) - best
        form = (math.pi * delta).sin().square() / (math.pi * (delta - steps)).square()
        torch.testing.assert_close(gains, form, rtol=1e-7, atol=1e-12)


def test_off_that_grid_there_are_side_lobes() -> None:
    finer = torch.linspace(-1, 1, 81, dtype=torch.float64)
    gains = FarFieldChannel(10, 1, 0.03, 0.0).gain(finer, torch.zeros_like(finer))
    assert ((gains[1:-1] > gains[:-2]) & (gains[1:-1] > gains[2:])).sum() > 5


@pytest.mark.parametrize("identify", [unimodal_elimination, line_search_elimination])
@pytest.mark.parametrize("k", [3, 10, 50])
def test_without_noise_the_best_beam_is_found(identify: Callable[..., BanditResult], k: int) -> None:
    grid, generator = beam_grid(k), torch.Generator().manual_seed(k)
    for a1, a2 in (2 * torch.rand(25, 2, generator=generator, dtype=torch.float64) - 1).tolist():
        channel = FarFieldChannel(k, k, a1, a2)
        found = holobeam(channel.pilots(), k, k, 100, identify=identify)
        assert found.b1 == float(grid[(grid - a1).abs().argmin()])
        assert found.b2 == float(grid[(grid - a2).abs().argmin()])
        assert found.n_used <= 100


def test_half_of_the_pilots_for_each_axis() -> None:
    asked: list[tuple[Tensor, Tensor, int]] = []
    pilots = FarFieldChannel(10, 5, 0.32, -0.53, snr_db=60).pilots(torch.Generator().manual_seed(0))

    def measure(b1: Tensor, b2: Tensor, count: int) -> Tensor:
        asked.append((b1, b2, count))
        return pilots(b1, b2, count)

    found = holobeam(measure, 10, 5, 120, b2=-0.61)
    first, second = (one.n_used for one in found.axes)
    assert 56 <= first <= 60 >= second >= 56
    assert sum(len(b1) * count for b1, _, count in asked) == found.n_used == first + second
    split = len(found.axes[0].history)
    assert all((b2 == b2.new_tensor(-0.6)).all() for _, b2, _ in asked[:split])  # the nearest on the grid
    assert all((b1 == found.b1).all() for b1, _, _ in asked[split:])
    assert (found.b1, found.b2) == pytest.approx((0.3, -0.6))


def test_pilots_to_start_choose_where_the_second_parameter_stands() -> None:
    channel = FarFieldChannel(10, 10, 0.32, -0.87, snr_db=80)
    asked: list[tuple[Tensor, Tensor, int]] = []
    pilots = channel.pilots(torch.Generator().manual_seed(0))

    def measure(b1: Tensor, b2: Tensor, count: int) -> Tensor:
        asked.append((b1, b2, count))
        return pilots(b1, b2, count)

    found = holobeam(measure, 10, 10, 160, init_pilots=40, generator=torch.Generator().manual_seed(1))
    b1, b2, count = asked[0]
    assert (len(b1), count) == (40, 1)
    strongest = b2[channel.gain(b1, b2).argmax()]
    assert (asked[1][1] == strongest).all()
    assert found.n_used <= 160
    assert (found.b1, found.b2) == pytest.approx((0.3, -0.9))


def test_gain_is_a_product() -> None:
    channel = FarFieldChannel.towards(0.7, 2.1, 8, 5)
    assert channel.a1 == pytest.approx(math.sin(0.7) * math.cos(2.1))
    assert channel.a2 == pytest.approx(math.sin(0.7) * math.sin(2.1))
    b1, b2 = beam_grid(8), beam_grid(5)
    gains = channel.gain(b1[:, None], b2)
    assert torch.linalg.matrix_rank(gains) == 1
    assert len(set(gains.argmax(1).tolist())) == len(set(gains.argmax(0).tolist())) == 1
    perfect = channel.gain(torch.tensor([channel.a1]), torch.tensor([channel.a2]))
    assert float(perfect) == pytest.approx(1.0)


def test_pilots_have_the_power_of_signal_and_noise() -> None:
    channel = FarFieldChannel(4, 4, 0.1, 0.2, snr_db=10)
    b1, b2 = torch.tensor([0.1, 1.1]).double(), torch.tensor([0.2, 0.2]).double()  # the second is a zero of the gain
    power = channel.pilots(torch.Generator().manual_seed(0))(b1, b2, 200_000)
    assert power.shape == (2, 200_000)
    torch.testing.assert_close(power.mean(1), torch.tensor([1.1, 0.1]).double(), rtol=0.01, atol=0)
    # |h + w|^2 of complex Gaussian noise has the variance s^4 + 2 s^2 |h|^2.
    torch.testing.assert_close(power.var(1), torch.tensor([0.21, 0.01]).double(), rtol=0.03, atol=0)
    silent = FarFieldChannel(4, 4, 0.1, 0.2).pilots()(b1, b2, 3)
    torch.testing.assert_close(silent[0], torch.ones(3).double())


def test_same_generator_same_beam() -> None:
    def once() -> object:
        generator = torch.Generator().manual_seed(5)
        channel = FarFieldChannel(10, 10, 0.32, -0.07, snr_db=30)
        return holobeam(channel.pilots(generator), 10, 10, 120, init_pilots=10, generator=generator)

    assert once() == once()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unimodal_elimination(exact(torch.zeros(21)), 21, 27), "budget must be at least 28"),
        (lambda: line_search_elimination(exact(torch.zeros(21)), 21, 5), "budget must be at least"),
        (lambda: sequential_halving(exact(torch.zeros(4)), 4, 0), "budget must be at least 1"),
        (lambda: successive_rejects(exact(torch.zeros(4)), 4, 0), "budget must be at least 1"),
        *((lambda identify=identify: identify(exact(torch.zeros(4)), 0, 9), "n_arms must be") for identify in ALL),
        (lambda: unimodal_elimination(lambda arms, count: torch.zeros(2), 3, 9), "pull must return shape"),
        (lambda: beam_grid(0.5), "k must be"),
        (lambda: beam_grid(math.inf), "k must be"),
        (lambda: FarFieldChannel(4, 4, 1.2, 0.0), "a1 must be"),
        (lambda: FarFieldChannel(4, 4, 0.0, -1.2), "a2 must be"),
        (lambda: FarFieldChannel(4, 4, 0.0, 0.0, snr_db=math.nan), "snr_db must be"),
        (lambda: holobeam(FarFieldChannel(4, 4, 0.0, 0.0).pilots(), 4, 4, 100, b2=1.5), "b2 must be"),
        (lambda: holobeam(FarFieldChannel(4, 4, 0.0, 0.0).pilots(), 4, 4, 100, init_pilots=100), "init_pilots must"),
        (lambda: holobeam(FarFieldChannel(4, 4, 0.0, 0.0).pilots(), 4, 4, 9), "budget must be at least"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_powers_of_the_first_pilots_must_be_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="^measure must return finite powers"):
        holobeam(lambda b1, b2, count: torch.full((len(b1), count), bad), 10, 10, 400, init_pilots=5)


@pytest.mark.parametrize("answer", [lambda arms, count: [[1.0] * count] * len(arms), lambda arms, count: None])
def test_rewards_that_are_no_tensor_are_refused_by_name(answer: Any) -> None:
    with pytest.raises(TypeError, match="^pull must return a real tensor"):
        sequential_halving(answer, 4, 20)


def test_noise_must_be_a_number() -> None:
    with pytest.raises(TypeError, match="^snr_db must be a number"):
        FarFieldChannel(10, 10, 0.1, 0.1, "60")  # type: ignore[arg-type]
