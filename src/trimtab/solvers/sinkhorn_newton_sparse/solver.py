"""Sinkhorn sweeps, then Newton steps with a sparse Hessian, at every stage of the warm-up."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import in_range, integer, number
from trimtab.ops.sinkhorn import Array, DualState, TransportProblem, warn_not_converged
from trimtab.solvers.sinkhorn_newton_sparse.entries import largest_entries, mass_entries
from trimtab.solvers.sinkhorn_newton_sparse.stages import warm_up

_START = 0.1  # regularisation of the warm-up's first stage, as a share of the cost's range
_STAGE_ERROR = 1e-4  # marginal error at which a stage is left, and sweeps give way to Newton steps
_STAGE_IMBALANCE = 1.0  # logarithm of the factor by which the mass of a row may be off there
_STAGE_STEPS = 8
_RECOVERY_SWEEPS = 10  # after a step that the line search had to shorten
_LOST_MASS = 1e-2  # share of each row's and column's mass that the sparse Hessian may leave out at first
_DENSE = 0.2  # share of entries from which dense products are faster


@dataclass(frozen=True)
class SinkhornNewtonSparseResult:
    """A transport plan and how it was reached. Arrays are of the kind, dtype and device of the cost that was given.

    Attributes:
        plan: (n, m), `exp((f[:, None] + g - cost) / reg)`.
        potentials: `(f, g)` of shapes (n,) and (m,); minus infinity where a marginal is zero.
        cost: the transport cost of the plan, without the entropy.
        n_sinkhorn: sweeps, those of the warm-up's stages included.
        n_newton: Newton steps, those of the warm-up's stages included.
        errors: after each sweep and Newton step at the regularisation asked for, the L1 distance of the plan's row sums
            from `a`, as a share of the mass; its column sums are `b` up to rounding.
        cg_iters: steps of conjugate gradients in all; each is a product with S and one with its transpose.
        n_evaluations: how often the plan was computed from potentials, line searches included.
        density: share of the entries of the last Newton step's Hessian that were kept, counted as the argument
            `density` is; 0 if there was no step.
        converged: whether the final error is at most `tol`.
    """

    plan: Array
    potentials: tuple[Array, Array]
    cost: float
    n_sinkhorn: int
    n_newton: int
    errors: tuple[float, ...]
    cg_iters: int
    n_evaluations: int
    density: float
    converged: bool


@torch.no_grad()
def sinkhorn_newton_sparse(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    reg: float,
    *,
    tol: float = 1e-9,
    n_sinkhorn: int = 20,
    max_newton: int = 50,
    density: float | None = None,
    cg_maxiter: int = 200,
    start_reg: float | None = None,
    warm_start: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
) -> SinkhornNewtonSparseResult:
    """Solves entropic optimal transport by Sinkhorn-Newton-Sparse.

    The problem is that of `trimtab.ops.sinkhorn.sinkhorn`. Computed in float64 whatever the input's dtype.

    No gradient flows through the result. At convergence the gradient of the optimal value with respect to the cost is
    the plan, so `(result.plan * cost).sum()` has that gradient.

    Args:
        cost: (n, m), finite.
        a: (n,) marginal of the rows, non-negative; zeros are allowed.
        b: (m,) marginal of the columns, with the sum of `a`.
        reg: weight of the entropy, positive, in the unit of the cost.
        tol: L1 error of the marginals, as a share of the mass, at which to stop.
        n_sinkhorn: most sweeps before the Newton steps of a stage; they end at a marginal error of 1e-4.
        max_newton: most Newton steps at `reg`; the stages before it have up to 8 each.
        density: share of the Hessian's (n + m)^2 entries that are kept in its two off-diagonal blocks, the largest ones
            of the plan, in (0, 1]; 1 is Newton's method. The paper's 2/n keeps 4 n entries of an n x n plan, counted in
            this way. (The paper does not say how it counts; of the plan's n^2 entries, 2/n would be too few.) By
            default as many are kept as every row and column needs for 99 % of its mass or more, more of them where
            steps fall short, and all where that would be more than a fifth of the plan's.
        cg_maxiter: most conjugate gradient steps for a Newton step.
        start_reg: regularisation of the warm-up's first stage; by default a tenth of the cost's range. With `reg` there
            is one stage, as in the paper.
        warm_start: potentials `(f, g)` of a similar problem, from which to start at `reg` itself. Only `f` matters.

    Raises:
        TypeError: an argument is no tensor or array of floating point numbers.
        ValueError: a shape, value or device does not fit, or the marginals' sums differ by more than one in a million.

    Warns:
        sklearn.exceptions.ConvergenceWarning: `tol` was not reached; the plan is returned all the same.

    Example:
        >>> cost = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
        >>> a, b = torch.full((50,), 1 / 50), torch.full((40,), 1 / 40)
        >>> result = sinkhorn_newton_sparse(cost, a, b, reg=1e-3)
        >>> result.converged, result.n_newton < 30
        (True, True)
        >>> torch.allclose(result.plan.sum(1), a)
        True
    """
    n_sinkhorn = integer("n_sinkhorn", n_sinkhorn, least=0)
    max_newton = integer("max_newton", max_newton, least=0)
    newton = _Newton(
        None if density is None else in_range("density", density, 0, 1, "right"), integer("cg_maxiter", cg_maxiter)
    )
    problem = TransportProblem.check(cost, a, b, reg, tol)
    if start_reg is not None and number("start_reg", start_reg) < problem.reg:
        raise ValueError(f"start_reg must be at least reg, {problem.reg:g}, got {start_reg}")

    if warm_start is not None:
        start_reg = problem.reg
    elif start_reg is None:
        start_reg = _START * float(problem.cost.max() - problem.cost.min())
    state = problem.start(reg=max(start_reg, problem.reg), warm_start=warm_start)
    tally = _Tally()
    goal = max(_STAGE_ERROR, tol)
    if state.reg > problem.reg or state.error > tol:
        warm_up(
            state, problem.reg, lambda: _stage(state, goal, n_sinkhorn, min(_STAGE_STEPS, max_newton), newton, tally)
        )
        newton.steps(state, tol, max_newton - tally.steps_at_reg, tally)

    plan, potentials = problem.give_back(state)
    if state.error > tol:
        warn_not_converged(
            f"sinkhorn_newton_sparse stopped after {tally.n_sinkhorn} sweeps and {tally.n_newton} Newton steps",
            state.error,
            tol,
        )
    return SinkhornNewtonSparseResult(
        plan=plan,
        potentials=potentials,
        cost=problem.transport_cost(state),
        n_sinkhorn=tally.n_sinkhorn,
        n_newton=tally.n_newton,
        errors=tuple(tally.errors),
        cg_iters=tally.cg_iters,
        n_evaluations=state.evaluations,
        density=tally.density,
        converged=state.error <= tol,
    )


class SparsePlan:
    """The entries of a plan that are kept, and products with them: sparse ones, or dense where that is faster.

    Args:
        plan: (n, m).
        kept: (n, m) booleans.

    Attributes:
        density: share of the Hessian's (n + m)^2 entries that they are; each stands there twice.
    """

    def __init__(self, plan: Float[Tensor, "n m"], kept: Tensor) -> None:
        n, m = plan.shape
        count = int(kept.sum())
        self.density = 2 * count / (n + m) ** 2
        sparse_products = plan.is_cuda or torch.backends.mkl.is_available()
        if count > _DENSE * n * m or not sparse_products:
            self._matrix = plan if count == n * m else plan.where(kept, 0.0)
            self._transposed = self._matrix.T
            return
        # One pass over the plan; sorting what was kept gives the transpose faster than torch's conversion does.
        flat = kept.flatten().nonzero().squeeze(1)
        values, rows, columns = plan.flatten()[flat], flat // m, flat % m
        order = columns.int().argsort(stable=True)
        self._matrix = _csr(rows, columns, values, (n, m))
        self._transposed = _csr(columns[order], rows[order], values[order], (m, n))

    def times(self, x: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """S x."""
        return self._matrix @ x

    def transposed_times(self, x: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """S^T x."""
        return self._transposed @ x

    def squares_times(self, x: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """(S * S) x, with the entrywise square."""
        if self._matrix.layout == torch.strided:
            return self._matrix.square() @ x
        squares = self._matrix.values().square()
        return (
            torch.sparse_csr_tensor(
                self._matrix.crow_indices(),
                self._matrix.col_indices(),
                squares,
                self._matrix.shape,
                check_invariants=False,
            )
            @ x
        )


def newton_direction(
    sparse: SparsePlan,
    row_sums: Float[Tensor, " n"],
    column_sums: Float[Tensor, " m"],
    residual: Float[Tensor, " n"],
    *,
    rtol: float = 1e-10,
    maxiter: int = 200,
) -> tuple[Float[Tensor, " n"], int]:
    r"""The step for `f`, in units of reg, where the column sums are right already.

    Eliminates $\Delta g = -D_b^{-1} S^\top \Delta f$ and solves
    $(D_a - S D_b^{-1} S^\top) \Delta f = a - P 1$ by conjugate gradients, preconditioned by the matrix's diagonal.

    Returns:
        The step, centred (the plan does not change along constants), and the number of conjugate gradient steps.
    """
    inverse = column_sums.reciprocal()
    diagonal = row_sums - sparse.squares_times(inverse)
    preconditioner = diagonal.clamp_min(1e-12 * row_sums).reciprocal()
    step, rest = torch.zeros_like(residual), residual.clone()
    scaled = preconditioner * rest
    search = scaled.clone()
    size = rest @ scaled
    goal = rtol**2 * float(size)
    products = 0
    while products < maxiter and float(size) > goal:
        image = row_sums * search - sparse.times(inverse * sparse.transposed_times(search))
        products += 1
        curvature = search @ image
        if not float(curvature) > 0:  # singular up to rounding: only a constant is left to search along
            break
        length = size / curvature
        step.add_(length * search)
        rest.sub_(length * image)
        scaled = preconditioner * rest
        previous, size = size, rest @ scaled
        search = scaled + (size / previous) * search
    return step - step.mean(), products


@dataclass
class _Tally:
    n_sinkhorn: int = 0
    n_newton: int = 0
    steps_at_reg: int = 0
    """Newton steps of the last stage's warm-up."""
    cg_iters: int = 0
    density: float = 0.0
    errors: list[float] = field(default_factory=list)

    def sweep(self, state: DualState, max_sweeps: int, tol: float, imbalance: float = math.inf) -> None:
        errors = state.sweep(max_sweeps, tol, imbalance)
        self.n_sinkhorn += len(errors)
        self.errors += errors


def _stage(state: DualState, goal: float, max_sweeps: int, max_steps: int, newton: _Newton, tally: _Tally) -> bool:
    """Sweeps and Newton steps until a stage can be left."""
    tally.errors.clear()
    before = tally.n_newton
    tally.sweep(state, max_sweeps, goal, _STAGE_IMBALANCE)
    newton.steps(state, goal, max_steps, tally, _STAGE_IMBALANCE)
    tally.steps_at_reg = tally.n_newton - before
    return state.error <= goal and state.imbalance <= _STAGE_IMBALANCE


@dataclass(frozen=True)
class _Newton:
    density: float | None
    cg_maxiter: int

    def steps(self, state: DualState, tol: float, max_steps: int, tally: _Tally, imbalance: float = math.inf) -> None:
        """Newton steps until the error is at most `tol` and no row is off by more than `imbalance`."""
        lost = _LOST_MASS
        for _ in range(max_steps):
            before = state.error
            if before <= tol and state.imbalance <= imbalance:
                return
            sparse = SparsePlan(state.plan, self._kept(state, lost))
            # Rows the plan has all but lost would take endless steps.
            row_sums = torch.maximum(state.a - state.residual, 1e-6 * state.a)
            # Accurate enough for quadratic convergence, and no more accurate than the goal needs.
            rtol = max(min(0.1, before), 0.1 * tol / before)
            step, products = newton_direction(
                sparse, row_sums, state.b, state.residual, rtol=rtol, maxiter=self.cg_maxiter
            )
            length = _line_search(state, step)
            tally.n_newton += 1
            tally.cg_iters += products
            tally.density = sparse.density
            tally.errors.append(state.error)
            if state.error > 0.1 * before:
                lost = max(0.1 * lost, 1e-16)
            if length < 0.5:
                tally.sweep(state, _RECOVERY_SWEEPS, tol, imbalance)

    def _kept(self, state: DualState, lost: float) -> Tensor:
        if self.density is not None:
            return largest_entries(state.plan, self.density)
        kept = mass_entries(state.plan, state.a, state.b, lost)
        if int(kept.sum()) > _DENSE * kept.numel():  # leaving entries out would save nothing
            return largest_entries(state.plan, 1.0)
        return kept


def _line_search(state: DualState, step: Tensor, max_trials: int = 15) -> float:
    """Moves along the step, without lowering the dual or passing its maximum by much; the length taken.

    A trial is kept if the dual has not fallen, beyond rounding, and its slope is above minus half of that at the start;
    the next one is where the two slopes put the maximum, and nearer if the dual has fallen, as far out it is nearly
    straight and the slopes say little. Slopes stay exact when differences of the dual drown in
    rounding.
    """
    f, value = state.f, state.value()
    slope = float(step @ state.residual)
    rounding = 1e-14 * float(state.a @ state.f.abs() + state.b @ state.g.abs())
    length = 1.0
    for _ in range(max_trials):
        state.move(f + length * step)
        now = float(step @ state.residual)
        risen = state.value() >= value - rounding
        if risen and now >= -0.5 * slope:
            return length
        shrink = slope / (slope - now) if now < slope else 0.0
        length *= min(max(shrink, 0.1), 0.7 if risen else 0.2)
    state.move(f)
    return 0.0


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix from its entries, in the order of rows."""
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32, device=rows.device)
    starts[1:] = rows.bincount(minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns.int(), values, size=shape, check_invariants=False)
