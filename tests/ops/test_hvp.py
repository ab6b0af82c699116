"""Hessian-vector products against the Hessian itself."""

import pytest
import torch

from trimtab.ops.hvp import hessian_operator, hvp


def test_product_is_the_hessians():
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)

    def function(x):
        return x[0] ** 3 * x[1] + (x[1] * x[2]).exp()

    hessian = torch.autograd.functional.hessian(function, x.detach())
    torch.testing.assert_close(hvp(function(x), [x], [v])[0], hessian @ v)


def test_one_graph_serves_many_products_over_several_tensors():
    x, y = torch.tensor([1.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    product = hessian_operator((x**2 * y).sum(), [x, y])
    for _ in range(2):
        assert [p.item() for p in product([torch.tensor([1.0]), torch.tensor([0.0])])] == [4.0, 2.0]
        assert [p.item() for p in product([torch.tensor([0.0]), torch.tensor([1.0])])] == [2.0, 0.0]


def test_tensors_that_the_loss_does_not_depend_on_or_is_linear_in():
    x, y, z = (torch.ones(2, requires_grad=True) for _ in range(3))
    products = hvp((x**2).sum() + y.sum(), [x, y, z], [torch.ones(2)] * 3)
    assert [p.tolist() for p in products] == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert hvp(y.sum(), [y], [torch.ones(2)])[0].tolist() == [0.0, 0.0]


def test_bad_arguments_are_named():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="loss"):
        hessian_operator(x**2, [x])
    with pytest.raises(ValueError, match="params"):
        hessian_operator((x**2).sum(), [])
