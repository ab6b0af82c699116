r"""Entropic optimal transport between two histograms by Sinkhorn's algorithm, safe at any regularisation.

$$
\min_{P \ge 0}\ \langle P, C \rangle + \varepsilon \sum_{ij} P_{ij} (\log P_{ij} - 1)
\quad\text{subject to}\quad P 1 = a,\ P^\top 1 = b
$$

The solution is $P_{ij} = \exp((f_i + g_j - C_{ij}) / \varepsilon)$ for the potentials that maximise the concave dual.

References:
    Marco Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS 2013, arXiv 1306.0895.
    Bernhard Schmitzer, "Stabilized Sparse Scaling Algorithms for Entropy Regularized Transport Problems", SIAM Journal
    on Scientific Computing 2019, arXiv 1610.06519: scaling sweeps on a kernel that absorbs the potentials.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, integer, positive, tensor

Array: TypeAlias = Tensor | NDArray[Any]

# Scalings beyond e^50 are absorbed into the potentials: what underflowed in the kernel could otherwise begin to matter.
_MAX_LOG_SCALING = 50.0
_SUM_TOLERANCE = 1e-6
# Exponents are kept above this: what they stand for, 1e-300, is nothing, but denormal numbers slow every product down.
_LEAST_EXPONENT = -690.0


@dataclass(frozen=True)
class SinkhornResult:
    """A transport plan and how it was reached. Arrays are of the kind, dtype and device of the cost that was given.

    Attributes:
        plan: (n, m), `exp((f[:, None] + g - cost) / reg)`.
        potentials: `(f, g)` of shapes (n,) and (m,); minus infinity where a marginal is zero.
        cost: the transport cost of the plan, without the entropy.
        n_iter: sweeps; one updates both potentials.
        errors: after each sweep, the L1 distance of the plan's row sums from `a`, as a share of the mass; its column
            sums are `b` up to rounding.
        converged: whether the final error is at most `tol`.
    """

    plan: Array
    potentials: tuple[Array, Array]
    cost: float
    n_iter: int
    errors: tuple[float, ...]
    converged: bool


@torch.no_grad()
def sinkhorn(
    cost: Float[Array, "n m"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    reg: float,
    *,
    tol: float = 1e-9,
    max_iter: int = 10_000,
    warm_start: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
) -> SinkhornResult:
    """Solves entropic optimal transport by Sinkhorn's algorithm.

    Sweeps are two matrix-vector products with a kernel into which the potentials are absorbed, and log-domain updates
    where the kernel's range is too small, so that any `reg` is safe and most sweeps are cheap. Computed in float64.

    No gradient flows through the result. At convergence the gradient of the optimal value with respect to the cost is
    the plan, so `(result.plan * cost).sum()` has that gradient.

    Args:
        cost: (n, m), finite.
        a: (n,) marginal of the rows, non-negative; zeros are allowed.
        b: (m,) marginal of the columns, with the sum of `a`.
        reg: weight of the entropy, positive, in the unit of the cost.
        tol: L1 error of the marginals, as a share of the mass, at which to stop.
        max_iter: most sweeps.
        warm_start: potentials `(f, g)` to start from; zero without them. Only `f` matters, as `g` follows from it.

    Raises:
        TypeError: an argument is no tensor or array of floating point numbers.
        ValueError: a shape, value or device does not fit, or the marginals' sums differ by more than one in a million.

    Warns:
        sklearn.exceptions.ConvergenceWarning: `tol` was not reached; the plan is returned all the same.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> result = sinkhorn(cost, torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75]), reg=0.1)
        >>> result.plan.sum(0)
        tensor([0.2500, 0.7500])
        >>> round(result.cost, 3)
        0.25
    """
    max_iter = integer("max_iter", max_iter)
    problem = TransportProblem.check(cost, a, b, reg, tol)
    state = problem.start(warm_start=warm_start)
    errors = state.sweep(max_iter, tol)
    plan, potentials = problem.give_back(state)
    if state.error > tol:
        warn_not_converged(f"sinkhorn stopped after {len(errors)} sweeps", state.error, tol)
    return SinkhornResult(
        plan, potentials, problem.transport_cost(state), len(errors), tuple(errors), state.error <= tol
    )


def warn_not_converged(what: str, error: float, tol: float) -> None:
    """Warns, at the caller's caller, that a solver stopped short of its tolerance."""
    from sklearn.exceptions import ConvergenceWarning

    warnings.warn(
        f"{what} at a marginal error of {error:.2e}, wanted {tol:.2e}; allow more iterations, a larger reg or a "
        "larger tol",
        ConvergenceWarning,
        stacklevel=4,  # past torch.no_grad's wrapper
    )


@dataclass(frozen=True)
class TransportProblem:
    """Checked input of a transport solver, in float64, of mass one, on the rows and columns that have mass."""

    cost: Tensor
    a: Tensor
    b: Tensor
    reg: float
    mass: float
    rows: Tensor
    columns: Tensor
    given: Array

    @classmethod
    def check(cls, cost: Array, a: Array, b: Array, reg: float, tol: float) -> TransportProblem:
        """Reads the arguments of a solver.

        Raises:
            TypeError: an argument is no tensor or array of floating point numbers.
            ValueError: a shape, value or device does not fit, or the marginals' sums differ.
        """
        reg = positive("reg", reg)
        positive("tol", tol)
        costs = _read("cost", cost)
        rows, columns = (_read(name, value, ndim=1) for name, value in (("a", a), ("b", b)))
        if costs.ndim != 2 or 0 in costs.shape:
            raise ValueError(f"cost must be a non-empty matrix, got shape {tuple(costs.shape)}")
        for name, marginal, size in (("a", rows, costs.shape[0]), ("b", columns, costs.shape[1])):
            if marginal.shape != (size,):
                raise ValueError(
                    f"{name} must have shape ({size},) for a cost of shape {tuple(costs.shape)}, "
                    f"got {tuple(marginal.shape)}"
                )
            if marginal.device != costs.device:
                raise ValueError(f"{name} must be on {costs.device} as cost, got {marginal.device}")
            if marginal.min() < 0:
                raise ValueError(f"{name} must be at least 0 everywhere, got {float(marginal.min()):g}")
            if marginal.max() <= 0:
                raise ValueError(f"{name} must have mass, got zeros only")
        mass, other = float(rows.sum()), float(columns.sum())
        if abs(mass - other) > _SUM_TOLERANCE * max(mass, other):
            raise ValueError(f"a and b must have the same sum, got {mass:#.9g} and {other:#.9g}")
        with_row, with_column = rows > 0, columns > 0
        if not (with_row.all() and with_column.all()):
            costs, rows, columns = costs[with_row][:, with_column], rows[with_row], columns[with_column]
        return cls(costs.contiguous(), rows / mass, columns / other, reg, mass, with_row, with_column, cost)

    def start(self, *, reg: float | None = None, warm_start: tuple[Array, Array] | None = None) -> DualState:
        """A state at zero potentials, or at those of an earlier solution.

        Raises:
            TypeError: `warm_start` is not made of floating point numbers.
            ValueError: `warm_start` has the wrong shape, or is not finite where there is mass.
        """
        reg = self.reg if reg is None else reg
        if warm_start is None:
            return DualState(self.cost, self.a, self.b, reg, torch.zeros_like(self.a))
        f = _read("warm_start[0]", warm_start[0], finite=False)
        if f.shape != self.rows.shape:
            raise ValueError(f"warm_start[0] must have shape {tuple(self.rows.shape)}, got {tuple(f.shape)}")
        f = f.to(self.cost.device)[self.rows]
        if not f.isfinite().all():
            raise ValueError("warm_start[0] must be finite where a has mass, got NaN or infinity")
        return DualState(self.cost, self.a, self.b, reg, f / reg)

    def give_back(self, state: DualState) -> tuple[Array, tuple[Array, Array]]:
        """Plan and potentials in the kind, dtype and size that were given."""
        plan = state.plan * self.mass
        f, g = state.reg * (state.f + math.log(self.mass)), state.reg * state.g
        if not (self.rows.all() and self.columns.all()):
            whole = plan.new_zeros(len(self.rows), len(self.columns))
            whole[self.rows.nonzero(), self.columns.nonzero().T] = plan
            plan = whole
            f = f.new_full(self.rows.shape, -math.inf).masked_scatter(self.rows, f)
            g = g.new_full(self.columns.shape, -math.inf).masked_scatter(self.columns, g)
        return self._like_given(plan), (self._like_given(f), self._like_given(g))

    def transport_cost(self, state: DualState) -> float:
        """The transport cost of the state's plan."""
        return self.mass * float(torch.vdot(state.plan.flatten(), self.cost.flatten()))

    def _like_given(self, value: Tensor) -> Array:
        if isinstance(self.given, Tensor):
            return value.to(self.given.dtype)
        return value.numpy().astype(self.given.dtype, copy=False)


class DualState:
    """Potentials whose plan has the right column sums, and the moves that improve its row sums.

    Everything is in place on one plan-sized buffer, and potentials are in units of `reg`.

    Attributes:
        f, g: potentials; `g` is always the maximiser of the dual for `f`.
        plan: `exp(f[:, None] + g - cost / reg)`, whose columns sum to `b`.
        residual: `a` less the row sums of the plan, the gradient of the dual with `g` maximised out.
        error: L1 norm of the residual.
        evaluations: how often the plan has been computed from potentials, each an exponential of n x m numbers.
    """

    def __init__(self, cost: Tensor, a: Tensor, b: Tensor, reg: float, f: Tensor) -> None:
        self.cost, self.a, self.b, self.reg = cost, a, b, reg
        self._log_a, self._log_b = a.log(), b.log()
        self._scaled_cost = cost / reg
        self.plan = torch.empty_like(cost)
        self.evaluations = 0
        self.move(f)

    def move(self, f: Tensor) -> None:
        """Goes to `f` and the `g` that maximises the dual there (half a sweep, in the log domain)."""
        torch.sub(f[:, None], self._scaled_cost, out=self.plan)
        peak = self.plan.amax(0)
        total = self.plan.sub_(peak).clamp_min_(_LEAST_EXPONENT).exp_().sum(0)
        self.plan.mul_(self.b / total)
        self.f, self.g = f, self._log_b - peak - total.log()
        self.residual = self.a - self.plan.sum(1)
        self.error = float(self.residual.abs().sum())
        self.evaluations += 1

    def rescale(self, reg: float, f: Tensor) -> None:
        """Goes to another regularisation and to potentials `f`, which are in the unit of the cost here."""
        torch.div(self.cost, reg, out=self._scaled_cost)
        self.reg = reg
        self.move(f / reg)

    def value(self) -> float:
        """The dual's value, in units of `reg` and up to a constant."""
        return float(self.a @ self.f + self.b @ self.g)

    @property
    def imbalance(self) -> float:
        """The largest factor by which a row's mass is off, up or down, as a logarithm.

        The error says nothing of rows with little mass; this does.
        """
        return float((1 - self.residual / self.a).log().abs().max())

    def sweep(self, max_sweeps: int, tol: float, imbalance: float = math.inf) -> list[float]:
        """Makes sweeps until the error is at most `tol` and no row is off by more than `imbalance`.

        Returns:
            The error after each.
        """
        errors: list[float] = []
        while len(errors) < max_sweeps and not (self.error <= tol and self.imbalance <= imbalance):
            errors += self._kernel_sweeps(max_sweeps - len(errors), tol, imbalance) or [self._log_sweep()]
        return errors

    def _kernel_sweeps(self, max_sweeps: int, tol: float, imbalance: float) -> list[float]:
        """Scales the plan's rows and columns for as long as the scalings stay moderate."""
        errors: list[float] = []
        u, v, row_sums = torch.ones_like(self.a), torch.ones_like(self.b), self.a - self.residual
        while len(errors) < max_sweeps:
            next_u = self.a / row_sums
            next_v = self.b / (next_u @ self.plan)
            largest = torch.cat([next_u, next_v]).log_().abs_().max()
            if not float(largest) < _MAX_LOG_SCALING:
                break
            u, v = next_u, next_v
            row_sums = self.plan @ v
            found = u * row_sums
            errors.append(float((self.a - found).abs().sum()))
            if errors[-1] <= tol and (imbalance == math.inf or float((found / self.a).log().abs().max()) <= imbalance):
                break
        if errors:
            self.move(self.f + u.log())
        return errors

    def _log_sweep(self) -> float:
        torch.sub(self.g, self._scaled_cost, out=self.plan)
        peak = self.plan.amax(1)
        total = self.plan.sub_(peak[:, None]).clamp_min_(_LEAST_EXPONENT).exp_().sum(1)
        self.evaluations += 1
        self.move(self._log_a - peak - total.log())
        return self.error


def _read(name: str, value: Array, *, ndim: int | None = None, finite: bool = True) -> Tensor:
    reader = finite_tensor if finite else tensor
    return reader(name, value, ndim=ndim, floating=True).detach().double()
