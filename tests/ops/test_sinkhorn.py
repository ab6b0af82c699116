from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.ops.sinkhorn import DualState, TransportProblem, sinkhorn


def instance(n: int = 12, m: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
    a = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(m, generator=generator, dtype=torch.float64) + 0.1
    return cost, a / a.sum(), b / b.sum()


def test_two_by_two_closed_form() -> None:
    # With uniform marginals and cost [[0, c], [c, 0]] the diagonal is exp(0) to exp(-c / reg) of the off-diagonal.
    c, reg = 0.7, 0.2
    cost = torch.tensor([[0.0, c], [c, 0.0]], dtype=torch.float64)
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    result = sinkhorn(cost, half, half, reg, tol=1e-14)
    diagonal = 0.5 / (1 + np.exp(-c / reg))
    expected = torch.tensor([[diagonal, 0.5 - diagonal], [0.5 - diagonal, diagonal]], dtype=torch.float64)
    torch.testing.assert_close(result.plan, expected, rtol=1e-12, atol=0)
    assert result.cost == pytest.approx(2 * c * (0.5 - diagonal), rel=1e-12)


def test_plan_is_the_gibbs_form_of_its_potentials_and_has_the_marginals() -> None:
    cost, a, b = instance()
    result = sinkhorn(cost, 3 * a, 3 * b, 0.05, tol=1e-12)
    f, g = result.potentials
    torch.testing.assert_close(result.plan, ((f[:, None] + g - cost) / 0.05).exp(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(result.plan.sum(1), 3 * a, rtol=0, atol=1e-11)
    torch.testing.assert_close(result.plan.sum(0), 3 * b, rtol=0, atol=1e-11)
    assert result.converged
    assert result.n_iter == len(result.errors)
    assert result.errors[-1] <= 1e-12 < result.errors[-2]


def test_kernel_sweeps_equal_plain_log_domain_sinkhorn() -> None:
    cost, a, b = instance()
    reg = 0.02
    f, g = torch.zeros_like(a), reg * (b.log() - torch.logsumexp(-cost / reg, 0))
    for _ in range(7):
        f = reg * (a.log() - torch.logsumexp((g - cost) / reg, 1))
        g = reg * (b.log() - torch.logsumexp((f[:, None] - cost) / reg, 0))
    with pytest.warns(match="sinkhorn stopped after 7 sweeps"):
        result = sinkhorn(cost, a, b, reg, tol=1e-15, max_iter=7)
    torch.testing.assert_close(result.potentials[0], f, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.potentials[1], g, rtol=1e-10, atol=1e-12)


def test_far_scalings_are_taken_in_the_log_domain() -> None:
    # All but the first row of the first kernel underflow to zero: exp(-500) and less.
    cost, a, b = instance()
    plain = sinkhorn(cost, a, b, 0.02, tol=1e-11)
    far = sinkhorn(cost + 10 * torch.arange(12.0).double()[:, None], a, b, 0.02, tol=1e-11)
    torch.testing.assert_close(far.plan, plain.plan, rtol=0, atol=1e-10)
    assert far.n_iter <= plain.n_iter + 5


def test_gradient_of_the_dual_is_the_residual() -> None:
    cost, a, b = instance()
    state = DualState(cost, a, b, 0.1, torch.linspace(-1, 1, len(a), dtype=torch.float64))
    f = state.f.clone().requires_grad_()
    value = a @ f - b @ torch.logsumexp(f[:, None] - cost / 0.1, 0)
    (gradient,) = torch.autograd.grad(value, f)
    torch.testing.assert_close(state.residual, gradient, rtol=1e-10, atol=1e-14)
    assert state.error == pytest.approx(float(gradient.abs().sum()))
    torch.testing.assert_close(state.plan.sum(0), b)


def test_rescaled_state_equals_a_fresh_one() -> None:
    cost, a, b = instance()
    state = DualState(cost, a, b, 0.1, torch.linspace(-1, 1, len(a), dtype=torch.float64))
    state.rescale(0.02, state.reg * state.f)
    fresh = DualState(cost, a, b, 0.02, 5 * torch.linspace(-1, 1, len(a), dtype=torch.float64))
    torch.testing.assert_close(state.plan, fresh.plan)


def test_sweeps_also_stop_by_the_worst_row() -> None:
    cost, a, b = instance()
    a = a.clone()
    a[3] = 1e-9
    for far in (0.0, 2.0):  # by sweeps of the kernel and in the log domain
        state = DualState(cost, a / a.sum(), b, 0.02, far * 30 * torch.linspace(-1, 1, len(a), dtype=torch.float64))
        state.sweep(100, 1.0)
        before = state.imbalance
        rows = state.plan.sum(1)
        assert before == pytest.approx(float((rows / state.a).log().abs().max()), rel=1e-6)
        errors = state.sweep(100, 1.0, 0.1)
        assert state.imbalance <= 0.1 < before
        assert len(errors) < 100


def test_warm_start_continues() -> None:
    cost, a, b = instance()
    with pytest.warns(match="marginal error"):
        short = sinkhorn(cost, a, b, 0.01, max_iter=20)
    cold = sinkhorn(cost, a, b, 0.01)
    warm = sinkhorn(cost, a, b, 0.01, warm_start=short.potentials)
    assert abs(warm.n_iter + 20 - cold.n_iter) <= 1
    again = sinkhorn(cost, a, b, 0.01, warm_start=cold.potentials)
    assert again.n_iter == 0
    torch.testing.assert_close(again.plan, cold.plan)


def test_weights_of_zero_are_left_out() -> None:
    cost, a, b = instance()
    a, b = a.clone(), b.clone()
    a[3], b[[0, 5]] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    result = sinkhorn(cost, a, b, 0.05)
    rows, columns = a > 0, b > 0
    part = sinkhorn(cost[rows][:, columns], a[rows], b[columns], 0.05)
    torch.testing.assert_close(result.plan[rows][:, columns], part.plan)
    assert result.plan[3].abs().sum() == 0
    assert result.plan[:, [0, 5]].abs().sum() == 0
    assert result.potentials[0][3] == -torch.inf
    assert torch.isneginf(result.potentials[1]).tolist() == (~columns).tolist()
    assert sinkhorn(cost, a, b, 0.05, warm_start=result.potentials).n_iter == 0


def test_large_reg_gives_the_independent_coupling() -> None:
    cost, a, b = instance()
    torch.testing.assert_close(sinkhorn(cost, a, b, 1e6).plan, torch.outer(a, b), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((torch.zeros(5),) * 2, r"warm_start\[0\] must have shape \(12,\)"),
        ((torch.full((12,), torch.nan), torch.zeros(9)), r"warm_start\[0\] must be finite"),
    ],
)
def test_bad_warm_start(value: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn(*instance(), 0.1, warm_start=value)


def test_max_iter_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_iter"):
        sinkhorn(*instance(), 0.1, max_iter=0)


def test_marginals_that_differ_by_rounding_are_reconciled() -> None:
    cost, a, b = instance()
    problem = TransportProblem.check(cost, a * (1 + 5e-7), b, 0.1, 1e-9)
    assert float(problem.a.sum()) == pytest.approx(1, abs=1e-15)
    assert float(problem.b.sum()) == pytest.approx(1, abs=1e-15)
    assert sinkhorn(cost, a * (1 + 5e-7), b, 0.1).converged
