"""Projection onto the simplex."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize

from trimtab.ops.simplex import project_simplex


def points(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_is_the_nearest_point():
    for x in points(5, 4):
        found = project_simplex(x)
        best = minimize(
            lambda p, x: ((p - x) ** 2).sum(),
            [0.25] * 4,
            args=(x.numpy(),),
            bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14},
        ).x
        torch.testing.assert_close(found, torch.from_numpy(best), rtol=0, atol=1e-6)


def test_points_of_the_simplex_stay_and_rows_are_taken_alone():
    x = points(3, 5, 4).softmax(-1)
    torch.testing.assert_close(project_simplex(x), x)
    batch = 2 * points(3, 5, 4)
    torch.testing.assert_close(project_simplex(batch)[1, 2], project_simplex(batch[1, 2]))


def test_constants_change_nothing():
    x = torch.randint(-512, 512, (6, 50), generator=torch.Generator().manual_seed(0)) / 1024  # exact in float32
    torch.testing.assert_close(project_simplex(x + 4096), project_simplex(x), rtol=0, atol=1e-7)
    torch.testing.assert_close(project_simplex(x + 4096).sum(-1), torch.ones(6))


def test_gradient():
    assert torch.autograd.gradcheck(project_simplex, (points(4, 6).requires_grad_(),))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.arange(3), TypeError, "x must be floating point"),
        ([0.5, 0.5], TypeError, "x must be a tensor or a NumPy array, got list"),
        (torch.zeros(3, 0), ValueError, "x must have entries along its last dimension"),
    ],
)
def test_bad_input_is_named(x, error, message):
    with pytest.raises(error, match=message):
        project_simplex(x)
