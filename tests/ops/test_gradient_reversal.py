from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from trimtab.ops.gradient_reversal import reverse_gradient


@pytest.mark.parametrize("weight", [0.0, 0.5, 10.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_is_the_identity_and_backward_the_weighted_opposite(weight: float, dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, -2.0], dtype=dtype, requires_grad=True)
    out = reverse_gradient(x, weight)
    assert torch.equal(out, x)
    assert out.dtype == dtype
    (out * torch.tensor([3.0, 4.0], dtype=dtype)).sum().backward()
    assert torch.equal(x.grad, -weight * torch.tensor([3.0, 4.0], dtype=dtype))


def test_twice_is_the_square_of_the_weight() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    reverse_gradient(reverse_gradient(x, 2.0), 2.0).backward()
    assert x.grad.item() == 4.0


def test_works_per_sample() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(vmap(grad(lambda v: reverse_gradient(v, 0.5).square()))(x), -x)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="x must be"):
        reverse_gradient(torch.tensor([1]))
    with pytest.raises(ValueError, match="weight"):
        reverse_gradient(torch.zeros(1), float("nan"))
