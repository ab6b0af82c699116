r"""Optimal transport whose plan has at most k non-zero entries in every column.

Reach for it where a plan is carried out entry by entry and every column can take only so many: tokens sent to experts
of fixed capacity, say (`SparseRouter`). With k = 1 it is unregularised transport, with k as large as the number of rows
it is transport with a squared penalty; the larger k, the smoother and easier the problem.

With the columns $t_j$ of the plan and $c_j$ of the cost, and $\Delta^k_b$ the non-negative vectors of sum $b$ with at
most k non-zeros, the dual and the semi-dual are concave, and their terms need only the k largest entries of a column:

$$
\max_{\alpha, \beta}\ \alpha^\top a + \beta^\top b
- \frac{1}{2\gamma} \sum_j \sum_{i \in \mathrm{top}_k} [\alpha_i + \beta_j - C_{ij}]_+^2,
\qquad
\max_\alpha\ \alpha^\top a
- \sum_j \max_{t \in \Delta^k_{b_j}} (\alpha - c_j)^\top t - \frac{\gamma}{2} \lVert t \rVert^2
$$

Their optimum is that of the convex problem that replaces $\lVert t_j \rVert^2$ by the squared k-support norm, whose
value at a plan with the right marginals bounds it from above: the duality gap reported here.

Reference:
    Tianlin Liu, Joan Puigcerver and Mathieu Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv
    2209.15466.

The paper maximises either dual by L-BFGS or Adam. Both have kinks where entries tie for the k-th place, and for small k
the optimum lies on kinks, where L-BFGS stops short. What is left is then closed by the proximal point method on the
convex problem: a few problems with $\frac{\delta}{2} \lVert T - T' \rVert^2$ added, for the last plan $T'$, whose duals
have no kinks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.ops.sinkhorn import Array, TransportProblem
from trimtab.ops.topk_simplex import top_entries_on_simplex

Form = Literal["semidual", "dual"]

_CHECK_EVERY = 10  # iterations of L-BFGS between two looks at the duality gap
_PATIENCE = 30  # iterations in which the dual must rise by as much as the tolerance
_MEMORY = 20  # pairs that L-BFGS keeps
_SPREAD = 0.1  # share of the costs' range over which the first proximal term spreads a column
_WEAKEST = 0.03  # least proximal weight, as a share of the first; each is half of the one before
_INNER_STEPS = 100


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
        gap: how far the relaxed problem's value at `relaxed` is above `value`, as a share of the larger one; no better
            plan can be further below.
        row_error: the L1 distance of the row sums of `plan` from `a`, as a share of the mass. It stays above zero
            where no plan with k non-zeros a column solves the relaxed problem, however small the gap.
        n_iter: iterations of L-BFGS.
        n_proximal: proximal steps after that.
        n_evaluations: how often a dual was computed, in both.
        values: the dual's value at zero potentials and after each iteration of L-BFGS.
        errors: the row error of the sparse plan there.
        converged: whether `gap` is at most `tol`.
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
        sklearn.exceptions.ConvergenceWarning: the gap is above `tol`; the plan is returned all the same.

    Example:
        >>> cost = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
        >>> a, b = torch.full((50,), 1 / 50), torch.full((40,), 1 / 40)
        >>> result = sparse_transport(cost, a, b, reg=1.0, k=3)
        >>> result.converged, int((result.plan > 0).sum(0).max())
        (True, 3)
        >>> torch.allclose(result.plan.sum(0), b)
        True
    """
    problem = TransportProblem.check(cost, a, b, reg, tol)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not k >= 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {', '.join(map(repr, get_args(Form)))}, got {form!r}")
    for name, limit in (("max_iter", max_iter), ("max_proximal", max_proximal)):
        if limit < 0:
            raise ValueError(f"{name} must not be negative, got {limit}")
    solution = _solve(problem, k, form, tol, max_iter, max_proximal)
    if solution.gap > tol:
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"sparse_transport stopped after {len(solution.values) - 1} iterations of L-BFGS and {solution.n_proximal} "
            f"proximal steps at a duality gap of {solution.gap:.2e}, wanted {tol:.2e}; allow more of them or a larger "
            "reg, k or tol",
            ConvergenceWarning,
            stacklevel=3,  # past torch.no_grad's wrapper
        )
    return _given_back(problem, solution, tol)


def column_plans(
    scores: Float[Tensor, "m n"], b: Float[Tensor, " m"], reg: float, k: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m n"]]:
    r"""The semi-dual's terms: $\max_{t \in \Delta^k_{b_j}} s_j^\top t - \frac{\gamma}{2} \lVert t \rVert^2$.

    Args:
        scores: (m, n), one row for each column of the plan, $\alpha - c_j$.
        b: (m,) masses, positive.
        reg: $\gamma$.
        k: most non-zeros.

    Returns:
        The values (m,) and the maximisers (m, n), a subgradient of their sum.

    Example:
        >>> values, plans = column_plans(torch.tensor([[1.0, 2.0, 0.0]]), torch.ones(1), reg=2.0, k=2)
        >>> values, plans
        (tensor([1.1250]), tensor([[0.2500, 0.7500, 0.0000]]))
    """
    shares, index = top_entries_on_simplex(scores / (reg * b[:, None]), k)
    t = b[:, None] * shares
    values = (scores.gather(1, index) * t).sum(1) - reg / 2 * t.square().sum(1)
    return values, torch.zeros_like(scores).scatter_(1, index, t)


def positive_parts(
    scores: Float[Tensor, "m n"], reg: float, k: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m n"]]:
    r"""The dual's terms: $\max_{t \ge 0, \lVert t \rVert_0 \le k} s_j^\top t - \frac{\gamma}{2} \lVert t \rVert^2$.

    As `column_plans`, for columns whose mass is free.

    Example:
        >>> positive_parts(torch.tensor([[1.0, 2.0, 0.5, -1.0]]), reg=2.0, k=2)
        (tensor([1.2500]), tensor([[0.5000, 1.0000, 0.0000, 0.0000]]))
    """
    top, index = scores.topk(k, dim=1)
    top = top.clamp_min(0)
    return top.square().sum(1) / (2 * reg), torch.zeros_like(scores).scatter_(1, index, top / reg)


def squared_k_support_norm(t: Float[Tensor, "m n"], k: int) -> Float[Tensor, " m"]:
    r"""The square of the k-support norm of each row, the convex hull of $\lVert t \rVert^2$ on k non-zeros.

    It is the least $\sum_i t_i^2 / \theta_i$ over $0 \le \theta \le 1$ with $\sum_i \theta_i \le k$ (Argyriou, Foygel
    and Srebro, "Sparse Prediction with the k-Support Norm", NeurIPS 2012): the largest entries have $\theta = 1$ and
    the others share what is left in proportion.

    Example:
        >>> squared_k_support_norm(torch.tensor([[3.0, 1.0, 1.0]]), k=2)  # 3² + (1 + 1)²
        tensor([13.])
        >>> squared_k_support_norm(torch.tensor([[3.0, 1.0, 1.0]]), k=1)  # (3 + 1 + 1)²
        tensor([25.])
    """
    size = t.abs()
    total, top = size.sum(1, keepdim=True), size.topk(k, dim=1).values
    # With 0 .. k-1 entries taken whole, the others, `tail` in sum, share k .. 1.
    whole = top.square().cumsum(1) - top.square()
    tail = (total - top.cumsum(1) + top).clamp_min(0)
    left = torch.arange(k, 0, -1, device=t.device)
    allowed = top * left <= tail + 16 * torch.finfo(t.dtype).eps * total
    return (whole + tail.square() / left).masked_fill(~allowed, math.inf).amin(1)


def smooth_positive_parts(
    scores: Float[Tensor, "m n"], reg: float, k: int, smoothing: float
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m n"]]:
    r"""The dual's terms made smooth: $\max_{t \ge 0} s^\top t - \frac{\gamma}{2} \lVert t \rVert^2_{(k)} -
    \frac{\delta}{2} \lVert t \rVert^2$, with the k-support norm.

    Its maximiser takes the largest entries whole, $s_i / (\gamma + \delta)$, and those about the k-th place in part,
    $(s_i - \gamma \kappa) / \delta$, with $\kappa$ such that the parts, $\theta_i = (s_i / \kappa - \gamma) / \delta$
    in [0, 1], sum to k.

    Returns:
        The values (m,) and the maximisers (m, n), the gradient of their sum.

    Example:
        >>> smooth_positive_parts(torch.tensor([[2.0, 2.0, 0.5]]), reg=1.0, k=1, smoothing=1.0)[1]  # half of each
        tensor([[0.6667, 0.6667, 0.0000]])
    """
    positive = scores.clamp_min(0)
    whole, part = positive > 0, torch.zeros_like(scores, dtype=torch.bool)
    kappa = torch.zeros_like(scores[:, :1])
    crowded = (whole.sum(1) > k).nonzero().squeeze(1)
    if len(crowded):
        s = positive[crowded]
        kappa[crowded] = _tie_level(s, reg, k, smoothing)
        level = kappa[crowded]
        whole[crowded] = s >= level * (reg + smoothing)
        part[crowded] = (s > level * reg) & ~whole[crowded]
    t = torch.where(whole, positive / (reg + smoothing), 0.0)
    t = torch.where(part, (positive - reg * kappa) / smoothing, t)
    norm = torch.where(whole, t.square(), kappa * t).sum(1)
    values = (positive * t).sum(1) - reg / 2 * norm - smoothing / 2 * t.square().sum(1)
    return values, t


def _tie_level(s: Tensor, reg: float, k: int, smoothing: float) -> Tensor:
    """The level kappa, (rows, 1), at which the parts of a row's entries sum to k; rows have more than k positive ones.

    In 1/kappa the sum is piecewise linear: Newton's method, kept within a bracket, ends on the right piece.
    """
    top = s.topk(k + 1, dim=1).values
    first, last = (reg + smoothing) / top[:, k - 1 : k], reg / top[:, k:]  # the k-th is whole; the next takes no part
    lower, upper = torch.minimum(first, last), torch.maximum(first, last)
    u = lower
    for _ in range(100):
        parts = ((s * u - reg) / smoothing).clamp_(0, 1)
        excess = parts.sum(1, keepdim=True) - k
        lower, upper = torch.where(excess < 0, u, lower), torch.where(excess < 0, upper, u)
        done = (excess.abs() <= 1e-13 * k) | (upper - lower <= 4e-16 * upper)
        if bool(done.all()):
            break
        whole, partly = parts >= 1, (parts > 0) & (parts < 1)
        taken = smoothing * (k - whole.sum(1, keepdim=True)) + reg * partly.sum(1, keepdim=True)
        newton = taken / (s * partly).sum(1, keepdim=True)  # no number where no entry takes part
        strictly_inside = (newton > lower) & (newton < upper)
        u = torch.where(done, u, torch.where(strictly_inside, newton, (lower + upper) / 2))
    return u.reciprocal()


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


class _Relaxation:
    """The convex problem whose dual is solved, its plans transposed: one row for each column of the plan."""

    def __init__(self, problem: TransportProblem, k: int) -> None:
        self.cost = problem.cost.T.contiguous()
        self.a, self.b = problem.a, problem.b
        self.reg = problem.reg * problem.mass  # for plans of mass one
        self.k = min(k, len(self.a))

    def semidual(self, f: Tensor) -> tuple[float, Tensor]:
        """Its value at `f` and the sparse plan there, with the right column sums."""
        values, plan = column_plans(f - self.cost, self.b, self.reg, self.k)
        return float(self.a @ f - values.sum()), plan

    def dual(self, f: Tensor, g: Tensor) -> tuple[float, Tensor]:
        """Its value at potentials and the sparse plan there."""
        values, plan = positive_parts(f + g[:, None] - self.cost, self.reg, self.k)
        return float(self.a @ f + self.b @ g - values.sum()), plan

    def best_columns(self, f: Tensor) -> Tensor:
        """The `g` that maximises the dual for `f`: it leaves the largest entry of a column its share."""
        scores = f - self.cost
        _, plan = column_plans(scores, self.b, self.reg, self.k)
        share, index = plan.max(1)
        return self.reg * share - scores.gather(1, index[:, None]).squeeze(1)

    def feasible(self, plan: Tensor) -> Tensor:
        """A plan with both marginals near the given one.

        From Altschuler, Weed and Rigollet, "Near-linear time approximation algorithms for optimal transport via
        Sinkhorn iteration", NeurIPS 2017: what is too much is scaled down, what is missing is spread.
        """
        plan = plan * _cut(self.a, plan.sum(0))
        plan = plan * _cut(self.b, plan.sum(1))[:, None]
        rows, columns = (self.a - plan.sum(0)).clamp_min(0), (self.b - plan.sum(1)).clamp_min(0)
        missing = rows.sum()
        return torch.addr(plan, columns, rows / missing) if float(missing) > 0 else plan

    def value(self, plan: Tensor) -> float:
        """Of the relaxed problem at a feasible plan: an upper bound of its optimum."""
        penalty = squared_k_support_norm(plan, self.k).sum()
        return float((self.cost * plan).sum() + self.reg / 2 * penalty)

    def error(self, plan: Tensor) -> float:
        """L1 distance of a plan's row sums from the marginal."""
        return float((self.a - plan.sum(0)).abs().sum())

    def sparsest(self, f: Tensor, relaxed: Tensor) -> Tensor:
        """The sparse plan at `f` which, where entries tie for the k-th place, keeps those that `relaxed` uses most."""
        index = relaxed.topk(self.k, dim=1).indices
        scores = (f - self.cost).gather(1, index)
        shares, order = top_entries_on_simplex(scores / (self.reg * self.b[:, None]), self.k)
        return torch.zeros_like(relaxed).scatter_(1, index.gather(1, order), self.b[:, None] * shares)


def _cut(wanted: Tensor, found: Tensor) -> Tensor:
    return (wanted / found.clamp_min(torch.finfo(found.dtype).tiny)).clamp_max(1)


def _gap(upper: float, lower: float) -> float:
    """Of a value known to be between the two, as a share of it."""
    scale = max(abs(upper), abs(lower))
    return max(upper - lower, 0.0) / scale if scale > 0 else 0.0


def _solve(problem: TransportProblem, k: int, form: Form, tol: float, max_iter: int, max_proximal: int) -> _Solution:
    relaxation = _Relaxation(problem, k)
    f, values, errors, evaluations = _lbfgs_on_dual(relaxation, form, tol, max_iter)
    value, plan = relaxation.semidual(f)
    relaxed = relaxation.feasible(plan)
    upper = relaxation.value(relaxed)
    steps = 0
    if _gap(upper, value) > tol:
        for f_now, plan_now, tried in _proximal_steps(relaxation, f, max_proximal):
            steps += 1
            evaluations += tried
            value_now, _ = relaxation.semidual(f_now)
            relaxed_now = relaxation.feasible(plan_now)
            upper_now = relaxation.value(relaxed_now)
            if value_now > value:
                f, value = f_now, value_now
            if upper_now < upper:
                relaxed, upper = relaxed_now, upper_now
            if _gap(upper, value) <= tol:
                break
    if steps:
        plan = min(relaxation.semidual(f)[1], relaxation.sparsest(f, relaxed), key=relaxation.error)
    gap = _gap(upper, value)
    return _Solution(
        f,
        relaxation.best_columns(f),
        plan,
        relaxed,
        value,
        gap,
        values,
        errors,
        n_proximal=steps,
        n_evaluations=evaluations,
    )


def _lbfgs_on_dual(
    relaxation: _Relaxation, form: Form, tol: float, max_iter: int
) -> tuple[Tensor, list[float], list[float], int]:
    """L-BFGS on one of the duals until the gap is closed or it rises no more.

    Returns:
        The rows' potentials, the dual's value and the error of the rows after each iteration, and how often the dual
        was computed.
    """
    a, b = relaxation.a, relaxation.b
    n = len(a)
    last: dict[bytes, tuple[float, Tensor]] = {}
    values: list[float] = []
    errors: list[float] = []

    def look(z: Tensor) -> tuple[float, Tensor]:
        value, plan = relaxation.semidual(z) if form == "semidual" else relaxation.dual(z[:n], z[n:])
        last.clear()
        last[z.cpu().numpy().tobytes()] = value, plan
        slope = a - plan.sum(0)
        return value, slope if form == "semidual" else torch.cat([slope, b - plan.sum(1)])

    def note(z: Tensor) -> tuple[float, Tensor]:
        key = z.cpu().numpy().tobytes()
        if key not in last:
            look(z)
        values.append(last[key][0])
        errors.append(relaxation.error(last[key][1]))
        return last[key]

    def after_iteration(z: Tensor) -> None:
        value, plan = note(z)
        if len(values) % _CHECK_EVERY == 0:
            if form == "dual":
                value, plan = relaxation.semidual(z[:n])
            if _gap(relaxation.value(relaxation.feasible(plan)), value) <= tol:
                raise StopIteration
            if len(values) > _PATIENCE and values[-1] - values[-1 - _PATIENCE] <= tol * abs(values[-1]):
                raise StopIteration

    start = a.new_zeros(n if form == "semidual" else n + len(b))
    note(start)
    z, evaluations = _ascend(look, start, max_iter, after_iteration=after_iteration)
    return z[:n], values, errors, 1 + evaluations


def _proximal_steps(relaxation: _Relaxation, f: Tensor, max_steps: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """The proximal point method from the sparse plan at `f`: potentials of the rows, a plan, evaluations taken."""
    a, b, reg, k = relaxation.a, relaxation.b, relaxation.reg, relaxation.k
    n = len(a)
    _, plan = relaxation.semidual(f)
    z = torch.cat([f, relaxation.best_columns(f)])
    span = float(relaxation.cost.max() - relaxation.cost.min())
    first = max(reg, _SPREAD * span / float(b.max()))
    for i in range(max_steps):
        weight = first * max(0.5**i, _WEAKEST)

        def look(z: Tensor, weight: float = weight, centre: Tensor = plan) -> tuple[float, Tensor]:
            scores = z[:n] + z[n:, None] - relaxation.cost + weight * centre
            values, plan = smooth_positive_parts(scores, reg, k, weight)
            slope = torch.cat([a - plan.sum(0), b - plan.sum(1)])
            return float(a @ z[:n] + b @ z[n:] - values.sum()), slope

        z, evaluations = _ascend(look, z, _INNER_STEPS, gtol=1e-3 * 0.5**i / n)
        scores = z[:n] + z[n:, None] - relaxation.cost + weight * plan
        plan = smooth_positive_parts(scores, reg, k, weight)[1]
        yield z[:n], plan, evaluations


def _ascend(
    look: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    max_iter: int,
    *,
    gtol: float = 0.0,
    after_iteration: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, int]:
    """Maximises a concave function, given as value and gradient, by SciPy's L-BFGS: where it ended, evaluations."""
    from scipy.optimize import minimize

    if max_iter == 0:
        return start, 0

    def read(x: np.ndarray) -> Tensor:
        return torch.as_tensor(x.copy()).to(start.device)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = look(read(x))
        return -value, -slope.cpu().numpy()

    found = minimize(
        loss,
        start.cpu().numpy(),
        method="L-BFGS-B",
        jac=True,
        callback=None if after_iteration is None else lambda x: after_iteration(read(x)),
        options={"maxiter": max_iter, "maxfun": 20 * max_iter, "maxcor": _MEMORY, "ftol": 0.0, "gtol": gtol},
    )
    return read(found.x), int(found.nfev)


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

    return SparseTransportResult(
        plan=whole_plan(solution.plan),
        relaxed=whole_plan(solution.relaxed),
        potentials=(whole_potential(solution.f, rows), whole_potential(solution.g, columns)),
        cost=problem.mass * float((solution.plan * problem.cost.T).sum()),
        value=problem.mass * solution.value,
        gap=solution.gap,
        row_error=float((problem.a - solution.plan.sum(0)).abs().sum()),
        n_iter=len(solution.values) - 1,
        n_proximal=solution.n_proximal,
        n_evaluations=solution.n_evaluations,
        values=tuple(problem.mass * value for value in solution.values),
        errors=tuple(solution.errors),
        converged=solution.gap <= tol,
    )


class _Plan(torch.autograd.Function):
    """The sparse plan of a cost, with its derivative."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, solve: Callable[[Tensor], Tensor], reg: float) -> Tensor:
        plan = solve(cost.detach())
        ctx.save_for_backward(plan)
        ctx.reg = reg
        return plan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (plan,) = ctx.saved_tensors
        return -project_on_face(grads[0], plan > 0) / ctx.reg, None, None


def project_on_face(direction: Float[Tensor, "n m"], support: Bool[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The nearest matrix that is zero off the support and has row and column sums of zero.

    The change of a plan, whose marginals are fixed, with the cost is minus the change of the cost so projected, over
    `reg`; being symmetric, the same map takes gradients back.

    Example:
        >>> project_on_face(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.ones(2, 2, dtype=torch.bool))
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    if support.shape[0] < support.shape[1]:  # the system to solve is as large as the number of columns
        return project_on_face(direction.T, support.T).T
    mask = support.double()
    inside = direction.double() * mask
    per_row = mask.sum(1).clamp_min(1)
    scaled = mask / per_row[:, None]
    # Centring the rows leaves the columns' normal equations, with the rows eliminated.
    matrix = mask.sum(0).diag() - mask.T @ scaled
    centred = inside - scaled * inside.sum(1, keepdim=True)
    v = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ centred.sum(0)
    u = (inside.sum(1) - mask @ v) / per_row
    projected: Tensor = inside - mask * (u[:, None] + v)
    return projected.to(direction.dtype)


def sparse_plan(
    cost: Float[Tensor, "n m"],
    a: Float[Tensor, " n"],
    b: Float[Tensor, " m"],
    reg: float,
    k: int,
    *,
    form: Form = "semidual",
    tol: float = 1e-6,
    max_iter: int = 1000,
    max_proximal: int = 50,
) -> Float[Tensor, "n m"]:
    """The plan of `sparse_transport`, through which gradients flow to the cost.

    By implicit differentiation: away from ties, a small change of the cost leaves the plan's support as it is, and the
    plan moves within the matrices on that support that keep both marginals. No warning is given where the gap stays
    above `tol`: at the kinks of small k it is a surrogate gradient. Arguments and errors as for `sparse_transport`.

    Example:
        >>> cost = torch.tensor([[0.0, 0.3], [0.2, 0.0]], requires_grad=True)
        >>> half = torch.tensor([0.5, 0.5])
        >>> plan = sparse_plan(cost, half, half, reg=1.0, k=2)
        >>> plan
        tensor([[0.3750, 0.1250],
                [0.1250, 0.3750]], grad_fn=<_PlanBackward>)
        >>> plan[0, 0].backward()
        >>> cost.grad
        tensor([[-0.2500,  0.2500],
                [ 0.2500, -0.2500]])
    """

    def solve(cost: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="sparse_transport stopped")
            result = sparse_transport(
                cost, a, b, reg, k, form=form, tol=tol, max_iter=max_iter, max_proximal=max_proximal
            )
        return torch.as_tensor(result.plan)

    return cast(Tensor, _Plan.apply(cost, solve, reg))  # type: ignore[no-untyped-call]


class SparseRouter(nn.Module):
    """Routes the tokens of a batch to experts of limited capacity by sparsity-constrained transport (Section 6).

    Every expert takes the same mass in at most k tokens, so that none overflows. Every token has the same mass to give,
    up to the row error of a small k: no token is dropped where capacities allow.

    Args:
        reg: weight of the squared penalty on the routing weights, positive, in the unit of the scores: a token is
            divided between experts whose scores (with the potentials that balance the loads) differ by less.
        k: most tokens an expert takes; None takes `capacity_factor` times its share of the batch, rounded up.
        capacity_factor: used where `k` is None; at least 1, so that all tokens fit.
        tol, max_iter, max_proximal: see `sparse_transport`.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> weights = SparseRouter(reg=0.5)(scores)
        >>> weights.shape, int((weights > 0).sum(0).max())
        (torch.Size([64, 4]), 16)
    """

    def __init__(
        self,
        reg: float = 1.0,
        *,
        k: int | None = None,
        capacity_factor: float = 1.0,
        tol: float = 1e-3,
        max_iter: int = 100,
        max_proximal: int = 0,
    ) -> None:
        super().__init__()
        if not (math.isfinite(reg) and reg > 0):
            raise ValueError(f"reg must be a positive number, got {reg}")
        if k is not None and k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not capacity_factor >= 1:
            raise ValueError(f"capacity_factor must be at least 1, got {capacity_factor}")
        self.reg, self.k, self.capacity_factor = reg, k, capacity_factor
        self.tol, self.max_iter, self.max_proximal = tol, max_iter, max_proximal

    def capacity(self, tokens: int, experts: int) -> int:
        """Most tokens that an expert takes of a batch."""
        return min(tokens, self.k or math.ceil(self.capacity_factor * tokens / experts))

    def forward(self, scores: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        """Routing weights: rows sum to about 1, columns to tokens / experts, at most k non-zeros in a column.

        Gradients flow to the scores where tokens are divided. Where each token has one expert its weight is 1 and has
        no gradient; multiply by gates, such as a softmax of the scores, as mixtures with hard routing do.

        Raises:
            ValueError: `scores` is not a finite, non-empty matrix.
        """
        if scores.ndim != 2 or 0 in scores.shape:
            raise ValueError(f"scores must be a non-empty matrix (tokens, experts), got shape {tuple(scores.shape)}")
        tokens, experts = scores.shape
        a, b = scores.new_full((tokens,), 1 / tokens), scores.new_full((experts,), 1 / experts)
        plan = sparse_plan(
            -scores,
            a,
            b,
            self.reg * tokens,
            self.capacity(tokens, experts),
            tol=self.tol,
            max_iter=self.max_iter,
            max_proximal=self.max_proximal,
        )
        return tokens * plan

    def extra_repr(self) -> str:
        return f"reg={self.reg}, k={self.k}, capacity_factor={self.capacity_factor}"
