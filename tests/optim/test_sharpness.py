"""Sharpness on quadratics, where each number is known."""

import math

import pytest
import torch
from torch import nn

from trimtab.optim import hessian_top_eigenvalue, hessian_trace, sam_sharpness

MATRIX = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, -7.0]], dtype=torch.float64)


def quadratic(matrix=MATRIX, start=(1.0, -1.0, 0.5)):
    """A loss over two tensors whose Hessian is the matrix."""
    one = torch.tensor(start[:2], dtype=torch.float64, requires_grad=True)
    two = torch.tensor(start[2:], dtype=torch.float64, requires_grad=True)

    def loss():
        w = torch.cat([one, two])
        return 0.5 * w @ matrix @ w

    return loss, [one, two]


def test_rise_uphill_on_a_quadratic():
    loss, params = quadratic()
    w = torch.cat(params).detach()
    g = MATRIX @ w
    unit, before = g / g.norm(), [p.detach().clone() for p in params]
    expected = 0.1 * g.norm() + 0.5 * 0.01 * unit @ MATRIX @ unit
    assert sam_sharpness(loss, params, rho=0.1) == pytest.approx(expected.item(), rel=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert params[0].grad is None


def test_top_eigenvalue_is_the_largest_even_beside_a_larger_negative_one():
    loss, params = quadratic()
    values, vectors = torch.linalg.eigh(MATRIX)
    top = hessian_top_eigenvalue(loss, params, tolerance=1e-6, generator=torch.Generator().manual_seed(0))
    assert top.converged
    assert top.value == pytest.approx(values[-1].item(), rel=1e-5)
    overlap = torch.cat(top.vector) @ vectors[:, -1]
    assert abs(overlap.item()) == pytest.approx(1.0, abs=1e-4)


def test_top_eigenvalue_of_a_negative_definite_hessian():
    loss, params = quadratic(torch.diag(torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)))
    assert hessian_top_eigenvalue(loss, params, tolerance=1e-6).value == pytest.approx(-1.0, abs=1e-4)


def test_top_eigenvalue_says_when_it_has_not_converged():
    loss, params = quadratic()
    start = [torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
    assert not hessian_top_eigenvalue(loss, params, iterations=1, start=start).converged


def test_trace_is_exact_for_a_diagonal_and_unbiased_beyond():
    loss, params = quadratic(torch.diag(torch.diagonal(MATRIX)))
    assert hessian_trace(loss, params, samples=1).value == pytest.approx(-2.0)
    assert hessian_trace(loss, params, samples=1).standard_error == math.inf
    loss, params = quadratic()
    signs = [
        [torch.tensor([a, b], dtype=torch.float64), torch.tensor([c], dtype=torch.float64)]
        for a in (1.0, -1.0)
        for b in (1.0, -1.0)
        for c in (1.0, -1.0)
    ]
    estimate = hessian_trace(loss, params, probes=signs)
    assert estimate.value == pytest.approx(-2.0)
    values = torch.tensor([2.0, 3.0, -7.0]).sum() + torch.tensor([4.0, 0.0, 0.0, -4.0] * 2)
    assert estimate.standard_error == pytest.approx(values.std().item() / math.sqrt(8), rel=1e-6)


def test_same_seed_same_numbers():
    loss, params = quadratic()
    draws = [hessian_trace(loss, params, samples=3, generator=torch.Generator().manual_seed(5)).value for _ in "ab"]
    assert draws[0] == draws[1]


def test_a_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x, y = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def loss():
        return (model(x) - y).square().mean()

    def functional(flat):
        parts = dict(zip(names, flat.split([p.numel() for p in params]), strict=True))
        shaped = {n: parts[n].view_as(p) for n, p in zip(names, params, strict=True)}
        return (torch.func.functional_call(model, shaped, x) - y).square().mean()

    hessian = torch.autograd.functional.hessian(functional, torch.cat([p.detach().flatten() for p in params]))
    top = hessian_top_eigenvalue(loss, params, tolerance=1e-5, iterations=5000)
    assert top.value == pytest.approx(torch.linalg.eigvalsh(hessian)[-1].item(), rel=1e-3)
    trace = hessian_trace(loss, params, samples=400, generator=torch.Generator().manual_seed(0))
    assert abs(trace.value - hessian.trace().item()) < 4 * trace.standard_error


def test_bad_arguments_are_named():
    loss, params = quadratic()
    for rho in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rho"):
            sam_sharpness(loss, params, rho=rho)
    with pytest.raises(ValueError, match="scalar"):
        sam_sharpness(lambda: torch.ones(2), params)
    with pytest.raises(ValueError, match="finite"):
        hessian_trace(lambda: params[0].sum() * float("nan"), params)
    with pytest.raises(ValueError, match="iterations"):
        hessian_top_eigenvalue(loss, params, iterations=0)
    with pytest.raises(ValueError, match="start"):
        hessian_top_eigenvalue(loss, params, start=[torch.zeros_like(p) for p in params])
    with pytest.raises(ValueError, match="samples"):
        hessian_trace(loss, params, samples=0)
    with pytest.raises(ValueError, match="probes"):
        hessian_trace(loss, params, probes=[])


@pytest.mark.parametrize("seed", range(3))
def test_an_eigenvalue_beside_a_large_negative_one_is_converged_only_when_it_is(seed) -> None:
    """The tolerance is a part of the eigenvalue, not of its distance to the most negative one."""
    curvature = torch.tensor([-100.0, 0.5, 0.1, 0.05], dtype=torch.float64)
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(4, dtype=torch.float64, generator=generator)]
    for iterations in (50, 10_000):
        top = hessian_top_eigenvalue(lambda: 0.5 * (curvature * w**2).sum(), [w], iterations=iterations, start=start)
        vector = top.vector[0]
        residual = float((curvature * vector - top.value * vector).norm())
        assert top.converged == (residual <= 1.01e-3 * abs(top.value))
    assert top.converged
    assert abs(top.value - 0.5) < 1e-3
