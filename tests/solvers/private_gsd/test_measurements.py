"""Noise on sums over rows, and private quantiles."""

import math

import numpy as np
import pytest

from trimtab.solvers.private_gsd.measurements import noisy_answers, private_quantiles
from trimtab.solvers.private_gsd.row_statistics import CellCounts, RowSums, marginals

TABLE = np.stack([np.arange(400) % 2, np.arange(400) % 4], 1).astype(float)


def test_given_noise_enters_by_each_workloads_scale():
    lone = CellCounts(lambda X: np.where(X[:, :1] == 1, 0, -1).astype(int), sizes=(1,))
    noise = np.array([3.0])
    wanted = 0.5 + 3.0 * (1.0 / math.sqrt(2 * 0.02)) / 400
    np.testing.assert_allclose(noisy_answers(lone, TABLE, 0.02, np.random.default_rng(0), noise=noise), [wanted])
    pairs = marginals([2, 4])
    answer = noisy_answers(pairs, TABLE, 0.02, np.random.default_rng(0), noise=np.eye(8)[0])
    np.testing.assert_allclose(answer, pairs.counts(TABLE) / 400 + np.eye(8)[0] * math.sqrt(2 / 0.04) / 400)


def test_drawn_noise_has_the_scale_that_spends_rho():
    many = CellCounts(lambda X: np.zeros((len(X), 1), dtype=int) + 5000, sizes=(10_000,))
    # All but one cell are empty: without the clip, half of the noise would be seen.
    answers = noisy_answers(many, TABLE, 0.5, np.random.default_rng(0))
    seen = np.delete(answers, 5000)
    assert (seen >= 0).all()
    assert (seen > 0).mean() == pytest.approx(0.5, abs=0.02)
    assert np.sqrt(np.square(seen[seen > 0]).mean()) * 400 == pytest.approx(math.sqrt(2), rel=0.05)
    sums = RowSums(lambda X: np.zeros((len(X), 10_000)), sizes=(10_000,), sensitivities=(3.0,))
    assert (400 * noisy_answers(sums, TABLE, 0.5, np.random.default_rng(0))).std() == pytest.approx(3.0, rel=0.05)


def test_answers_of_cells_stay_shares():
    answers = noisy_answers(marginals([2, 4]), TABLE, 1e-9, np.random.default_rng(0))
    assert answers.min() == 0
    assert answers.max() == 1


def test_quantiles_without_noise_are_those_of_the_values():
    values = np.random.default_rng(0).gamma(2.0, size=20_000).clip(0, 30)
    edges = private_quantiles(values, 0.0, 30.0, 8, 1e12, np.random.default_rng(0))
    ranks = np.searchsorted(np.sort(values), edges) / len(values)
    # To a quarter of a part: finer bins are not looked at.
    np.testing.assert_allclose(ranks, np.arange(1, 8) / 8, atol=1 / 32)


def test_quantiles_of_equal_values_fall_together():
    values = np.concatenate([np.zeros(9_000), np.linspace(0, 1000, 1_000)])
    edges = private_quantiles(values, 0.0, 1000.0, 10, 1e12, np.random.default_rng(0))
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= 3
    assert edges[0] <= 1.0


@pytest.mark.parametrize("rho", [1e-8, 1e-2])
def test_quantiles_lie_inside_whatever_the_noise(rho):
    for seed in range(20):
        edges = private_quantiles(np.full(50, 0.3), 0.0, 1.0, 6, rho, np.random.default_rng(seed))
        assert 1 <= len(edges) <= 5
        assert (np.diff(edges) > 0).all()
        assert edges[0] > 0
        assert edges[-1] < 1


def test_quantiles_spend_no_more_than_rho():
    """At most one look at the values for each halving, and one before, each at a part of the budget."""

    class Counting(np.random.Generator):
        scales: list[float] = []

        def standard_normal(self, size=None):
            self.scales.append(size)
            return np.zeros(size)

    generator = Counting(np.random.PCG64(0))
    values = np.random.default_rng(0).random(1000) ** 8
    private_quantiles(values, 0.0, 1.0, 16, 1.0, generator, halvings=4)
    assert len(generator.scales) <= 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": [2.0]}, r"values must be in \[0, 1\], got 2.0"),
        ({"values": [math.nan]}, r"values must be in \[0, 1\], got nan"),
        ({"values": []}, "values must be a vector of one number or more"),
        ({"high": 0.0}, "high must be above low = 0, got 0"),
        ({"num": 1}, "num must be at least 2"),
        ({"halvings": -1}, "halvings must be at least 0"),
        ({"rho": 0.0}, "rho must be positive"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {"values": [0.5], "low": 0.0, "high": 1.0, "num": 4, "rho": 1.0, "generator": np.random.default_rng(0)}
    with pytest.raises(ValueError, match=message):
        private_quantiles(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": np.zeros((0, 2))}, "X must be a table of one row or more"),
        ({"X": np.array([[0, math.nan]])}, "X must be finite"),
        ({"rho": 0.0}, "rho must be positive"),
        ({"rho": math.nan}, "rho must be"),
        ({"noise": np.zeros(3)}, r"noise must be of shape \(4,\), got shape \(3,\)"),
        ({"noise": np.array([0, 0, math.inf, 0])}, "noise must be finite"),
        ({"statistic": RowSums(lambda X: X / 0, (2,), (1.0,))}, r"statistic.counts must be finite"),
        ({"statistic": RowSums(lambda X: X, (3,), (1.0,))}, r"statistic.counts must be of shape \(3,\)"),
    ],
)
def test_answers_look_at_their_arguments_before_anything_is_drawn(change, message):
    generator = np.random.default_rng(0)
    before = generator.bit_generator.state
    arguments = {"statistic": marginals([2, 2]), "X": np.array([[0, 1.0]]), "rho": 1.0, "generator": generator}
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=message):
        noisy_answers(**arguments | change)
    assert generator.bit_generator.state == before


class FirstLook:
    """Noise in the second bin of the first look alone, of a size that is known."""

    def __init__(self, size: float) -> None:
        self.size, self.looks = size, 0

    def standard_normal(self, count: int) -> np.ndarray:
        self.looks += 1
        noise = np.zeros(count)
        noise[1] = self.size if self.looks == 1 else 0.0
        return noise


@pytest.mark.parametrize("halvings", [0, 3])
def test_every_look_at_the_values_costs_its_share_of_the_budget(halvings: int) -> None:
    # All values lie in the first quarter. An edge lies beyond it as soon as the noise stands for a third as many in the
    # second (half as many quantiles are there without halvings: for as many).
    values, rho = np.full(300, 0.1), 1.0
    sigma = np.sqrt(2) / np.sqrt(2 * rho / (halvings + 1))
    enough = len(values) / (3 if halvings else 1)
    for share, beyond in ((0.85, False), (1.25, True)):
        noise = FirstLook(share * enough / sigma)
        edges = private_quantiles(values, 0.0, 1.0, 4, rho, noise, halvings=halvings)  # type: ignore[arg-type]
        assert bool(edges.max() > 0.25) == beyond
        assert noise.looks <= halvings + 1
