"""The Jacobian of a denoiser: known matrices, and the leading part without the matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import AnalyticGMM, VPLinear
from trimtab.diffusion.jacobian import denoiser_jacobian, jacobian_svd, numerical_rank


def matrix(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_linear_map_has_its_own_matrix_with_outputs_in_rows() -> None:
    A = matrix(6)
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    found = denoiser_jacobian(lambda x: (x.flatten(1) @ A.T).reshape(x.shape), x)
    torch.testing.assert_close(found, A)


def test_agrees_with_automatic_differentiation_of_a_network() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 1, 3, padding=1)
        )
        x = torch.randn(1, 1, 4, 4)
    expected = torch.autograd.functional.jacobian(net, x).reshape(16, 16)
    torch.testing.assert_close(denoiser_jacobian(net, x), expected)


def test_that_of_a_gaussians_denoiser_is_a_shrinkage_along_its_axes() -> None:
    spread = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    denoiser = AnalyticGMM(torch.ones(1), torch.zeros(1, 3).double(), spread[None]).denoiser(VPLinear())
    t = torch.tensor([0.4], dtype=torch.float64)
    alpha, sigma = VPLinear().alpha(t), VPLinear().sigma(t)
    found = denoiser_jacobian(lambda x: denoiser(x, t), torch.randn(1, 3, dtype=torch.float64))
    torch.testing.assert_close(found, alpha * spread / (alpha**2 * spread.diagonal() + sigma**2))


def test_the_decomposition_puts_the_matrix_together_again() -> None:
    A = matrix(5)
    values, left, right = jacobian_svd(lambda x: x @ A.T, torch.zeros(1, 5, dtype=torch.float64))
    torch.testing.assert_close(left.T @ torch.diag(values) @ right, A)


@pytest.mark.parametrize("k", [1, 4, 40])
def test_the_leading_part_is_that_of_the_whole(k: int) -> None:
    # Values fall by a third each, so that ten iterations are plenty.
    U, _, V = torch.linalg.svd(matrix(40))
    A = U @ torch.diag(0.67 ** torch.arange(40, dtype=torch.float64)) @ V
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    function = lambda x: torch.sin(x.flatten(1) @ A.T).reshape(x.shape)
    some = jacobian_svd(function, 0.1 * x, k, iterations=20, generator=torch.Generator().manual_seed(0))
    whole = jacobian_svd(function, 0.1 * x)
    assert some.left.shape == some.right.shape == (k, 5, 8)
    torch.testing.assert_close(some.values, whole.values[:k], rtol=1e-6, atol=1e-9)
    leading = min(k, 4)
    signs = (some.right[:leading] * whole.right[:leading]).flatten(1).sum(1)
    torch.testing.assert_close(signs.abs(), torch.ones(leading, dtype=torch.float64))
    # Left and right belong together: one sign for both.
    torch.testing.assert_close((some.left[:leading] * whole.left[:leading]).flatten(1).sum(1), signs)


def test_same_generator_same_bits_and_the_sample_is_left_alone() -> None:
    A, x = matrix(6), torch.ones(1, 6, dtype=torch.float64)
    runs = [jacobian_svd(lambda x: x @ A, x, 2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(runs[0].right, runs[1].right)
    assert torch.equal(x, torch.ones_like(x))
    assert not x.requires_grad


def test_rank_is_the_least_number_with_the_share_of_the_norm() -> None:
    assert numerical_rank(torch.tensor([1.0, 3.0, 0.0])) == 2
    assert numerical_rank(torch.ones(100), share=0.5) == 25  # the norm grows with the root of the number
    assert numerical_rank(torch.ones(7), share=1.0) == 7
    assert numerical_rank(torch.zeros(3)) == 0
    assert numerical_rank(1e-4 * torch.tensor([1.0, 1.0, 1e-3])) == 2


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(1, ...\)"):
        denoiser_jacobian(lambda x: x, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="x must be floating point"):
        denoiser_jacobian(lambda x: x, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="function must return the shape of x"):
        denoiser_jacobian(lambda x: x[:, :2], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="k must be in"):
        jacobian_svd(lambda x: x, torch.zeros(1, 3), k=4)
    with pytest.raises(ValueError, match="share must be in"):
        numerical_rank(torch.ones(2), share=0.0)
