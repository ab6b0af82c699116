"""zCDP from (epsilon, delta) and back, and the scale of Gaussian noise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from trimtab.solvers.private_gsd.accounting import delta_from_rho, gaussian_sigma, rho_from_epsilon_delta


@pytest.mark.parametrize(
    ("epsilon", "delta", "rho"), [(1.0, 1e-9, 0.01497), (0.1, 1e-9, 0.000177), (10.0, 1e-9, 1.0908)]
)
def test_known_budgets(epsilon, delta, rho):
    """The first is that of the reference implementation (smartnoise's cdp_rho)."""
    assert rho_from_epsilon_delta(epsilon, delta) == pytest.approx(rho, rel=3e-3)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 30.0), st.floats(-12, -1))
def test_there_and_back(epsilon, exponent):
    delta = 10.0**exponent
    rho = rho_from_epsilon_delta(epsilon, delta)
    assert delta_from_rho(rho, epsilon) <= delta
    assert delta_from_rho(1.001 * rho, epsilon) > delta
    # Bun and Steinke's simpler conversion gives no more.
    logarithm = -math.log(delta)
    assert rho >= (math.sqrt(epsilon + logarithm) - math.sqrt(logarithm)) ** 2


@pytest.mark.parametrize(("rho", "epsilon"), [(0.02, 0.5), (0.5, 3.0), (2.0, 8.0)])
def test_minimum_over_alpha(rho, epsilon):
    alpha = 1 + np.geomspace(1e-3, 1e4, 200_001)
    on_a_grid = (alpha - 1) * (alpha * rho - epsilon) - np.log(alpha - 1) + alpha * np.log1p(-1 / alpha)
    assert delta_from_rho(rho, epsilon) == pytest.approx(np.exp(on_a_grid.min()), rel=1e-6)


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 3.0), (4.0, 1.0), (0.5, 10.0)])
def test_never_promises_more_than_the_gaussian_mechanism_keeps(sigma, epsilon):
    """The exact privacy of the Gaussian mechanism (Balle and Wang, 2018) is a lower bound, and not far below."""
    exact = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)
    promised = delta_from_rho(1 / (2 * sigma**2), epsilon)
    assert exact < promised < 5 * exact


def test_no_loss_costs_nothing():
    assert delta_from_rho(0.0, 1.0) == 0.0
    assert delta_from_rho(1e6, 0.0) == 1.0


def test_sigma_spends_its_budget():
    assert gaussian_sigma(3.0, 2.0) == 1.5
    assert 3.0**2 / (2 * gaussian_sigma(3.0, 0.7) ** 2) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rho_from_epsilon_delta(0.0, 1e-6), "epsilon must be positive"),
        (lambda: rho_from_epsilon_delta(math.nan, 1e-6), "epsilon must be positive"),
        (lambda: rho_from_epsilon_delta(1.0, 0.0), "delta must be in"),
        (lambda: rho_from_epsilon_delta(1.0, 1.0), "delta must be in"),
        (lambda: delta_from_rho(-1.0, 1.0), "rho must be at least 0"),
        (lambda: delta_from_rho(1.0, math.inf), "epsilon must be at least 0"),
        (lambda: gaussian_sigma(-1.0, 1.0), "sensitivity must be at least 0"),
        (lambda: gaussian_sigma(1.0, 0.0), "rho must be positive"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
