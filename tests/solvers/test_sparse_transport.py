from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from trimtab.ops.simplex import project_simplex
from trimtab.ops.topk_simplex import project_topk_simplex
from trimtab.solvers import SparseRouter, sparse_plan, sparse_transport
from trimtab.solvers.sparse_transport.differentiable import project_on_face
from trimtab.solvers.sparse_transport.k_support import (
    column_plans,
    positive_parts,
    smooth_positive_parts,
    squared_k_support_norm,
)

# Of few entries a column, plans in these tests often cannot have the rows' masses, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:sparse_transport stopped")


def instance(n: int = 8, m: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
    a = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    b = torch.rand(m, generator=generator, dtype=torch.float64) + 0.1
    return cost, a / a.sum(), b / b.sum()


def scores(rows: int = 5, n: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 6), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_projection_is_the_best_over_all_supports(k: int, seed: int) -> None:
    x = scores(1, 6, seed)[0]
    found = project_topk_simplex(x, k)
    assert int((found > 0).sum()) <= k
    assert float(found.sum()) == pytest.approx(1)
    distances = []
    for support in itertools.combinations(range(6), k):
        candidate = torch.zeros_like(x)
        candidate[list(support)] = project_simplex(x[list(support)])
        distances.append(float((candidate - x).norm()))
    assert float((found - x).norm()) == pytest.approx(min(distances), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_terms_are_maxima_over_supports(k: int) -> None:
    s, b = scores(), torch.linspace(0.2, 1.5, 5, dtype=torch.float64)
    values, plans = column_plans(s, b, 0.7, k)
    torch.testing.assert_close(plans.sum(1), b)
    free, parts = positive_parts(s, 0.7, k)
    for j in range(len(s)):
        best, best_free = [], []
        for support in itertools.combinations(range(7), k):
            top = s[j, list(support)]
            t = b[j] * project_simplex(top / (0.7 * b[j]))
            best.append(float(top @ t - 0.35 * t @ t))
            best_free.append(float(top.clamp_min(0).square().sum() / 1.4))
        assert float(values[j]) == pytest.approx(max(best))
        assert float(free[j]) == pytest.approx(max(best_free))
        assert float(s[j] @ parts[j] - 0.35 * parts[j] @ parts[j]) == pytest.approx(float(free[j]))


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_k_support_norm_is_the_best_split_of_the_squares(k: int) -> None:
    t = scores().abs()
    t[0, 2:] = 0
    for row, squared in zip(t, squared_k_support_norm(t, k), strict=True):
        squares = row.square().numpy()
        # The shares theta, in [0, 1] and k in sum, that a bounded solver finds.
        best = minimize(
            lambda theta, squares=squares: float((squares / theta).sum()),
            np.full(7, k / 7),
            jac=lambda theta, squares=squares: -squares / theta**2,
            bounds=[(1e-4, 1)] * 7,
            constraints={"type": "eq", "fun": lambda theta: theta.sum() - k, "jac": lambda theta: np.ones(7)},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 300},
        )
        assert float(squared) == pytest.approx(best.fun, rel=2e-3)
    torch.testing.assert_close(squared_k_support_norm(t, 1), t.sum(1).square())
    torch.testing.assert_close(squared_k_support_norm(t, 7), t.square().sum(1))


@given(st.integers(1, 6), st.floats(1e-4, 10), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_smoothed_terms_are_conjugates(k: int, smoothing: float, seed: int) -> None:
    s = scores(4, 7, seed) + 0.5
    values, t = smooth_positive_parts(s, 2.0, k, smoothing)

    def objective(s: Tensor, t: Tensor) -> Tensor:
        return (s * t).sum(1) - squared_k_support_norm(t, k) - smoothing / 2 * t.square().sum(1)

    # At the maximiser the value is the objective's, and no other point has a larger one.
    torch.testing.assert_close(values, objective(s, t), rtol=1e-8, atol=1e-10)
    for scale in (1e-3, 0.1):
        assert (objective(s, (t + scale * scores(4, 7, seed + 1)).clamp_min(0)) <= values + 1e-10).all()
    exact, _ = positive_parts(s, 2.0, k)
    assert (values <= exact + 1e-12).all()


def test_smoothed_terms_have_the_maximiser_as_gradient() -> None:
    s = scores() + 0.5
    direction = scores(seed=1)
    for smoothing in (1e-2, 1.0):
        ends = [smooth_positive_parts(s + h * direction, 2.0, 2, smoothing)[0].sum() for h in (1e-6, -1e-6)]
        slope = (smooth_positive_parts(s, 2.0, 2, smoothing)[1] * direction).sum()
        assert float((ends[0] - ends[1]) / 2e-6) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("form", ["semidual", "dual"])
def test_free_columns_are_quadratic_transport(form: Any) -> None:
    ot = pytest.importorskip("ot")
    cost, a, b = instance()
    result = sparse_transport(cost, a, b, 1.0, 8, form=form, tol=1e-9)
    expected = ot.smooth.smooth_ot_semi_dual(a.numpy(), b.numpy(), cost.numpy(), 1.0, reg_type="l2", stopThr=1e-14)
    torch.testing.assert_close(result.plan, torch.from_numpy(expected), rtol=0, atol=1e-6)
    value = (result.plan * cost).sum() + result.plan.square().sum() / 2
    assert result.value == pytest.approx(float(value), rel=1e-6)


def test_gap_is_between_a_feasible_plan_and_a_point_of_the_dual() -> None:
    # A feasible plan of the relaxed problem and a point of the dual with one value: both are optimal.
    cost, a, b = instance(6, 4)
    result = sparse_transport(cost, a, b, 2.0, 2)
    relaxed = (result.relaxed * cost).sum() + squared_k_support_norm(result.relaxed.T.contiguous(), 2).sum()
    assert float(relaxed) == pytest.approx(result.value, rel=2e-6)
    torch.testing.assert_close(result.relaxed.sum(1), a)
    torch.testing.assert_close(result.relaxed.sum(0), b)
    f, _ = result.potentials
    terms, _ = column_plans(f - cost.T, b, 2.0, 2)
    assert result.value == pytest.approx(float(a @ f - terms.sum()), rel=1e-12)


@pytest.mark.parametrize("reg", [0.5, 5.0])
def test_one_entry_is_the_linear_programme(reg: float) -> None:
    cost, a, b = instance()
    n, m = cost.shape
    rows, columns = np.kron(np.eye(n), np.ones((1, m))), np.kron(np.ones((1, n)), np.eye(m))
    linear = linprog(cost.flatten().numpy(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b])).fun
    result = sparse_transport(cost, a, b, reg, 1)
    assert result.gap <= 1e-6
    assert result.value == pytest.approx(linear + reg / 2 * float(b.square().sum()), rel=2e-6)
    assert result.n_proximal > 0  # what L-BFGS alone cannot do


def test_value_falls_as_k_grows_and_columns_stay_sparse() -> None:
    cost, a, b = instance()
    values = []
    for k in (1, 2, 4, 8):
        result = sparse_transport(cost, a, b, 5.0, k, tol=1e-5)
        assert result.gap <= 1e-5
        assert int((result.plan > 0).sum(0).max()) <= k
        torch.testing.assert_close(result.plan.sum(0), b)
        assert result.row_error == pytest.approx(float((result.plan.sum(1) - a).abs().sum()), abs=1e-12)
        values.append(result.value)
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(values))


def test_both_duals_have_one_optimum() -> None:
    cost, a, b = instance()
    one, other = (sparse_transport(cost, a, b, 1.0, 3, form=form, tol=1e-6) for form in ("semidual", "dual"))
    assert one.value == pytest.approx(other.value, rel=2e-6)
    f, g = one.potentials
    terms, _ = positive_parts(f + g[:, None] - cost.T, 1.0, 3)
    assert float(a @ f + b @ g - terms.sum()) == pytest.approx(one.value, rel=1e-9)


def test_mass_and_empty_rows() -> None:
    cost, a, b = instance()
    whole = sparse_transport(cost, 3 * a, 3 * b, 1.0, 3)
    unit = sparse_transport(cost, a, b, 3.0, 3)
    torch.testing.assert_close(whole.plan, 3 * unit.plan, rtol=0, atol=1e-4)
    assert whole.value == pytest.approx(3 * unit.value, rel=3e-6)
    a = a.clone()
    a[4] = 0
    result = sparse_transport(cost, a / a.sum(), b, 1.0, 3)
    assert result.plan[4].abs().max() == 0
    assert result.potentials[0][4] == -math.inf


def test_history() -> None:
    cost, a, b = instance()
    result = sparse_transport(cost, a, b, 1.0, 3)
    assert len(result.values) == len(result.errors) == result.n_iter + 1
    assert result.values[0] == pytest.approx(-float(column_plans(-cost.T, b, 1.0, 3)[0].sum()))
    assert max(result.values) <= result.value * (1 + 1e-9)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 2.0}, TypeError, "k must be an integer"),
        ({"k": True}, TypeError, "k must be an integer"),
        ({"form": "primal"}, ValueError, "form"),
        ({"max_iter": -1}, ValueError, "max_iter"),
        ({"max_proximal": -1}, ValueError, "max_proximal"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sparse_transport(*instance(), 1.0, **{"k": 2, **options})


def test_ties_are_broken_for_the_rows() -> None:
    # Every entry ties: the k largest of each column are any, and the rows need theirs spread.
    uniform = torch.full((100,), 0.01, dtype=torch.float64)
    result = sparse_transport(torch.zeros(100, 100, dtype=torch.float64), uniform, uniform, 1.0, 2)
    assert result.converged
    assert int((result.plan > 0).sum(0).max()) == 2
    torch.testing.assert_close(result.plan.sum(1), uniform)
    assert result.value == pytest.approx(100 * 2 * 0.005**2 / 2)


def test_what_is_not_balanced_has_not_converged() -> None:
    # Two columns of one entry each cannot serve three rows, whatever the duals say.
    cost, a = torch.zeros(3, 2, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="a row error of"):
        result = sparse_transport(cost, a, torch.full((2,), 0.5, dtype=torch.float64), 1.0, 1)
    assert result.gap <= 1e-6
    assert result.row_error > 0.5
    assert not result.converged


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_plan_ignores_unit_and_origin_of_the_cost(unit: float) -> None:
    cost, a, b = instance(12, 9)
    for k in (3, 12):
        plain = sparse_transport(cost, a, b, 1.0, k)
        scaled = sparse_transport(unit * cost, a, b, unit, k)
        torch.testing.assert_close(scaled.plan, plain.plan, rtol=0, atol=1e-4)
        assert scaled.value == pytest.approx(unit * plain.value, rel=3e-6)
        far = sparse_transport(cost + 1e4, a, b, 1.0, k)
        torch.testing.assert_close(far.plan, plain.plan, rtol=0, atol=1e-4)
        assert far.gap <= 1e-6
        assert far.value - 1e4 == pytest.approx(plain.value, rel=1e-6)
        f, g = far.potentials
        terms, _ = positive_parts(f + g[:, None] - cost.T - 1e4, 1.0, k)
        assert float(a @ f + b @ g - terms.sum()) == pytest.approx(far.value, rel=1e-9)


def test_k_may_be_numpys() -> None:
    cost, a, b = instance()
    found = sparse_transport(cost, a, b, 1.0, np.int64(3))  # type: ignore[arg-type]
    assert torch.equal(found.plan, sparse_transport(cost, a, b, 1.0, 3).plan)
    assert SparseRouter(k=np.int32(2)).capacity(10, 4) == 2  # type: ignore[arg-type]


def test_no_budget_is_no_error() -> None:
    with pytest.warns(ConvergenceWarning, match="duality gap"):
        result = sparse_transport(*instance(), 1.0, 2, max_iter=0, max_proximal=0)
    assert result.plan.isfinite().all()
    assert result.n_iter == 0


@pytest.mark.parametrize("k", [4, 12])
def test_plan_gradient_is_that_of_the_plan(k: int) -> None:
    cost, a, b = instance(12, 9, seed=3)
    weights, direction = instance(12, 9, seed=5)[0], instance(12, 9, seed=6)[0]
    cost.requires_grad_()
    plan = sparse_plan(cost, a, b, 0.3, k, tol=1e-12)
    (plan * weights).sum().backward()

    def after(h: float) -> float:
        moved = sparse_plan(cost.detach() + h * direction, a, b, 0.3, k, tol=1e-12)
        return float((moved * weights).sum())

    numeric = (after(1e-5) - after(-1e-5)) / 2e-5
    assert numeric == pytest.approx(float((cost.grad * direction).sum()), rel=1e-4)


def test_face_projection() -> None:
    support = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    direction = scores(8, 5)
    image = project_on_face(direction, support)
    assert image[~support].abs().max() == 0
    assert image.sum(0).abs().max() < 1e-12
    assert image.sum(1).abs().max() < 1e-12
    torch.testing.assert_close(project_on_face(image, support), image)
    torch.testing.assert_close(project_on_face(direction.T, support.T), image.T)
    other = project_on_face(scores(8, 5, 1), support)
    assert float(((direction - image) * other).sum()) == pytest.approx(0, abs=1e-12)


def test_router_keeps_capacities_and_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 4, generator=generator) + torch.tensor([2.0, 0.0, 0.0, 0.0])
    logits.requires_grad_()
    assert int((logits.argmax(1) == 0).sum()) > 25  # top-1 gating would overflow
    weights = SparseRouter(reg=2.0, capacity_factor=1.5, tol=1e-5)(logits)
    assert weights.dtype == logits.dtype
    assert int((weights > 0).sum(0).max()) <= math.ceil(1.5 * 15)
    torch.testing.assert_close(weights.sum(0), torch.full((4,), 15.0))
    assert float((weights.detach().sum(1) - 1).abs().mean()) < 0.1
    (weights * torch.randn(60, 4, generator=generator)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def test_router_routes_by_score() -> None:
    # Two tokens for each of two experts, every one preferring its own.
    logits = torch.tensor([[5.0, 0.0], [4.0, 0.0], [0.0, 3.0], [0.0, 6.0]])
    weights = SparseRouter(reg=0.1)(logits)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reg": 0.0}, "reg"), ({"reg": math.nan}, "reg"), ({"k": 0}, "k must"), ({"capacity_factor": 0.5}, "capacity")],
)
def test_router_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseRouter(**options)
    with pytest.raises(ValueError, match="scores"):
        SparseRouter()(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_in_half_precision_are_routed_as_in_full(dtype: torch.dtype) -> None:
    scores = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    router = SparseRouter(reg=0.5)
    found = router(scores)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), router(scores.double()), atol=0.02, rtol=0)


def test_a_router_that_leaves_tokens_out_says_so() -> None:
    scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseRouter()(10 * scores)
    with pytest.warns(ConvergenceWarning, match="^SparseRouter left tokens without an expert"):
        weights = SparseRouter()(1e4 * scores)
    assert int((weights.sum(1) < 0.5).sum()) > 6
