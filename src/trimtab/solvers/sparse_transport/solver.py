"""Sparsity-constrained transport: L-BFGS on a dual, then proximal steps."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import integer, one_of
from trimtab.ops.sinkhorn import Array, TransportProblem
from trimtab.solvers.sparse_transport.ascent import Form, lbfgs_on_dual
from trimtab.solvers.sparse_transport.proximal import proximal_steps
from trimtab.solvers.sparse_transport.relaxation import Relaxation


@dataclass(frozen=True)
class SparseTransportResult:
    """A transport plan and how it was reached. Arrays are of the kind, dtype and device of the cost that was given.

    Attributes:
        plan: (n, m), at most k non-zeros in every column; its columns sum to `b`, its rows to `a` within `row_error`.
        relaxed: (n, m), a plan with both marginals, whose columns may have more non-zeros where entries tie for the
            k-th place; it attains the dual's value within `gap`.
        potentials: `(f, g)` of shapes (n,) and (m,); minus infinity where a marginal is zero.
        cost: the transport cost of `plan`, without the penalty.
        value: the dual's value, a lower bound of the penalised cost of every feasible plan with k non-zeros a column.
        gap: how far the relaxed problem's value at `relaxed` is above `value`, as a share of the larger one, both
            counted from the least cost; no better plan can be further below.
        row_error: the L1 distance of the row sums of `plan` from `a`, as a share of the mass. It stays above zero
            where no plan with k non-zeros a column solves the relaxed problem, however small the gap.
        n_iter: iterations of L-BFGS.
        n_proximal: proximal steps after that.
        n_evaluations: how often a dual was computed, in both.
        values: the dual's value at zero potentials and after each iteration of L-BFGS.
        errors: the row error of the sparse plan there.
        converged: whether `gap` is at most `tol`, and `row_error` at most its square root (at the dual's maximum, where
            it is flat, an error of `tol` in its value is one of about that in its slope, which is the row error).
    """

    plan: Array
    relaxed: Array
    potentials: tuple[Array, Array]
    cost: float
    value: float
    gap: float
    row_error: float
    n_iter: int
    n_proximal: int
    n_evaluations: int
    values: tuple[float, ...]
    errors: tuple[float, ...]
    converged: bool


@torch.no_grad()
def sparse_transport(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    reg: float,
    k: int,
    *,
    form: Form = "semidual",
    tol: float = 1e-6,
    max_iter: int = 1000,
    max_proximal: int = 50,
) -> SparseTransportResult:
    r"""Minimises $\langle T, C \rangle + \frac{\gamma}{2} \lVert T \rVert^2$ with at most k non-zeros in every column.

    By L-BFGS on one of the two duals, and from there on by proximal steps where it stops above `tol`. Computed in
    float64. No gradient flows through the result; see `sparse_plan` for plans that learn.

    Args:
        cost: (n, m), finite.
        a: (n,) marginal of the rows, non-negative; zeros are allowed.
        b: (m,) marginal of the columns, with the sum of `a`.
        reg: weight of the squared penalty, positive. It weighs on masses: for m columns of mass 1/m, reg / m is what
            compares with the cost.
        k: most non-zeros in a column, at least 1. Rows and columns that need more (n > k m) leave a row error.
        form: "semidual" (potentials of the rows alone; every plan on the way has the right column sums) or "dual".
        tol: duality gap at which to stop, as a share of the value.
        max_iter: most iterations of L-BFGS.
        max_proximal: most proximal steps after that, each a problem without kinks for up to 100 iterations of L-BFGS; 0
            leaves it at the duals of the paper.

    Raises:
        TypeError: an argument is no tensor or array of floating point numbers, or `k` is no integer.
        ValueError: a shape, value or device does not fit, or the marginals' sums differ by more than one in a million.

    Warns:
        sklearn.exceptions.ConvergenceWarning: the gap is above `tol`, or the plan misses the rows' masses by more than
            the square root of `tol`; it is returned all the same.

    Example:
        >>> cost = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
        >>> a, b = torch.full((50,), 1 / 50), torch.full((40,), 1 / 40)
        >>> result = sparse_transport(cost, a, b, reg=1.0, k=5)
        >>> result.converged, int((result.plan > 0).sum(0).max())
        (True, 5)
        >>> torch.allclose(result.plan.sum(0), b)
        True
    """
    problem = TransportProblem.check(cost, a, b, reg, tol)
    k = integer("k", k)
    one_of("form", form, get_args(Form))
    max_iter, max_proximal = integer("max_iter", max_iter, least=0), integer("max_proximal", max_proximal, least=0)
    result = _given_back(problem, _solve(problem, k, form, tol, max_iter, max_proximal), tol)
    if not result.converged:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"sparse_transport stopped after {result.n_iter} iterations of L-BFGS and {result.n_proximal} proximal "
            f"steps at a duality gap of {result.gap:.2e}, wanted {tol:.2e}, and a row error of {result.row_error:.2e}, "
            f"wanted {math.sqrt(tol):.2e}; allow more of them or a larger reg, k or tol",
            ConvergenceWarning,
            stacklevel=3,  # past torch.no_grad's wrapper
        )
    return result


@dataclass(frozen=True)
class _Solution:
    """Of mass one, with plans as (columns, rows)."""

    f: Tensor
    g: Tensor
    plan: Tensor
    relaxed: Tensor
    value: float
    gap: float
    values: list[float]
    errors: list[float]
    n_proximal: int
    n_evaluations: int


def _solve(problem: TransportProblem, k: int, form: Form, tol: float, max_iter: int, max_proximal: int) -> _Solution:
    relaxation = Relaxation(problem, k)
    f, balanced, values, errors, evaluations = lbfgs_on_dual(relaxation, form, tol, max_iter)
    value, plan = relaxation.semidual(f)
    relaxed = relaxation.feasible(plan)
    upper = relaxation.value(relaxed)
    steps = 0
    if relaxation.gap(upper, value) > tol:
        for f_now, plan_now, tried in proximal_steps(relaxation, f, max_proximal):
            steps += 1
            evaluations += tried
            value_now, _ = relaxation.semidual(f_now)
            relaxed_now = relaxation.feasible(plan_now)
            upper_now = relaxation.value(relaxed_now)
            if value_now > value:
                f, value = f_now, value_now
            if upper_now < upper:
                relaxed, upper = relaxed_now, upper_now
            if relaxation.gap(upper, value) <= tol:
                break
    if steps:
        plan = min(relaxation.semidual(f)[1], relaxation.sparsest(f, relaxed), key=relaxation.error)
    if relaxation.error(plan) > math.sqrt(tol):
        plan = min(plan, relaxation.fullest(f), relaxation.semidual(balanced)[1], key=relaxation.error)
    gap = relaxation.gap(upper, value)
    return _Solution(
        f + relaxation.least,
        relaxation.best_columns(f),
        plan,
        relaxed,
        value + relaxation.least,
        gap,
        [held + relaxation.least for held in values],
        errors,
        n_proximal=steps,
        n_evaluations=evaluations,
    )


def _given_back(problem: TransportProblem, solution: _Solution, tol: float) -> SparseTransportResult:
    """The solution in the kind, dtype, size and mass that were given."""
    rows, columns, given = problem.rows, problem.columns, problem.given

    def like_given(value: Tensor) -> Array:
        return value.to(given.dtype) if isinstance(given, Tensor) else value.numpy().astype(given.dtype, copy=False)

    def whole_plan(plan: Tensor) -> Array:
        full = plan.new_zeros(len(rows), len(columns))
        full[rows.nonzero(), columns.nonzero().T] = problem.mass * plan.T
        return like_given(full)

    def whole_potential(value: Tensor, kept: Tensor) -> Array:
        return like_given(value.new_full(kept.shape, -math.inf).masked_scatter(kept, value))

    row_error = float((problem.a - solution.plan.sum(0)).abs().sum())
    return SparseTransportResult(
        plan=whole_plan(solution.plan),
        relaxed=whole_plan(solution.relaxed),
        potentials=(whole_potential(solution.f, rows), whole_potential(solution.g, columns)),
        cost=problem.mass * float((solution.plan * problem.cost.T).sum()),
        value=problem.mass * solution.value,
        gap=solution.gap,
        row_error=row_error,
        n_iter=len(solution.values) - 1,
        n_proximal=solution.n_proximal,
        n_evaluations=solution.n_evaluations,
        values=tuple(problem.mass * value for value in solution.values),
        errors=tuple(solution.errors),
        converged=solution.gap <= tol and row_error <= math.sqrt(tol),
    )
