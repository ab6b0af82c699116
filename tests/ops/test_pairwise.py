"""Pairwise similarities against torch's own, pair by pair."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops.pairwise import pairwise_cosine


@pytest.mark.parametrize("other", [True, False])
def test_equal_torch(other):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    b = torch.randn(3, 4, generator=generator, dtype=torch.float64) if other else None
    right = a if b is None else b
    torch.testing.assert_close(pairwise_cosine(a, b), torch.cosine_similarity(a[:, None], right[None], dim=2))


def test_zero_rows_have_cosine_zero():
    a = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert pairwise_cosine(a)[0].tolist() == [0, 0]


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_cosines_have_no_unit(unit):
    a = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pairwise_cosine(unit * a, a), pairwise_cosine(a))


def test_autocast_keeps_the_precision():
    a = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    exact = pairwise_cosine(a)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pairwise_cosine(a), exact)
