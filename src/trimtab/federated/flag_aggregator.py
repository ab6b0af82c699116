r"""Flag aggregator: average the workers' gradients inside a subspace that explains most of them.

For training on workers of which a few may send anything: noise, flipped signs, half a message. A worker counts by how
much of its direction a common low-dimensional subspace can rebuild, and the subspace is fitted so that workers it
cannot rebuild hardly pull at it, as a median does for numbers. No count of the bad workers has to be known.

$$
\min_{Y^\top Y = I_r}\; \sum_{i=1}^{p} \sqrt{1 - \lVert Y^\top x_i \rVert^2}
  + \frac{\lambda}{p (p - 1)} \sum_{i \ne j} \sqrt{1 - \frac{\lVert Y^\top (x_i - x_j) \rVert^2}{\lVert x_i - x_j
  \rVert^2}}, \qquad x_i = \frac{g_i}{\lVert g_i \rVert}
$$

$$
d = \frac{1}{p}\, Y Y^\top \sum_{i=1}^{p} x_i
$$

Each step of the fit is an eigenproblem with weights $(1 - \lVert Y^\top x_i \rVert^2 + \epsilon)^{-1/2}$, in which the
objective never rises. All of it happens in the span of the rows: one pass over the gradients for their inner products,
one for the result.

Reference:
    Hamidreza Almasi, Harsh Mishra, Balajee Vamanan, Sathya N. Ravi: Flag Aggregator: Scalable Distributed Training
    under Failures and Augmented Losses using Convex Optimization. ICLR 2024, arXiv 2302.05865. The release starts from
    a random subspace and makes one step, leaves out the division by $\lVert x_i - x_j \rVert^2$, gives a difference
    between workers the square of its share in that step, and divides by $r$ in the place of $p$.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.federated.robust_means import checked, gram
from trimtab.ops.arguments import integer, non_negative, one_of, positive


@dataclass(frozen=True)
class FlagSubspace:
    """A fitted subspace.

    Attributes:
        basis: orthonormal columns; fewer than the rank where the updates span less.
        captured: share of each update's squared length that the subspace holds; 0 for an update of zeros.
        history: the objective after each step, with epsilon under the roots; it never rises.
    """

    basis: Float[Tensor, "size rank"]
    captured: Float[Tensor, " workers"]
    history: list[float]


def flag_subspace(
    updates: Float[Tensor, "workers size"],
    rank: int | None = None,
    *,
    lam: float = 0.0,
    n_iter: int = 5,
    eps: float = 1e-7,
    tol: float = 1e-10,
) -> FlagSubspace:
    """Fit the subspace that rebuilds most of the updates' directions.

    Args:
        updates: one a row, of at least two workers.
        rank: dimensions of the subspace (r), at most the number of workers; the first whole number above half of them
            by default.
        lam: weight of the differences between workers.
        n_iter: steps; the first takes all weights equal.
        eps: keeps the weights finite.
        tol: stop when the objective falls by less.

    Raises:
        ValueError: an argument is out of range, or `updates` is no matrix, has one row or is not finite.

    Example:
        >>> found = flag_subspace(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 5.0]]), rank=1)
        >>> found.captured
        tensor([1., 1., 0.])
    """
    if not isinstance(updates, Tensor):
        raise TypeError(f"updates must be a tensor, got {type(updates).__name__}")
    if not 0 <= tol < float("inf"):
        raise ValueError(f"tol must be finite and not negative, got {tol!r}")
    spread = _Spread.of(updates)
    inner, history = _fit(spread.places, _rank(rank, len(updates)), lam, n_iter, eps, tol)
    weights = spread.vectors / spread.values.sqrt() @ inner
    return FlagSubspace(
        updates.T @ (weights * spread.scale[:, None]).to(updates),
        (spread.places @ inner).square().sum(1).to(updates),
        history,
    )


def flag_aggregate(
    updates: Float[Tensor, "workers size"],
    rank: int | None = None,
    *,
    lam: float = 0.0,
    n_iter: int = 5,
    normalize: bool = True,
    divisor: Literal["workers", "rank"] = "workers",
    rescale: Literal["median_norm"] | None = None,
    eps: float = 1e-7,
    tol: float = 1e-10,
) -> Float[Tensor, " size"]:
    """The updates averaged inside the subspace that `flag_subspace` fits to them.

    Args:
        updates: one a row, of at least two workers.
        rank, lam, n_iter, eps, tol: as in `flag_subspace`.
        normalize: average directions; otherwise the updates themselves, and a long wrong one that lies in the subspace
            then decides everything.
        divisor: what the sum is divided by: the number of "workers", as in the paper, or the "rank".
        rescale: "median_norm" gives the result the scale of the updates, times the median of their lengths. Without it
            the result is at most 1 long whatever the gradients are.

    Raises:
        ValueError: an argument is out of range, or `updates` is no matrix, has one row or is not finite.

    Example:
        >>> flag_aggregate(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-10.0, 0.0]]), rank=1)
        tensor([0.3333, 0.0000])
    """
    if not isinstance(updates, Tensor):
        raise TypeError(f"updates must be a tensor, got {type(updates).__name__}")
    if not 0 <= tol < float("inf"):
        raise ValueError(f"tol must be finite and not negative, got {tol!r}")
    one_of("divisor", divisor, ("workers", "rank"))
    one_of("rescale", rescale, ("median_norm", None))
    spread, workers = _Spread.of(updates), len(updates)
    rank = _rank(rank, workers)
    inner, _ = _fit(spread.places, rank, lam, n_iter, eps, tol)
    total = torch.ones_like(spread.norms) if normalize else spread.norms
    if inner.shape[0] > inner.shape[1]:
        projected = inner @ (inner.T @ (spread.places.T @ total))
        total = spread.vectors @ (projected / spread.values.sqrt())
    total = total * spread.scale / (workers if divisor == "workers" else rank)
    if rescale == "median_norm":
        total = total * spread.norms.quantile(0.5)
    wide = torch.float64 if updates.dtype == torch.float64 else torch.float32
    return (total.to(wide) @ updates.to(wide)).to(updates)


@dataclass(frozen=True)
class FlagAggregator:
    """`flag_aggregate` with its settings: a rule for `RobustFedAvg`, or for the gradients of data-parallel workers.

    Attributes:
        rank, lam, n_iter, normalize, divisor, rescale, eps: as there.

    Raises:
        ValueError: one of them is out of range.

    Example:
        >>> rule = FlagAggregator(rescale="median_norm")
        >>> rule(torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]]))
        tensor([2., 0.])
    """

    rank: int | None = None
    lam: float = 0.0
    n_iter: int = 5
    normalize: bool = True
    divisor: Literal["workers", "rank"] = "workers"
    rescale: Literal["median_norm"] | None = None
    eps: float = 1e-7

    def __post_init__(self) -> None:
        if self.rank is not None:
            integer("rank", self.rank)
        non_negative("lam", self.lam)
        integer("n_iter", self.n_iter)
        one_of("divisor", self.divisor, ("workers", "rank"))
        one_of("rescale", self.rescale, ("median_norm", None))
        positive("eps", self.eps)

    def __call__(self, updates: Float[Tensor, "workers size"]) -> Float[Tensor, " size"]:
        """The update that is made."""
        return flag_aggregate(
            updates,
            self.rank,
            lam=self.lam,
            n_iter=self.n_iter,
            normalize=self.normalize,
            divisor=self.divisor,
            rescale=self.rescale,
            eps=self.eps,
        )


@dataclass(frozen=True)
class _Spread:
    """Directions of the updates in an orthonormal basis of their span, which is never formed.

    The basis is `directions.T @ vectors / values.sqrt()`, and `places` are the directions' coordinates in it.
    """

    norms: Tensor
    scale: Tensor  # 1 / norms, 0 for an update of zeros
    values: Tensor
    vectors: Tensor
    places: Tensor

    @classmethod
    def of(cls, updates: Tensor) -> _Spread:
        inner = gram(checked(updates, least=2))
        norms = inner.diagonal().clamp_min(0).sqrt()
        scale = torch.where(norms > 0, 1 / norms, 0.0)
        values, vectors = torch.linalg.eigh(inner * scale[:, None] * scale)
        kept = values > values[-1].clamp_min(1e-300) * 1e-12 * len(updates)
        values, vectors = values[kept], vectors[:, kept]
        places = torch.where(norms[:, None] > 0, vectors * values.sqrt(), 0.0)
        return cls(norms, scale, values, vectors, places)


def _rank(rank: int | None, workers: int) -> int:
    return (workers + 2) // 2 if rank is None else integer("rank", rank, 1, workers)


def _fit(
    places: Float[Tensor, "workers span"], rank: int, lam: float, n_iter: int, eps: float, tol: float
) -> tuple[Float[Tensor, "span rank"], list[float]]:
    non_negative("lam", lam)
    integer("n_iter", n_iter)
    positive("eps", eps)
    workers, span = places.shape
    rows, share = places, places.new_ones(workers)
    if lam:
        first, second = torch.triu_indices(workers, workers, 1, device=places.device)
        apart = places[first] - places[second]
        length = apart.norm(dim=1, keepdim=True)
        rows = torch.cat([rows, torch.where(length > 1e-12, apart / length, 0.0)])
        share = torch.cat([share, share.new_full((len(first),), 2 * lam / (workers * (workers - 1)))])
    if span <= rank:  # everything is captured
        left = (1 - rows.square().sum(1)).clamp_min(0) + eps
        return torch.eye(span, dtype=places.dtype, device=places.device), [float((share * left.sqrt()).sum())]
    best, history, weights = places.new_empty(span, rank), list[float](), share
    for _ in range(n_iter):
        basis = torch.linalg.eigh(rows.T @ (weights[:, None] * rows)).eigenvectors[:, -rank:]
        left = (1 - (rows @ basis).square().sum(1)).clamp_min(0) + eps
        value = float((share * left.sqrt()).sum())
        if history and value > history[-1]:  # by rounding alone
            break
        best, fallen = basis, history[-1] - value if history else tol
        history.append(value)
        if fallen < tol:
            break
        weights = share / left.sqrt()
    return best, history
