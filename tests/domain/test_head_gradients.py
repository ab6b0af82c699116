from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, vmap

from trimtab.domain import head_gradients, head_hessian

SEEDED = torch.Generator().manual_seed(0)
Z = torch.randn(6, 4, generator=SEEDED, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 1])
W = torch.randn(3, 5, generator=SEEDED, dtype=torch.float64)
"""Weight and bias, side by side."""


def loss(w: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(z @ w[:, :4].T + w[:, 4], y)


def test_gradients_are_those_of_autograd_sample_by_sample() -> None:
    wanted = vmap(grad(loss), in_dims=(None, 0, 0))(W, Z[:, None], Y[:, None])
    weight, bias = head_gradients(Z, Z @ W[:, :4].T + W[:, 4], Y)
    torch.testing.assert_close(torch.cat([weight, bias[:, :, None]], 2), wanted, rtol=1e-10, atol=1e-12)


def test_hessian_is_that_of_autograd_and_positive() -> None:
    found = head_hessian(Z, Z @ W[:, :4].T + W[:, 4])
    wanted = hessian(lambda flat: loss(flat.view(3, 5), Z, Y))(W.flatten())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.linalg.eigvalsh(found).min() > -1e-12


def test_gradients_can_be_differentiated_in_the_features() -> None:
    z = Z.clone().requires_grad_()

    def of(z: torch.Tensor) -> torch.Tensor:
        weight, bias = head_gradients(z, z @ W[:, :4].T + W[:, 4], Y)
        return weight.square().sum() + bias.square().sum()

    assert torch.autograd.gradcheck(of, (z,))


def test_half_precision_is_raised() -> None:
    weight, bias = head_gradients(Z.bfloat16(), (Z @ W[:, :4].T).bfloat16(), Y)
    assert weight.dtype == bias.dtype == torch.float32


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="features, logits and targets"):
        head_gradients(Z, torch.zeros(5, 3), Y)
    with pytest.raises(ValueError, match="at least one sample"):
        head_gradients(Z[:0], torch.zeros(0, 3), Y[:0])
    with pytest.raises(TypeError, match="targets"):
        head_gradients(Z, torch.zeros(6, 3), Y.float())
    with pytest.raises(ValueError, match="features and logits"):
        head_hessian(Z, torch.zeros(5, 3))
