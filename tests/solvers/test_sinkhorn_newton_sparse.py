from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from trimtab.ops.sinkhorn import DualState, sinkhorn
from trimtab.solvers import sinkhorn_newton_sparse
from trimtab.solvers.sinkhorn_newton_sparse import (
    SparsePlan,
    largest_entries,
    mass_entries,
    newton_direction,
    warm_up,
)
from trimtab.solvers.sinkhorn_newton_sparse.solver import _line_search


def instance(n: int = 30, m: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
    a = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(m, generator=generator, dtype=torch.float64) + 0.1
    return cost, a / a.sum(), b / b.sum()


def clouds(n: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    y = 0.7 * torch.randn(n, 2, generator=generator, dtype=torch.float64) + 1
    cost = torch.cdist(x, y).square()
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    return cost / cost.max(), uniform, uniform


def negative_hessian(plan: Tensor, kept: Tensor) -> Tensor:
    """Of the potential in (f, g), in units of reg, with the off-diagonal blocks cut down to what is kept."""
    off = plan * kept
    return torch.cat(
        [torch.cat([plan.sum(1).diag(), off], 1), torch.cat([off.T, plan.sum(0).diag()], 1)],
    )


def balanced(reg: float = 0.02, sweeps: int = 5) -> DualState:
    cost, a, b = instance()
    state = DualState(cost, a, b, reg, torch.zeros_like(a))
    state.sweep(sweeps, 1e-15)
    return state


@pytest.mark.parametrize("reg", [0.1, 1 / 200, 1 / 1200])
@pytest.mark.parametrize("make", [instance, clouds])
def test_agrees_with_sinkhorn(make: object, reg: float) -> None:
    cost, a, b = make()  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        expected = sinkhorn(cost, a, b, reg, tol=1e-13, max_iter=20_000)
    result = sinkhorn_newton_sparse(cost, a, b, reg, tol=1e-11)
    assert result.converged
    assert float((result.plan.sum(1) - a).abs().sum()) <= 1e-11
    assert float((result.plan.sum(0) - b).abs().sum()) <= 1e-11
    if expected.errors[-1] <= 1e-12:
        torch.testing.assert_close(result.plan, expected.plan, rtol=0, atol=1e-8)
        assert result.cost == pytest.approx(expected.cost, abs=1e-9)


def test_plan_is_the_gibbs_form_of_its_potentials() -> None:
    cost, a, b = instance()
    result = sinkhorn_newton_sparse(cost, 3 * a, 3 * b, 0.01, tol=1e-12)
    f, g = result.potentials
    torch.testing.assert_close(result.plan, ((f[:, None] + g - cost) / 0.01).exp(), rtol=1e-9, atol=1e-15)
    assert float(result.plan.sum()) == pytest.approx(3, abs=1e-11)
    assert result.cost == pytest.approx(float((result.plan * cost).sum()), rel=1e-12)


def test_full_density_converges_quadratically() -> None:
    # One stage as in the paper, and so few sweeps that something is left to do.
    cost, a, b = instance(20, 20)
    result = sinkhorn_newton_sparse(cost, a, b, 1 / 50, tol=1e-13, density=1.0, n_sinkhorn=3, start_reg=1 / 50)
    assert result.n_newton <= 6
    assert result.density == 0.5  # both off-diagonal blocks, n^2 of the Hessian's (2 n)^2 entries each
    newton = result.errors[result.n_sinkhorn - 1 :]
    for before, after in itertools.pairwise(newton):
        assert after <= max(10 * before**2, 1e-13)


def test_weak_regularisation_takes_far_fewer_iterations_than_sinkhorn() -> None:
    cost, a, b = clouds(150)
    reg = 1 / 1200
    ours = sinkhorn_newton_sparse(cost, a, b, reg)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        plain = sinkhorn(cost, a, b, reg, max_iter=5000)
    assert 10 * (ours.n_sinkhorn + ours.n_newton) <= plain.n_iter
    assert ours.density < 0.2


@pytest.mark.parametrize("density", [1.0, 0.1])
def test_direction_solves_the_papers_system(density: float) -> None:
    state = balanced()
    kept = largest_entries(state.plan, density)
    gradient = torch.cat([state.residual, torch.zeros_like(state.b)])
    expected = torch.linalg.lstsq(negative_hessian(state.plan, kept), gradient[:, None], driver="gelsd").solution[:, 0]
    step, products = newton_direction(
        SparsePlan(state.plan, kept), state.plan.sum(1), state.b, state.residual, rtol=1e-13
    )
    expected_f = expected[: len(step)]
    torch.testing.assert_close(step, expected_f - expected_f.mean(), rtol=1e-7, atol=1e-9)
    assert 1 < products <= len(step) + 2


def test_negative_hessian_is_that_of_the_potential() -> None:
    # Checks the matrix that the test above solves with, against autograd.
    state = balanced()
    n = len(state.a)

    def potential(z: Tensor) -> Tensor:
        f, g = z[:n], z[n:]
        return state.a @ f + state.b @ g - (f[:, None] + g - state.cost / state.reg).exp().sum()

    z = torch.cat([state.f, state.g])
    hessian = torch.autograd.functional.hessian(potential, z)
    full = negative_hessian(state.plan, torch.ones_like(state.plan))
    torch.testing.assert_close(-hessian, full, rtol=1e-9, atol=1e-12)
    null = torch.cat([torch.ones(n), -torch.ones(len(z) - n)]).double()
    torch.testing.assert_close(full @ null, torch.zeros_like(null), rtol=0, atol=1e-12)
    for density in (1.0, 0.1):
        kept = largest_entries(state.plan, density)
        assert torch.linalg.eigvalsh(negative_hessian(state.plan, kept)).min() > -1e-12


@pytest.mark.parametrize("shape", [(40, 50), (50, 40)])
@pytest.mark.parametrize("density", [0.05, 0.9])
def test_sparse_and_dense_products_agree_with_the_matrix(density: float, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    plan = torch.rand(*shape, generator=generator, dtype=torch.float64)
    plan[7] = 0  # an empty row and an empty column
    plan[:, 3] = 0
    kept = largest_entries(plan, density)
    x, y = (torch.rand(size, generator=generator, dtype=torch.float64) for size in shape)
    sparse = SparsePlan(plan, kept)
    cut = plan * kept
    torch.testing.assert_close(sparse.times(y), cut @ y)
    torch.testing.assert_close(sparse.transposed_times(x), cut.T @ x)
    torch.testing.assert_close(sparse.squares_times(y), cut.square() @ y)
    assert sparse.density == pytest.approx(2 * int(kept.sum()) / 90**2)  # of the Hessian's entries


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.01, 1), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_largest_entries_keep_the_largest(n: int, m: int, density: float, seed: int) -> None:
    plan = torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = largest_entries(plan, density)
    assert int(kept.sum()) == min(n * m, math.ceil(density * (n + m) ** 2 / 2))
    if not kept.all():
        assert plan[kept].min() > plan[~kept].max()


@given(st.floats(1e-6, 0.5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_mass_entries_bound_the_mass_lost(lost: float, seed: int) -> None:
    cost, a, b = instance(seed=seed)
    state = DualState(cost, a, b, 0.02, torch.zeros_like(a))
    state.sweep(50, 1e-13)
    kept = mass_entries(state.plan, a, b, lost)
    dropped = state.plan * ~kept
    assert (dropped.sum(1) <= lost * a).all()
    assert (dropped.sum(0) <= lost * b).all()


def test_mass_entries_spare_rows_and_columns_with_little_mass() -> None:
    _, a, b = instance()
    a, b = a.clone(), b.clone()
    a[4], b[7] = 1e-4, 1e-4
    a, b = a / a.sum(), b / b.sum()
    plan = torch.outer(a, b)
    for coupling, rows, columns in ((plan, a, b), (plan.T, b, a)):
        dropped = coupling * ~mass_entries(coupling, rows, columns, 0.1)
        assert (dropped.sum(1) <= 0.1 * rows).all()
        assert (dropped.sum(0) <= 0.1 * columns).all()


def test_preconditioner_solves_a_diagonal_system_at_once() -> None:
    diagonal = torch.logspace(-6, 0, 30, dtype=torch.float64)
    residual = torch.linspace(-1, 1, 30, dtype=torch.float64)
    excess = torch.logspace(0, -2, 30, dtype=torch.float64)  # of the row sums over what is kept
    sparse = SparsePlan(diagonal.diag(), torch.eye(30, dtype=torch.bool))
    step, products = newton_direction(sparse, (1 + excess) * diagonal, diagonal, residual, rtol=1e-8)
    expected = residual / (excess * diagonal)
    torch.testing.assert_close(step, expected - expected.mean(), rtol=1e-8, atol=1e-2)
    assert products == 1


def test_line_search_never_lowers_the_potential() -> None:
    cost, a, b = clouds()
    state = DualState(cost, a, b, 1e-3, torch.zeros_like(a))
    for scale in (1.0, 30.0, 1e4, 1e8):
        value = state.value()
        length = _line_search(state, scale * state.residual)
        assert 0 < length <= 1
        assert state.value() >= value - 1e-12 * abs(value)


def test_line_search_stays_when_no_length_helps() -> None:
    cost, a, b = clouds()
    state = DualState(cost, a, b, 1e-3, torch.zeros_like(a))
    before, plan = state.f.clone(), state.plan.clone()
    assert _line_search(state, -state.residual) == 0.0
    assert torch.equal(state.f, before)
    torch.testing.assert_close(state.plan, plan)


def test_plan_ignores_constants_added_to_rows_and_columns() -> None:
    cost, a, b = instance()
    generator = torch.Generator().manual_seed(3)
    u, v = (torch.rand(size, generator=generator, dtype=torch.float64) for size in cost.shape)
    plain = sinkhorn_newton_sparse(cost, a, b, 0.01, tol=1e-12)
    moved = sinkhorn_newton_sparse(cost + u[:, None] + v, a, b, 0.01, tol=1e-12)
    torch.testing.assert_close(moved.plan, plain.plan, rtol=0, atol=1e-10)


def test_tends_to_the_assignment() -> None:
    cost = clouds(40)[0]
    uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.numpy())
    result = sinkhorn_newton_sparse(cost, uniform, uniform, 1e-5, tol=1e-7)
    assert result.cost == pytest.approx(float(cost[rows, columns].mean()), rel=1e-4)


def bump(mean: float, n: int = 100) -> Tensor:
    i = torch.arange(n, dtype=torch.float64)
    heights = (-((i - mean) ** 2) / 200).exp()
    return heights / heights.sum()


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.01])
def test_bumps_on_a_line(reg: float) -> None:
    # Rows of mass 1e-11, which an L1 error does not see, and costs up to 1e6 times the regularisation.
    i = torch.arange(100, dtype=torch.float64)
    result = sinkhorn_newton_sparse((i[:, None] - i).square(), bump(30), bump(40), reg)
    assert result.converged
    assert float((result.plan.sum(1) - bump(30)).abs().sum()) <= 1.1e-9
    # On a line the optimal plan is monotone; entropy costs at most reg log n more.
    upto, start = (torch.stack([h.cumsum(0), h.cumsum(0) - h]) for h in (bump(30), bump(40)))
    monotone = (torch.minimum(upto[0][:, None], start[0]) - torch.maximum(upto[1][:, None], start[1])).clamp_min(0)
    exact = float((monotone * (i[:, None] - i).square()).sum())
    assert exact - 1e-6 <= result.cost <= exact + reg * math.log(100)


def test_kept_entries_count_as_the_papers() -> None:
    # Of the Hessian: at 2 / n, four entries a row of an n x n plan. Steps are few where the plan itself has so few.
    cost, uniform = instance(100, 100)[0], torch.full((100,), 0.01, dtype=torch.float64)
    result = sinkhorn_newton_sparse(cost, uniform, uniform, 1 / 1200, density=2 / 100)
    assert result.converged
    assert result.density == pytest.approx(0.02)
    assert result.n_newton < 25


def test_warm_up_goes_in_ratios_of_four_along_a_straight_line() -> None:
    cost, a, b = clouds()
    state = DualState(cost, a, b, 0.1, torch.zeros_like(a))
    seen: list[tuple[float, Tensor]] = []

    def solve() -> bool:
        seen.append((state.reg, state.reg * state.f))
        return True

    warm_up(state, 1e-3, solve)
    regs = [reg for reg, _ in seen]
    assert regs == pytest.approx([0.1, 0.025, 0.00625, 0.0015625, 1e-3])
    # A solver that leaves the potentials where they are leaves them on the line.
    seen.clear()
    state = DualState(cost, a, b, 0.1, torch.zeros_like(a))
    slope = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def solve_exactly() -> bool:
        seen.append((state.reg, state.reg * state.f))
        state.move((1 + state.reg * slope) / state.reg)
        return True

    warm_up(state, 1e-3, solve_exactly)
    for reg, start in seen[2:]:
        torch.testing.assert_close(start, 1 + reg * slope)


def test_warm_up_puts_stages_between_where_one_fails() -> None:
    cost, a, b = clouds()
    state = DualState(cost, a, b, 0.1, torch.zeros_like(a))
    seen = [0.1]

    def solve() -> bool:
        return state.reg >= seen[-1] / 2.5 and not seen.append(state.reg)

    warm_up(state, 0.01, solve)
    assert seen[-1] == 0.01
    assert max(before / after for before, after in itertools.pairwise(seen[1:])) <= 2.5
    # Where none helps it comes to an end all the same.
    state = DualState(cost, a, b, 0.1, torch.zeros_like(a))
    warm_up(state, 0.01, lambda: False)
    assert state.reg == 0.01


def test_no_stage_is_needed_where_reg_is_large() -> None:
    cost, a, b = instance()
    one = sinkhorn_newton_sparse(cost, a, b, 0.5, start_reg=0.5)
    assert one.converged
    assert len(sinkhorn_newton_sparse(cost, a, b, 0.5).errors) == one.n_sinkhorn + one.n_newton


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_plan_ignores_the_unit_of_the_cost(unit: float) -> None:
    cost, a, b = clouds()
    plain = sinkhorn_newton_sparse(cost, a, b, 1e-3, tol=1e-12)
    scaled = sinkhorn_newton_sparse(unit * cost, a, b, unit * 1e-3, tol=1e-12)
    torch.testing.assert_close(scaled.plan, plain.plan, rtol=0, atol=1e-10)
    assert scaled.n_newton == plain.n_newton


def test_warm_start_skips_the_stages() -> None:
    cost, a, b = clouds()
    cold = sinkhorn_newton_sparse(cost, a, b, 1e-3)
    again = sinkhorn_newton_sparse(cost, a, b, 1e-3, warm_start=cold.potentials)
    assert again.n_sinkhorn == again.n_newton == 0
    torch.testing.assert_close(again.plan, cold.plan)
    near = sinkhorn_newton_sparse(cost + 1e-5 * instance(60, 60)[0], a, b, 1e-3, warm_start=cold.potentials)
    assert near.n_sinkhorn + near.n_newton < cold.n_sinkhorn + cold.n_newton


def test_hopeless_budget_warns_and_is_finite() -> None:
    cost, a, b = clouds()
    with pytest.warns(ConvergenceWarning, match=r"sinkhorn_newton_sparse stopped after \d+ sweeps and 2 Newton steps"):
        result = sinkhorn_newton_sparse(cost, a, b, 1e-7, n_sinkhorn=0, max_newton=2, start_reg=1e-7)
    assert not result.converged
    assert result.plan.isfinite().all()
    assert result.errors[-1] > 1e-9


def test_constant_cost_needs_nothing() -> None:
    _, a, b = instance()
    result = sinkhorn_newton_sparse(torch.ones(30, 20, dtype=torch.float64), a, b, 0.1)
    torch.testing.assert_close(result.plan, torch.outer(a, b))
    assert result.n_newton == 0
    assert result.density == 0.0


def test_single_row() -> None:
    b = instance()[2]
    result = sinkhorn_newton_sparse(torch.rand(1, 20).double(), torch.ones(1).double(), b, 0.01)
    torch.testing.assert_close(result.plan[0], b)


def test_counts_agree_with_the_history() -> None:
    cost, a, b = instance()
    result = sinkhorn_newton_sparse(cost, a, b, 0.01, start_reg=0.01)
    assert len(result.errors) == result.n_sinkhorn + result.n_newton
    assert result.cg_iters >= result.n_newton > 0
    assert result.n_evaluations > result.n_newton
    staged = sinkhorn_newton_sparse(cost, a, b, 0.01)
    assert len(staged.errors) < staged.n_sinkhorn + staged.n_newton


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_sinkhorn": -1}, "n_sinkhorn"),
        ({"max_newton": -1}, "max_newton"),
        ({"cg_maxiter": 0}, "cg_maxiter"),
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"start_reg": 0.01}, "start_reg"),
        ({"start_reg": math.nan}, "start_reg"),
        ({"tol": 0.0}, "tol"),
    ],
)
def test_bad_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sinkhorn_newton_sparse(*instance(), 0.1, **options)  # type: ignore[arg-type]


def test_numbers_may_be_numpys() -> None:
    cost, a, b = instance()
    plain = sinkhorn_newton_sparse(cost, a, b, 0.02, max_newton=30)
    found = sinkhorn_newton_sparse(cost, a, b, np.float64(0.02), max_newton=np.int64(30))  # type: ignore[arg-type]
    assert torch.equal(found.plan, plain.plan)


def test_no_gradient_and_inputs_unchanged() -> None:
    cost, a, b = instance()
    cost.requires_grad_()
    copies = [value.detach().clone() for value in (cost, a, b)]
    result = sinkhorn_newton_sparse(cost, a, b, 0.05, tol=1e-12)
    assert not result.plan.requires_grad
    for value, copy in zip((cost, a, b), copies, strict=True):
        assert torch.equal(value, copy)
    # The plan is the gradient of the optimal value, by central differences.
    direction = instance(seed=5)[0]

    def value(shift: float) -> float:
        moved = sinkhorn_newton_sparse(cost.detach() + shift * direction, a, b, 0.05, tol=1e-12)
        entropy = (moved.plan * (moved.plan.log() - 1)).sum()
        return moved.cost + 0.05 * float(entropy)

    numeric = (value(1e-4) - value(-1e-4)) / 2e-4
    assert numeric == pytest.approx(float((result.plan * direction).sum()), rel=1e-6)


def test_arrays_need_not_be_contiguous() -> None:
    cost, a, b = instance()
    plain = sinkhorn_newton_sparse(cost, a, b, 0.02)
    turned = sinkhorn_newton_sparse(cost.T.contiguous().T, a, b, 0.02)
    assert torch.equal(turned.plan, plain.plan)
    assert np.array_equal(
        sinkhorn_newton_sparse(cost.numpy()[::1], a.numpy(), b.numpy(), 0.02).plan, plain.plan.numpy()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    cost, a, b = clouds(150)
    here = sinkhorn_newton_sparse(cost, a, b, 1e-3, tol=1e-11)
    there = sinkhorn_newton_sparse(cost.cuda(), a.cuda(), b.cuda(), 1e-3, tol=1e-11)
    assert there.plan.is_cuda
    torch.testing.assert_close(there.plan.cpu(), here.plan, rtol=0, atol=1e-9)


@pytest.mark.parametrize("reg", [0.1, 0.01])
def test_bumps_on_a_long_line_converge_where_the_regularisation_is_weak(reg: float) -> None:
    """POT's first example: squared distances up to 9801, so that most rows of the kernel underflow."""
    place = torch.arange(100, dtype=torch.float64)
    a, b = (torch.exp(-((place - mean) ** 2) / 200) for mean in (30, 40))
    a, b = a / a.sum(), b / b.sum()
    cost = (place[:, None] - place) ** 2
    found = sinkhorn_newton_sparse(cost, a, b, reg)
    assert found.converged
    torch.testing.assert_close(found.plan.sum(1), a, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.plan.sum(0), b, rtol=0, atol=1e-6)
    # Nearly the exact cost of moving mass along a line: between quantile functions.
    levels = torch.cat([a.cumsum(0), b.cumsum(0)]).sort().values.clamp(max=1)
    widths = levels.diff(prepend=torch.zeros(1, dtype=torch.float64))
    middle = levels - widths / 2
    steps = torch.searchsorted(a.cumsum(0), middle) - torch.searchsorted(b.cumsum(0), middle)
    assert (found.plan * cost).sum().item() == pytest.approx((widths * steps.double() ** 2).sum().item(), rel=0.02)
