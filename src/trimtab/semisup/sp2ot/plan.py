"""The plan: partial transport with semantic similarities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, in_range, integer, non_negative, positive
from trimtab.ops.partial_transport import partial_sinkhorn
from trimtab.semisup.neighbors import nearest_others, neighbor_graph


def progressive_mass(step: float, total: float, initial: float = 0.1) -> float:
    """The share of the samples that takes part at a step: a sigmoid ramp from about `initial` to 1.

    Args:
        step: from 0 to `total`, beyond which everyone takes part.
        total: where the ramp ends, positive.
        initial: in (0, 1].

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> [round(progressive_mass(t, 10), 3) for t in (0, 5, 10)]
        [0.106, 0.358, 1.0]
    """
    initial = in_range("initial", initial, 0, 1, "right")
    left = 1 - min(non_negative("step", step) / positive("total", total), 1.0)
    return initial + (1 - initial) * math.exp(-5 * left**2)


@torch.no_grad()
def knn_gaussian_affinity(features: Float[Tensor, "n dim"], k: int = 20, *, sigma: float = 2.0) -> Tensor:
    r"""Similarities $\exp(-\lVert z_i - z_j\rVert^2 / (2 \sigma^2 d))$ of each sample with its k nearest others.

    Args:
        features: frozen ones, of d numbers each.
        k: neighbours of each, fewer than there are samples; a sample is none of its own.
        sigma: width of the kernel, positive.

    Returns:
        A sparse matrix (n, n) in float64 with k entries in every row; it is not symmetric.

    Raises:
        TypeError: `features` are not floating point.
        ValueError: they are no finite matrix, or another argument is out of its range.

    Example:
        >>> knn_gaussian_affinity(torch.tensor([[0.0], [1.0], [5.0]]), k=1).to_dense().round(decimals=2)
        tensor([[0.0000, 0.8800, 0.0000],
                [0.8800, 0.0000, 0.0000],
                [0.0000, 0.1400, 0.0000]], dtype=torch.float64)
    """
    features = finite_tensor("features", features, ndim=2, floating=True).detach().double()
    k, sigma = integer("k", k, 1, len(features) - 1), positive("sigma", sigma)
    distances, which = nearest_others(features, k)
    return neighbor_graph((distances.square() / (-2 * sigma**2 * features.shape[1])).exp(), which)


@dataclass(frozen=True)
class SemanticPlan:
    """A plan and how it was reached.

    Attributes:
        plan: (n, k) in float64; rows sum to at most 1 / n, and all to the mass that was moved.
        objectives: of the first plan and after each round, entropies included; they never rise.
        scaling: of the last transport problem, to start from in a similar one.
        converged: whether the last change of the objective was at most `tol`.
    """

    plan: Float[Tensor, "n k"]
    objectives: tuple[float, ...]
    scaling: Tensor
    converged: bool


@torch.no_grad()
def sp2ot(
    cost: Float[Tensor, "n k"],
    similarity: Tensor | None,
    rho: float,
    *,
    lam: float = 1000.0,
    gamma: float = 1.0,
    epsilon: float = 0.1,
    max_iter: int = 100,
    tol: float = 1e-6,
    max_sweeps: int = 1000,
    scaling: Tensor | None = None,
) -> SemanticPlan:
    """The semantic-regularised partial plan, by rounds of partial transport.

    Args:
        cost: (n, k), finite: minus the logarithms of predictions.
        similarity: (n, n) non-negative, dense or sparse; without one, or with `lam` 0, it is one partial transport.
        rho: share of the mass that is moved, in (0, 1].
        lam: weight of the similarities. Entries of a plan are about 1 / n, so that its effect falls as 1 / n.
        gamma: weight of the sizes' divergence from equal ones; infinite makes them equal.
        epsilon: weight of the entropy.
        max_iter: most rounds.
        tol: change of the objective at which to stop; also the tolerance of each transport problem.
        max_sweeps: most sweeps of a transport problem.
        scaling: of an earlier plan, to start from.

    Raises:
        TypeError: `cost` or `similarity` is not made of floating point numbers, or `max_sweeps` is no integer.
        ValueError: a shape or value does not fit.

    Example:
        >>> cost = torch.tensor([[0.1, 2.0], [1.0, 1.0], [2.0, 0.1]])
        >>> friends = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> (3 * sp2ot(cost, friends, 0.9, lam=5.0).plan).round(decimals=1).abs()
        tensor([[1.0000, 0.0000],
                [1.0000, 0.0000],
                [0.0000, 0.7000]], dtype=torch.float64)
    """
    cost = finite_tensor("cost", cost, ndim=2, floating=True).detach().double()
    n, k = cost.shape
    lam = non_negative("lam", lam)
    integer("max_iter", max_iter)
    if not (isinstance(gamma, float | Real) and gamma > 0):
        raise ValueError(f"gamma must be positive, got {gamma!r}")
    if not (isinstance(epsilon, float | Real) and 0 < epsilon < math.inf):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon!r}")
    if not isinstance(max_sweeps, int | Integral):
        raise TypeError(f"max_sweeps must be an integer, got {max_sweeps!r}")
    if max_sweeps < 1:
        raise ValueError(f"max_sweeps must be at least 1, got {max_sweeps}")
    options: dict[str, Any] = {"gamma": gamma, "epsilon": epsilon, "tol": tol, "max_iter": max_sweeps}
    if similarity is None or lam == 0:
        found = partial_sinkhorn(cost, rho, scaling=scaling, **options)
        plan, scaling = torch.as_tensor(found.plan), torch.as_tensor(found.scaling)
        return SemanticPlan(plan, (_objective(plan, cost, cost, rho, gamma, epsilon),), scaling, found.converged)
    both = _symmetric(similarity, n)
    in_range("rho", rho, 0, 1, "right")
    plan = torch.full_like(cost, rho / (n * k))
    pull = lam * (both @ plan)
    objectives = [_objective(plan, cost, cost - pull / 2, rho, gamma, epsilon)]
    converged = False
    while not converged and len(objectives) <= max_iter:
        found = partial_sinkhorn(cost - pull, rho, scaling=scaling, **options)
        scaling = torch.as_tensor(found.scaling)
        change = torch.as_tensor(found.plan) - plan
        # The objective is quadratic in S along the way, so that no product is needed to try a shorter step.
        change_pull, share = lam * (both @ change), 1.0
        while True:
            following, its_pull = plan + share * change, pull + share * change_pull
            reached = _objective(following, cost, cost - its_pull / 2, rho, gamma, epsilon)
            if reached <= objectives[-1] or share < 1e-3:
                break
            share /= 2
        if reached > objectives[-1]:  # down to what the transport problem was solved to
            converged = True
            break
        plan, pull = following, its_pull
        converged = objectives[-1] - reached <= tol
        objectives.append(reached)
    if scaling is None:  # pragma: no cover - there is at least one round
        raise AssertionError
    return SemanticPlan(plan, tuple(objectives), scaling, converged)


def _symmetric(similarity: Tensor, n: int) -> Tensor:
    """S + S^T, after a look at S."""
    if not isinstance(similarity, Tensor) or not similarity.is_floating_point():
        kind = getattr(similarity, "dtype", type(similarity).__name__)
        raise TypeError(f"similarity must be a floating-point tensor, got {kind}")
    if similarity.shape != (n, n):
        raise ValueError(
            f"similarity must have shape ({n}, {n}) as there are rows of cost, got {tuple(similarity.shape)}"
        )
    both = similarity.detach().double()
    if similarity.layout != torch.strided:
        both = both.to_sparse_coo().coalesce()
    values = both.values() if both.is_sparse else both
    if not (values.isfinite().all() and (values >= 0).all()):
        raise ValueError("similarity must be finite and at least 0, got other values")
    both = both + both.mT
    return both.coalesce() if both.is_sparse else both


def _objective(plan: Tensor, cost: Tensor, linear: Tensor, rho: float, gamma: float, epsilon: float) -> float:
    """Of a plan, with the entropy of what rows keep; `linear` is the cost less half of what the similarities pull."""
    kept = (1 / len(plan) - plan.sum(1)).clamp_min(0) if rho < 1 else plan.new_zeros(0)
    sizes = plan.sum(0)
    value = (plan * linear).sum() - epsilon * (torch.special.entr(plan).sum() + torch.special.entr(kept).sum())
    if gamma != math.inf:
        value += gamma * torch.special.xlogy(sizes, sizes * (plan.shape[1] / rho)).sum()
    return float(value)
