"""Costs between point clouds."""

import math

import pytest
import torch
import torch.nn.functional as F

from trimtab.ops.point_costs import point_costs, sphere_distance


@pytest.mark.parametrize(("cost", "power"), [("euclidean", 1), ("sqeuclidean", 2), (1.5, 1.5), (3, 3)])
def test_powers_of_the_distance(cost, power):
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    expected = (x[:, None] - y).square().sum(-1) ** (power / 2)
    torch.testing.assert_close(point_costs(x, y, cost), expected)


def test_sphere_is_the_angle_exact_at_both_ends():
    x = F.normalize(torch.randn(6, 3, dtype=torch.float64), dim=1)
    y = F.normalize(torch.randn(7, 3, dtype=torch.float64), dim=1)
    torch.testing.assert_close(point_costs(x, y, "sphere"), (x @ y.T).acos())
    assert sphere_distance(x, x).diagonal().abs().max() == 0
    torch.testing.assert_close(sphere_distance(x, -x).diagonal(), torch.full((6,), math.pi, dtype=torch.float64))


def test_gradients_are_finite_where_points_meet():
    x = F.normalize(torch.randn(3, 3), dim=1).requires_grad_()
    for cost in ("euclidean", "sqeuclidean", "sphere"):
        (grad,) = torch.autograd.grad(point_costs(x, x.detach(), cost).sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize(("cost", "power"), [("euclidean", 1), ("sqeuclidean", 2), (1.5, 1.5)])
@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_costs_go_with_the_unit_and_not_with_the_origin(cost, power, unit):
    generator = torch.Generator().manual_seed(0)
    # Multiples of 2^-10, so that float32 holds them exactly wherever they lie.
    x, y = (torch.randint(-1024, 1024, (size, 3), generator=generator) / 1024 for size in (6, 7))
    plain = point_costs(x, y, cost)
    torch.testing.assert_close(point_costs(unit * x, unit * y, cost), unit**power * plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(point_costs(x + 4096, y + 4096, cost), plain, rtol=1e-6, atol=0)


def test_arrays_are_taken_and_integers_refused_by_name():
    x = torch.randn(4, 3)
    torch.testing.assert_close(point_costs(x.numpy(), x.numpy()), point_costs(x, x))
    with pytest.raises(TypeError, match="y must be floating point, got torch.int64"):
        point_costs(x, x.long())
    with pytest.raises(TypeError, match="x must be a tensor or a NumPy array, got list"):
        point_costs(x.tolist(), x)


def test_a_function_is_called_and_its_shape_checked():
    x, y = torch.randn(2, 3), torch.randn(4, 3)
    torch.testing.assert_close(point_costs(x, y, lambda a, b: a @ b.T), x @ y.T)
    with pytest.raises(ValueError, match="cost must return shape"):
        point_costs(x, y, lambda a, b: a)


@pytest.mark.parametrize(
    ("x", "y", "cost", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), "euclidean", "y must have points of the 3 dimensions"),
        (torch.zeros(0, 3), torch.zeros(2, 3), "euclidean", "x and y must be non-empty"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "manhattan", "cost must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3), 0.5, "cost must be"),
    ],
)
def test_bad_input_names_the_argument(x, y, cost, message):
    with pytest.raises(ValueError, match=message):
        point_costs(x, y, cost)
