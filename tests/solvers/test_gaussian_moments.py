"""Moments of a sample against a Gaussian's: every monomial, by brute force, and thresholds that chance keeps to."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.solvers import moment_gaps
from trimtab.solvers.gaussian_moments import _moments, _plan, num_moments


def every(d: int, degree: int) -> list[tuple[int, ...]]:
    return [m for k in range(1, degree + 1) for m in combinations_with_replacement(range(d), k)]


@given(d=st.integers(1, 4), degree=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_gaps_are_those_of_the_worst_monomial(d: int, degree: int, seed: int) -> None:
    X = np.random.default_rng(seed).normal(size=(40, d)) + 0.3
    assert len(every(d, degree)) == num_moments(d, degree)
    plan = _plan(d, degree)
    found = moment_gaps(X, degree, log_term=5.0, tolerance=0.1)
    assert [gap.degree for gap in found] == list(range(1, degree + 1))
    for gap in found:
        # The Gaussian's mean of a product is that of the powers' (p - 1)!! for even p, and 0 else.
        ratios = {}
        for m, threshold in zip(plan.monomials, _thresholds(X, degree), strict=True):
            if len(m) == gap.degree:
                powers = [m.count(i) for i in set(m)]
                mean = math.prod(0 if p % 2 else math.prod(range(p - 1, 0, -2)) for p in powers)
                ratios[m] = abs(X[:, m].prod(1).mean() - mean) / threshold
        assert gap.gap / gap.threshold == pytest.approx(max(ratios.values()))
        assert ratios[gap.monomial] == pytest.approx(max(ratios.values()))


def _thresholds(X: np.ndarray, degree: int) -> np.ndarray:
    """The formula of the module with cumulants by Gauss-Hermite quadrature, and the peak by its Lagrange condition."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    weights = weights / weights.sum()
    out = []
    for m in every(X.shape[1], degree):
        powers = [m.count(i) for i in set(m)]
        raw = [math.prod(float(weights @ nodes ** (j * p)) for p in powers) for j in (1, 2, 3)]
        variance = raw[1] - raw[0] ** 2
        third = raw[2] - 3 * raw[0] * raw[1] + 2 * raw[0] ** 3
        radius = 2 * (5.0 + math.log(len(X)))
        peak = math.prod((radius * p / len(m)) ** (p / 2) for p in powers)
        out.append(0.1 + math.sqrt(variance * 10 / len(X)) + max(abs(third) / (3 * variance) * 5, peak) / len(X))
    return np.array(out)


def test_the_fourth_power() -> None:
    """Mean 3 and variance 96; central third moment 10395 - 9 * 105 + 54."""
    assert _moments((4,)) == pytest.approx((3, math.sqrt(96), 9504 / 288, 1.0))


@pytest.mark.parametrize("powers", [(4,), (2, 2), (3, 1), (2, 1, 1)])
def test_the_peak_is_the_largest_value_on_the_sphere(powers: tuple[int, ...]) -> None:
    points = np.random.default_rng(0).normal(size=(200_000, len(powers)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    largest = np.abs(points ** np.array(powers)).prod(1).max()
    assert largest <= _moments(powers)[3] + 1e-12
    assert largest == pytest.approx(_moments(powers)[3], rel=1e-2)


@pytest.mark.parametrize("n", [20, 100, 1000])
def test_false_alarms_are_as_rare_as_promised(n: int) -> None:
    rng = np.random.default_rng(n)
    log_term = math.log(2 * num_moments(3, 4) / 0.2)
    alarms = sum(
        any(gap.gap > gap.threshold for gap in moment_gaps(rng.normal(size=(n, 3)), 4, log_term)) for _ in range(400)
    )
    assert alarms / 400 <= 0.2


def test_long_samples_are_taken_in_parts() -> None:
    X = np.random.default_rng(0).normal(size=(20_001, 2))
    (first, second) = moment_gaps(X, 2, log_term=1.0)
    assert first.gap == pytest.approx(np.abs(X.mean(0))[first.monomial[0]])
    assert second.gap == pytest.approx(np.abs(X.T @ X / len(X) - np.eye(2))[second.monomial])


def test_no_coordinates_have_no_moments() -> None:
    assert moment_gaps(np.empty((5, 0)), 4, 1.0) == []


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="X must be"):
        moment_gaps(np.empty((0, 2)), 4, 1.0)
    with pytest.raises(ValueError, match="X must be"):
        moment_gaps(np.zeros(3), 4, 1.0)
    with pytest.raises(ValueError, match="degree must be"):
        moment_gaps(np.zeros((3, 2)), 0, 1.0)


def test_moments_too_large_for_a_number_are_no_gaussians() -> None:
    X = 1e100 * np.random.default_rng(0).normal(size=(100, 2))
    for found in moment_gaps(X, degree=6, log_term=5.0):
        assert found.gap > found.threshold
