"""Units: exact division, whatever the size of a vector."""

from __future__ import annotations

import pytest
import torch

from trimtab.ops.units import power_of_two_unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unit_is_a_power_of_two_near_the_largest_entry(dtype: torch.dtype) -> None:
    v = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
    v = v * torch.tensor([1e-38, 1e-30, 1.0, 7.0, 1e30, 1e38], dtype=dtype)[:, None, None]
    unit = power_of_two_unit(v)
    assert unit.shape == (6, 1, 1)
    assert bool((torch.frexp(unit).mantissa == 0.5).all())
    share = v / unit
    assert bool(((share.abs().amax((1, 2)) >= 1) & (share.abs().amax((1, 2)) < 2)).all())
    assert torch.equal(share * unit, v)


def test_a_length_in_units_is_the_same_to_the_last_bit() -> None:
    v = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    unit = power_of_two_unit(v)
    assert torch.equal(unit * (v / unit).square().sum(1, keepdim=True).sqrt(), v.square().sum(1, keepdim=True).sqrt())


def test_zeros_and_what_is_not_finite_have_the_unit_one() -> None:
    v = torch.tensor([[0.0, 0.0], [1.0, float("inf")], [float("nan"), 1.0]])
    assert power_of_two_unit(v).tolist() == [[1.0], [1.0], [1.0]]
