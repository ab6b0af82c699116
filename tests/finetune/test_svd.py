from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.finetune import singular_drift, svd_factors


def weight(out: int, inp: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, inp, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(out=st.integers(1, 9), inp=st.integers(1, 9), data=st.data())
def test_principal_and_minor_parts_complete_each_other(out: int, inp: int, data: st.DataObject) -> None:
    w, full = weight(out, inp), min(out, inp)
    r = data.draw(st.integers(1, full))
    U, S, Vh = svd_factors(w, r)
    assert (U.shape, S.shape, Vh.shape) == ((out, r), (r,), (r, inp))
    torch.testing.assert_close(U.T @ U, torch.eye(r), atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(r), atol=1e-5, rtol=0)
    rest = w - (U * S) @ Vh
    if r < full:
        u, s, vh = svd_factors(w, full - r, "minor")
        torch.testing.assert_close(rest, (u * s) @ vh, atol=1e-4, rtol=0)
        assert S[-1] >= s[0]
    else:
        torch.testing.assert_close(rest, torch.zeros_like(w), atol=1e-4, rtol=0)


def test_signs_are_fixed_and_do_not_depend_on_the_layout() -> None:
    w = weight(6, 4)
    U, _, Vh = svd_factors(w, 3)
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    again = svd_factors(w.clone().T.contiguous().T, 3)  # other strides may give other signs from LAPACK
    torch.testing.assert_close(again.U, U, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.Vh, Vh, atol=1e-5, rtol=0)
    flipped = svd_factors(-w, 3)
    torch.testing.assert_close(flipped.U, U, atol=1e-5, rtol=0)
    torch.testing.assert_close(flipped.Vh, -Vh, atol=1e-5, rtol=0)


def test_kernels_and_half_precision() -> None:
    kernel = weight(6, 18).view(6, 2, 3, 3)
    torch.testing.assert_close(svd_factors(kernel, 2).U, svd_factors(kernel.flatten(1), 2).U)
    assert svd_factors(kernel.half(), 2).S.dtype == torch.float32
    assert svd_factors(kernel.double(), 2).S.dtype == torch.float64


@pytest.mark.parametrize(
    ("w", "r", "which", "error", "match"),
    [
        (weight(4, 3), 4, "principal", ValueError, r"^r must be in \[1, 3\], got 4"),
        (weight(4, 3), 0, "principal", ValueError, "^r must be"),
        (weight(4, 3), 1, "largest", ValueError, "^which must be"),
        (torch.ones(3), 1, "principal", ValueError, "^weight must have at least 2"),
        (torch.tensor([[1.0, math.nan]]), 1, "principal", ValueError, "^weight must be finite"),
        (torch.ones(3, 3, dtype=torch.int64), 1, "principal", TypeError, "^weight must be floating"),
    ],
)
def test_bad_input(w: torch.Tensor, r: int, which: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        svd_factors(w, r, which)  # type: ignore[arg-type]


def test_drift_of_values_and_of_vectors() -> None:
    before = torch.diag(torch.tensor([5.0, 3.0, 1.0]))
    scaled = singular_drift(before, 2 * before)
    assert scaled.values == pytest.approx(3.0)
    assert scaled.vectors == pytest.approx(0.0, abs=1e-6)
    angle = math.pi / 3
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    turned = singular_drift(before, turn @ before)  # left vectors 0 and 1 turn by 60 degrees, right ones stay
    assert turned.values == pytest.approx(0.0, abs=1e-5)
    assert turned.vectors == pytest.approx((2 * (1 - c) / 3) / 2, abs=1e-5)
    assert singular_drift(before, -before).vectors == pytest.approx(0.0, abs=1e-6)
    swapped = torch.diag(torch.tensor([3.0, 5.0, 1.0]))
    assert singular_drift(before, swapped, r=2).vectors == pytest.approx(1.0)
    assert singular_drift(before, swapped, r=2).values == pytest.approx(0.0, abs=1e-6)


def test_values_that_move_apart_do_not_cancel() -> None:
    before, after = torch.diag(torch.tensor([5.0, 3.0, 1.0])), torch.diag(torch.tensor([6.0, 3.0, 0.0]))
    assert singular_drift(before, after).values == pytest.approx(2 / 3)


def test_drift_bad_input() -> None:
    with pytest.raises(ValueError, match="agree in shape"):
        singular_drift(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match="r must be in"):
        singular_drift(torch.eye(2), torch.eye(2), r=3)
