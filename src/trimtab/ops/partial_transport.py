r"""Partial entropic transport: every row may send its mass or keep it, and columns only lean towards equal size.

$$
\min_{Q \ge 0}\ \langle Q, C \rangle + \gamma\, \mathrm{KL}\bigl(Q^\top 1 \,\big\|\, \tfrac{\rho}{K} 1\bigr)
+ \varepsilon \sum_{ij} \bar Q_{ij} (\log \bar Q_{ij} - 1)
\quad\text{subject to}\quad Q 1 \le \tfrac1N 1,\ \ 1^\top Q 1 = \rho
$$

A virtual column of cost zero takes what is kept, $1 - \rho$ in all; $\bar Q = [Q, \xi]$ is the plan with it, of which
the rows sum to $1/N$. Then scaling solves it, with an exponent on the columns that may miss their size,

$$
u = \frac{1/N}{M v + w}, \qquad v_k = \Bigl(\frac{\rho / K}{(M^\top u)_k}\Bigr)^{\gamma / (\gamma + \varepsilon)},
\qquad M = e^{-C / \varepsilon},
$$

where $w$, the scaling of the virtual column, is found together with $u$ from what is moved in all, an equation in one
unknown. So the mass and the rows are right after every sweep, and a factor common to all scalings, by which plain
scaling converges slowest, plays no part.

With $\gamma = \infty$ the columns have equal size, with $\rho = 1$ every row sends all: both together are plain
entropic transport, and $\rho = 1$ alone is unbalanced transport that is strict about its rows.

Reference: Chizat, Peyré, Schmitzer and Vialard, "Scaling Algorithms for Unbalanced Transport Problems", 2016, arXiv
1607.05816; with the virtual column of Zhang, Ren and He, "P2OT: Progressive Partial Optimal Transport for Deep
Imbalanced Clustering", ICLR 2024, arXiv 2401.09266.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, in_range, integer, number, positive
from trimtab.ops.sinkhorn import Array

# Scalings beyond e^50 are absorbed into the kernel, where what had underflowed can come back.
_MAX_LOG_SCALING = 50.0
_TINY = 1e-300


@dataclass(frozen=True)
class PartialPlan:
    """A partial transport plan and how it was reached. Arrays are of the kind, dtype and device of the cost.

    Attributes:
        plan: (n, k) without the virtual column; rows sum to at most 1 / n.
        kept: (n,) what the rows keep, in the virtual column.
        scaling: (k,) logarithms of the columns' scalings, of mean 0, to start from in a similar problem.
        n_iter: sweeps; one updates rows and columns.
        change: the largest change of a logarithm of a scaling in the last sweep.
        converged: whether `change` is at most `tol`.
    """

    plan: Array
    kept: Array
    scaling: Array
    n_iter: int
    change: float
    converged: bool


@torch.no_grad()
def partial_sinkhorn(
    cost: Float[Array, "n k"],
    rho: float,
    *,
    gamma: float = 1.0,
    epsilon: float = 0.1,
    tol: float = 1e-6,
    max_iter: int = 1000,
    scaling: Float[Array, " k"] | None = None,
) -> PartialPlan:
    """Moves a share of the rows' mass to columns of about equal size, at the least cost.

    Computed in float64, with scalings absorbed into the kernel where they grow large, so that any `epsilon` is safe;
    small ones take more sweeps.
    No gradient flows through the plan.

    Args:
        cost: (n, k), finite.
        rho: the share that is moved, in (0, 1].
        gamma: weight of the divergence of the columns' sizes from equal ones, positive; infinite makes them equal.
        epsilon: weight of the entropy, positive, in the unit of the cost.
        tol: change of the scalings' logarithms in a sweep at which to stop.
        max_iter: most sweeps; what is reached then is given back, with the right mass and rows.
        scaling: `scaling` of an earlier plan of as many columns, to start from.

    Raises:
        TypeError: `cost` or `scaling` is not made of floating point numbers.
        ValueError: a shape or value does not fit.

    Example:
        >>> cost = torch.tensor([[0.0, 3.0], [0.1, 3.0], [3.0, 0.0], [1.5, 1.5]])
        >>> found = partial_sinkhorn(cost, rho=0.75, epsilon=0.05)
        >>> (4 * found.plan).round(decimals=2).abs()  # the undecided row is left out
        tensor([[1., 0.],
                [1., 0.],
                [0., 1.],
                [0., 0.]])
    """
    rho = in_range("rho", rho, 0, 1, "right")
    positive("epsilon", epsilon)
    if gamma != math.inf and number("gamma", gamma) <= 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    positive("tol", tol)
    max_iter = integer("max_iter", max_iter)
    given = finite_tensor("cost", cost, ndim=2, floating=True).detach()
    n, k = given.shape
    if n == 0 or k == 0:
        raise ValueError(f"cost must be a non-empty matrix, got shape {tuple(given.shape)}")
    scaled = given.double() / -epsilon
    log_v = scaled.new_zeros(k)
    if scaling is not None:
        log_v = finite_tensor("scaling", scaling, ndim=1, floating=True).detach().to(log_v)
        if log_v.shape != (k,):
            raise ValueError(f"scaling must have shape ({k},), got {tuple(log_v.shape)}")
    exponent = 1.0 if gamma == math.inf else gamma / (gamma + epsilon)
    log_size, log_w, sweeps, change = math.log(rho / k), 0.0, 0, math.inf
    kernel, peak = _kernel(scaled, log_v)
    absorbed = log_v
    while sweeps < max_iter and change > tol:
        rows = kernel @ (log_v - absorbed).exp()
        moved, log_w = _shares(rows.log() + peak, rho, log_w)
        column = (moved.div_(n * rows) @ kernel).clamp_min_(_TINY).log_() - absorbed  # of M^T u
        following = exponent * (log_size - column)
        following -= following.mean()
        change = float((following - log_v).abs_().max())
        log_v = following
        sweeps += 1
        if float((log_v - absorbed).abs_().max()) > _MAX_LOG_SCALING:
            kernel, peak = _kernel(scaled, log_v)
            absorbed = log_v
    plan, peak = _kernel(scaled, log_v)
    rows = plan.sum(1)
    moved, _ = _shares(rows.log() + peak, rho, log_w)
    plan *= (moved / (n * rows))[:, None]
    found = [_like(cost, part) for part in (plan, (1 - moved) / n, log_v)]
    return PartialPlan(found[0], found[1], found[2], sweeps, change, change <= tol)


def _kernel(scaled: Tensor, log_v: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel with its columns scaled and its rows over their largest entries, and the logarithms of those."""
    found = scaled + log_v
    peak = found.amax(1)
    return found.sub_(peak[:, None]).exp_(), peak


def _shares(log_rows: Tensor, rho: float, log_w: float) -> tuple[Tensor, float]:
    """The share of each row that is moved, `rho` on average, and the logarithm of the virtual column's scaling.

    By Newton's method from `log_w`, kept between bounds of the solution.
    """
    if rho == 1:
        return torch.ones_like(log_rows), log_w
    odds = math.log(rho / (1 - rho))
    low, high = float(log_rows.min()) - odds, float(log_rows.max()) - odds
    while True:
        log_w = log_w if low < log_w < high else (low + high) / 2
        shares = (log_rows - log_w).sigmoid_()
        missing = float(shares.mean()) - rho
        if abs(missing) <= 1e-13 or high - low <= 1e-13 * max(1.0, abs(low)):
            return shares, log_w
        low, high = (log_w, high) if missing > 0 else (low, log_w)
        log_w += missing / max(float((shares * (1 - shares)).mean()), 1e-300)


def _like(given: Array, value: Tensor) -> Array:
    if isinstance(given, Tensor):
        return value.to(given.dtype)
    return value.numpy().astype(given.dtype, copy=False)
