"""Clustering by turns of centres and of bound updates on a graph of neighbours, with labels or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, floating_tensor, integer, non_negative, one_of, positive
from trimtab.semisup.neighbors import nearest_others, neighbor_graph

Centers = Literal["means", "modes", "medoids"]
Clamp = Literal["always", "init"]


@dataclass(frozen=True)
class BoundUpdate:
    """What the inner loop found.

    Attributes:
        assignments: (n, k), rows in the simplex.
        energies: at the start and after each iteration; for a symmetric, positive semidefinite graph they never rise.
        converged: whether the last change was at most `tol` of the energy.
    """

    assignments: Float[Tensor, "n k"]
    energies: tuple[float, ...]
    converged: bool


@torch.no_grad()
def laplacian_bound_update(
    unary: Float[Tensor, "n k"],
    graph: Tensor,
    lam: float,
    *,
    max_iter: int = 600,
    tol: float = 1e-7,
    known: Int[Tensor, " n"] | None = None,
    clamp: Clamp = "always",
) -> BoundUpdate:
    """Assignments for fixed costs: parallel softmax updates until the energy rests.

    Args:
        unary: cost of each class for each sample.
        graph: (n, n) non-negative weights of neighbours, dense or sparse, of any symmetry.
        lam: weight of the neighbours.
        max_iter: most iterations.
        tol: change of the energy, as a share of it, at which to stop after two iterations.
        known: class of each sample, -1 where it is not known.
        clamp: whether known samples keep their class always, or only start with it.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape or value does not fit.

    Example:
        >>> unary = torch.tensor([[0.0, 3.0], [1.0, 0.9]])
        >>> graph = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> laplacian_bound_update(unary, graph, lam=2.0).assignments.argmax(1)
        tensor([0, 0])
    """
    unary = finite_tensor("unary", unary, ndim=2, floating=True).detach()
    n, k = unary.shape
    if n == 0 or k == 0:
        raise ValueError(f"unary must be a non-empty matrix, got shape {tuple(unary.shape)}")
    if not isinstance(graph, Tensor):
        raise TypeError(f"graph must be a tensor, got {type(graph).__name__}")
    if graph.shape != (n, n) or not graph.is_floating_point():
        raise ValueError(f"graph must be floating point of shape ({n}, {n}), got {graph.dtype}, {tuple(graph.shape)}")
    held = graph if graph.layout == torch.strided else graph.to_sparse_coo().coalesce().values()
    if not (held.isfinite().all() and (held >= 0).all()):
        raise ValueError("graph must be finite and at least 0, got other values")
    lam, max_iter, tol = non_negative("lam", lam), integer("max_iter", max_iter), non_negative("tol", tol)
    one_of("clamp", clamp, get_args(Clamp))
    fixed = None if known is None else _known(known, n, k).to(unary.device)
    graph = graph.to(unary)
    y = _hold((-unary).softmax(1), fixed)
    energies: list[float] = []
    for iteration in range(max_iter + 1):
        pull = lam * (graph @ y)
        energies.append(float((y * (unary - pull / 2)).sum() - torch.special.entr(y).sum()))
        still = len(energies) > 2 and abs(energies[-1] - energies[-2]) <= tol * abs(energies[-2])
        if still or iteration == max_iter:
            return BoundUpdate(y, tuple(energies), still)
        y = (pull - unary).softmax(1)
        if clamp == "always":
            y = _hold(y, fixed)
    raise AssertionError  # pragma: no cover - the loop returns


@dataclass(frozen=True)
class SLKResult:
    """A clustering and how it was reached.

    Attributes:
        labels: (n,) classes.
        assignments: (n, k) rows in the simplex.
        centers: (k, dim).
        energies: of each round, without the entropy.
        converged: whether rounds stopped by themselves, before `max_iter`.
    """

    labels: Int[Tensor, " n"]
    assignments: Float[Tensor, "n k"]
    centers: Float[Tensor, "k dim"]
    energies: tuple[float, ...]
    converged: bool


@torch.no_grad()
def slk(
    x: Float[Tensor, "n dim"],
    centers: Float[Tensor, "k dim"],
    *,
    lam: float = 0.5,
    kind: Centers = "means",
    n_neighbors: int = 3,
    sigma: float | None = None,
    known: Int[Tensor, " n"] | None = None,
    clamp: Clamp = "always",
    max_iter: int = 100,
) -> SLKResult:
    """Clusters samples by turns: centres from labels, and labels from centres and neighbours.

    Rounds stop where the energy changes by less than one in ten thousand, or where a class would lose all its samples,
    which takes the round back.

    Args:
        x: samples.
        centers: to start from.
        lam: weight of the neighbours; 0 is K-means or K-modes.
        kind: "means", "modes" (of a Gaussian kernel over the members, by mean shift) or "medoids" (the sample with the
            largest assignment).
        n_neighbors: of each sample in the graph, itself counted, which carries no weight.
        sigma: width of the kernel; by default from the mean squared distance along the graph, as the authors do.
        known, clamp: see `laplacian_bound_update`.
        max_iter: most rounds.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a shape or value does not fit.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.1, 0.0], [1.0, 1.0], [1.1, 1.0]])
        >>> slk(x, x[[1, 2]], lam=0.1, n_neighbors=2).labels
        tensor([0, 0, 1, 1])
    """
    x = floating_tensor("x", finite_tensor("x", x, ndim=2)).detach()
    found = finite_tensor("centers", centers, ndim=2, floating=True).detach().to(x)
    if found.shape[1] != x.shape[1] or len(found) == 0:
        raise ValueError(f"centers must have shape (k, {x.shape[1]}), got {tuple(found.shape)}")
    lam, max_iter = non_negative("lam", lam), integer("max_iter", max_iter)
    one_of("kind", kind, get_args(Centers))
    one_of("clamp", clamp, get_args(Clamp))
    distances, which = nearest_others(x, integer("n_neighbors", n_neighbors, 2) - 1)
    width = float(distances.square().sum() / (5 * len(x))) ** 0.5 if sigma is None else positive("sigma", sigma)
    graph = neighbor_graph(torch.ones_like(distances), which)
    fixed = None if known is None else _known(known, len(x), len(found)).to(x.device)
    classes = len(found)
    y = _hold((-unary_costs(x, found, kind, width)).softmax(1), fixed)
    best = SLKResult(y.argmax(1), y, found, (), False)
    energies: list[float] = []
    while len(energies) < max_iter:
        found = _centers(x, F.one_hot(best.labels, classes).to(x), best, kind, width)
        unary = unary_costs(x, found, kind, width)
        if lam == 0:
            y = _hold((-unary).softmax(1), fixed)
        else:
            y = laplacian_bound_update(unary, graph, lam, known=fixed, clamp=clamp).assignments
        assigned = y.argmax(1)
        if len(assigned.unique()) < len(best.labels.unique()):
            return SLKResult(best.labels, best.assignments, best.centers, tuple(energies), True)
        weights = y if lam else F.one_hot(assigned, classes).to(y)
        energies.append(float((weights * (unary - lam / 2 * (graph @ weights))).sum()))
        still = len(energies) > 1 and abs(energies[-1] - energies[-2]) <= 1e-4 * abs(energies[-2])
        best = SLKResult(assigned, y, found, tuple(energies), still)
        if still:
            break
    return best


def unary_costs(x: Tensor, centers: Tensor, kind: Centers, sigma: float) -> Tensor:
    """Squared distances to the centres, or minus a kernel of them."""
    # Squared distances of the kind that does not cancel: features may lie far from the origin.
    squared = torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist").square()
    return squared if kind == "means" else -(squared / (-2 * max(sigma, 1e-12) ** 2)).exp()


def _centers(x: Tensor, members: Tensor, held: SLKResult, kind: Centers, sigma: float) -> Tensor:
    """Centres of the members; a class without any keeps its own."""
    count = members.sum(0)
    if kind == "medoids":
        found = x[(held.assignments * members - (1 - members)).argmax(0)]
    elif kind == "means":
        found = (members.T @ x) / count.clamp_min(1)[:, None]
    else:
        found, origin = held.centers, x.mean(0)
        for _ in range(1000):
            weights = -unary_costs(x, found, "modes", sigma) * members
            total = weights.sum(0)
            moved = torch.where((total > 0)[:, None], (weights.T @ x) / total.clamp_min(1e-30)[:, None], found)
            near = (moved - found).norm(dim=1) <= 1e-5 * (found - origin).norm(dim=1).clamp_min(1e-12)
            found = moved
            if near.all():
                break
    return torch.where((count > 0)[:, None], found, held.centers)


def _hold(y: Tensor, known: Tensor | None) -> Tensor:
    """The assignments, with one-hot rows where the class is known."""
    if known is None:
        return y
    return torch.where((known >= 0)[:, None], F.one_hot(known.clamp_min(0), y.shape[1]).to(y), y)


def _known(known: Tensor, n: int, k: int) -> Tensor:
    if not isinstance(known, Tensor) or known.dtype != torch.int64:
        raise TypeError(f"known must be int64, got {getattr(known, 'dtype', type(known).__name__)}")
    if known.shape != (n,):
        raise ValueError(f"known must have shape ({n},), got {tuple(known.shape)}")
    if int(known.min()) < -1 or int(known.max()) >= k:
        raise ValueError(f"known must be in [-1, {k}), got {int(known.min())} to {int(known.max())}")
    return known
