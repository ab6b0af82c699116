"""Conversion between kinds of prediction."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.diffusion import convert
from trimtab.diffusion.prediction import PREDICTIONS


def kinds(x0: torch.Tensor, eps: torch.Tensor, alpha: float, sigma: float) -> dict[str, torch.Tensor]:
    """Every kind by its definition."""
    return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "score": -eps / sigma, "flow": eps - x0}


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 1.0), st.floats(0.05, 5.0), st.integers(0, 1000))
def test_every_pair_at_any_level(alpha: float, sigma: float, seed: int) -> None:
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = alpha * x0 + sigma * eps
    truth = kinds(x0, eps, alpha, sigma)
    assert set(truth) == set(PREDICTIONS)
    for src, dst in itertools.product(PREDICTIONS, repeat=2):
        torch.testing.assert_close(convert(truth[src], x, alpha, sigma, src, dst), truth[dst], rtol=1e-10, atol=1e-10)


def test_levels_per_sample_match_levels_one_by_one() -> None:
    value, x = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    alpha, sigma = torch.rand(2, 4, dtype=torch.float64) + 0.1
    for src, dst in itertools.product(PREDICTIONS, repeat=2):
        together = convert(value, x, alpha, sigma, src, dst)
        single = [convert(value[i : i + 1], x[i : i + 1], alpha[i].item(), sigma[i].item(), src, dst) for i in range(4)]
        torch.testing.assert_close(together, torch.cat(single))


def test_same_kind_is_the_very_tensor() -> None:
    value = torch.randn(2, 3)
    assert convert(value, torch.zeros(2, 3), 0.3, 0.9, "v", "v") is value


def test_no_noise_and_no_data_are_finite_where_defined() -> None:
    value, x = torch.randn(2, 4, 3)
    assert torch.equal(convert(value, x, 0.0, 1.0, "flow", "x0"), x - value)
    assert torch.equal(convert(value, x, 1.0, 0.0, "eps", "x0"), x)


@pytest.mark.parametrize("arguments", [("noise", "x0"), ("x0", "noise")])
def test_unknown_kind(arguments: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"(src|dst) must be one of 'x0', 'eps', 'v', 'score', 'flow', got 'noise'"):
        convert(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, 1.0, *arguments)  # type: ignore[arg-type]
