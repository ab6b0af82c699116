"""Importance weights: the closed forms, and a bound that tightens."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.generative import effective_sample_size, importance_weights, log_mean_exp


def test_closed_forms_and_shifts() -> None:
    ratios = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    torch.testing.assert_close(importance_weights(ratios), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert log_mean_exp(ratios).item() == pytest.approx(math.log(2.0))
    assert effective_sample_size(ratios).item() == pytest.approx(1 / (0.0625 + 0.5625))
    for shift in (-1e4, 1e4):  # far from one, where the exponential is 0 or infinite
        assert log_mean_exp(ratios + shift).item() == pytest.approx(math.log(2.0) + shift)
        torch.testing.assert_close(importance_weights(ratios + shift), importance_weights(ratios))


def test_the_dimension_of_the_samples_is_the_one_named() -> None:
    ratios = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(importance_weights(ratios, 1).sum(1), torch.ones(3, 5, dtype=torch.float64))
    assert log_mean_exp(ratios, 2).shape == (3, 4)
    sizes = effective_sample_size(ratios, 1)
    assert bool(((sizes >= 1) & (sizes <= 4)).all())


def test_the_bound_tightens_with_samples_and_stays_a_bound() -> None:
    """x | z ~ N(z, 1), z ~ N(0, 1), proposal N(0, 1): the evidence is N(x; 0, 2)."""
    x, generator = 1.5, torch.Generator().manual_seed(0)
    exact = -0.5 * (math.log(2 * math.pi * 2) + x**2 / 2)
    bounds = []
    for count in (1, 4, 16, 64):
        z = torch.randn(count, 100_000, generator=generator, dtype=torch.float64)
        ratios = -0.5 * (math.log(2 * math.pi) + (x - z).square())
        bounds.append(log_mean_exp(ratios).mean().item())
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(-0.5 * (math.log(2 * math.pi) + x**2 + 1), abs=0.02)  # the evidence lower bound
    assert exact - 0.02 < bounds[-1] < exact + 0.003


def test_integers_and_arrays_are_refused() -> None:
    for call in (log_mean_exp, importance_weights, effective_sample_size):
        with pytest.raises(TypeError, match="must be floating point, got torch.int64"):
            call(torch.arange(3))


def test_no_samples_are_refused() -> None:
    for function in (log_mean_exp, effective_sample_size):
        with pytest.raises(ValueError, match="must be at least one along dimension 0"):
            function(torch.zeros(0, 3))
