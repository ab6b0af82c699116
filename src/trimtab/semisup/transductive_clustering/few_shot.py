"""Episodes of few-shot classification, solved by clustering support and queries together."""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, floating_tensor, integer, labels, non_negative, one_of, positive
from trimtab.ops.pairwise import pairwise_cosine
from trimtab.semisup.neighbors import nearest_others, neighbor_graph
from trimtab.semisup.transductive_clustering.clustering import (
    Centers,
    Clamp,
    laplacian_bound_update,
    slk,
    unary_costs,
)


def center_normalize(x: Float[Tensor, "n dim"], mean: Float[Tensor, " dim"]) -> Float[Tensor, "n dim"]:
    """Features less the mean of the base classes, brought to length one.

    Args:
        x: features.
        mean: of the base classes, or of whatever is the origin.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: `x` is no matrix, or `mean` is not as wide.

    Example:
        >>> center_normalize(torch.tensor([[4.0, 5.0]]), torch.tensor([1.0, 1.0]))
        tensor([[0.6000, 0.8000]])
    """
    if not all(isinstance(held, Tensor) and held.is_floating_point() for held in (x, mean)):
        raise TypeError("x and mean must be floating-point tensors, got others")
    if x.ndim != 2 or mean.shape != x.shape[1:]:
        raise ValueError(f"x and mean must be (n, dim) and (dim,), got {tuple(x.shape)} and {tuple(mean.shape)}")
    return F.normalize(x - mean, dim=1)


class TransductiveClusterer:
    """Solves few-shot episodes by clustering support and queries together.

    Queries are shifted to the support's mean, centres start at the support's class means, and `slk` does the rest.

    Args:
        n_classes: of an episode.
        lam, kind, n_neighbors, sigma, clamp, max_iter: see `slk`.
        rectify: whether queries are shifted.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> support, query = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.1, 0.9], [0.2, 1.0], [0.9, 0.1]])
        >>> TransductiveClusterer(2, lam=0.1).fit_predict(support, torch.tensor([0, 1]), query)
        tensor([0, 0, 1])
    """

    def __init__(
        self,
        n_classes: int,
        *,
        lam: float = 0.5,
        kind: Centers = "means",
        n_neighbors: int = 3,
        sigma: float | None = None,
        rectify: bool = True,
        clamp: Clamp = "always",
        max_iter: int = 100,
    ) -> None:
        self.n_classes, self.lam = integer("n_classes", n_classes, 2), non_negative("lam", lam)
        self.kind = one_of("kind", kind, get_args(Centers))
        self.clamp = one_of("clamp", clamp, get_args(Clamp))
        self.n_neighbors, self.max_iter = integer("n_neighbors", n_neighbors, 2), integer("max_iter", max_iter)
        self.sigma = None if sigma is None else positive("sigma", sigma)
        self.rectify = rectify

    def fit_predict(
        self, support: Float[Tensor, "shots dim"], y: Int[Tensor, " shots"], query: Float[Tensor, "queries dim"]
    ) -> Int[Tensor, " queries"]:
        """Classes of the queries.

        Args:
            support: labelled samples, of every class at least one.
            y: their classes, in [0, n_classes).
            query: samples to classify.

        Raises:
            TypeError: a type is wrong.
            ValueError: shapes do not fit, a class has no sample, or a value is not finite.
        """
        support, y, query = _episode(support, y, query, self.n_classes)
        if self.rectify:
            query = shift_queries(support, query)
        result = slk(
            torch.cat([support, query]),
            _means(support, y, self.n_classes),
            lam=self.lam,
            kind=self.kind,
            n_neighbors=self.n_neighbors,
            sigma=self.sigma,
            known=torch.cat([y, y.new_full((len(query),), -1)]),
            clamp=self.clamp,
            max_iter=self.max_iter,
        )
        return result.labels[len(support) :]


def shift_queries(support: Float[Tensor, "shots dim"], query: Float[Tensor, "queries dim"]) -> Tensor:
    """Queries moved by the difference of the means, so that theirs is the support's.

    Args:
        support: labelled samples.
        query: the others.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: the two are not matrices of one width, each with at least one row.

    Example:
        >>> shift_queries(torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [14.0]])).flatten()
        tensor([-1.,  3.])
    """
    if not all(isinstance(held, Tensor) and held.is_floating_point() for held in (support, query)):
        raise TypeError("support and query must be floating-point tensors, got others")
    if not support.ndim == query.ndim == 2 or support.shape[1] != query.shape[1] or 0 in (len(support), len(query)):
        raise ValueError(
            "support and query must be (shots, dim) and (queries, dim), at least one of each, got "
            f"{tuple(support.shape)} and {tuple(query.shape)}"
        )
    return query + (support.mean(0) - query.mean(0))


@torch.no_grad()
def rectify_prototypes(
    support: Float[Tensor, "shots dim"], y: Int[Tensor, " shots"], query: Float[Tensor, "queries dim"], n_classes: int
) -> Float[Tensor, "classes dim"]:
    """Class means of support and queries, each query weighted by the softmax of ten times its cosines with the means.

    Raises:
        TypeError: a type is wrong.
        ValueError: shapes do not fit, a class has no sample, or a value is not finite.

    Example:
        >>> support, query = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.9, 0.1]])
        >>> rectify_prototypes(support, torch.tensor([0, 1]), query, 2).round(decimals=2)
        tensor([[0.9500, 0.0500],
                [0.0000, 1.0000]])
    """
    support, y, query = _episode(support, y, query, n_classes)
    weights = (10 * pairwise_cosine(query, _means(support, y, n_classes))).softmax(1)
    shares = torch.cat([F.one_hot(y, n_classes).to(weights), weights])
    return (shares.T @ torch.cat([support, query])) / shares.sum(0)[:, None]


@torch.no_grad()
def laplacian_shot(
    support: Float[Tensor, "shots dim"],
    y: Int[Tensor, " shots"],
    query: Float[Tensor, "queries dim"],
    n_classes: int,
    *,
    lam: float = 0.7,
    n_neighbors: int = 3,
    rectify: bool = True,
) -> Int[Tensor, " queries"]:
    """Classes of queries by fixed prototypes and a graph of the queries alone.

    Args:
        support, y, query, n_classes: the episode, as for `TransductiveClusterer`.
        lam: weight of the neighbours; 0 is the nearest prototype.
        n_neighbors: of each query in the graph, itself counted, which carries no weight.
        rectify: whether queries are shifted to the support's mean and prototypes re-estimated with them.

    Raises:
        TypeError: a type is wrong.
        ValueError: shapes do not fit, a class has no sample, or a value is out of its range.

    Example:
        >>> support, query = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.1, 0.9], [0.2, 1.0], [0.9, 0.1]])
        >>> laplacian_shot(support, torch.tensor([0, 1]), query, 2, n_neighbors=2)
        tensor([0, 0, 1])
    """
    support, y, query = _episode(support, y, query, n_classes)
    lam = non_negative("lam", lam)
    prototypes = _means(support, y, n_classes)
    if rectify:
        query = shift_queries(support, query)
        prototypes = rectify_prototypes(support, y, query, n_classes)
    unary = unary_costs(query, prototypes, "means", 1.0)
    if lam == 0:
        return unary.argmin(1)
    distances, which = nearest_others(query, integer("n_neighbors", n_neighbors, 2) - 1)
    graph = neighbor_graph(torch.ones_like(distances), which)
    return laplacian_bound_update(unary, graph, lam, max_iter=20, tol=1e-6).assignments.argmax(1)


def _means(support: Tensor, y: Tensor, n_classes: int) -> Tensor:
    members = F.one_hot(y, n_classes).to(support)
    return (members.T @ support) / members.sum(0)[:, None]


def _episode(support: Tensor, y: Tensor, query: Tensor, n_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    n_classes = integer("n_classes", n_classes, 2)
    support = floating_tensor("support", finite_tensor("support", support, ndim=2)).detach()
    query = floating_tensor("query", finite_tensor("query", query, ndim=2)).detach()
    y = labels("y", y, n_classes, len(support)).to(support.device)
    if query.shape[1] != support.shape[1] or len(query) == 0:
        raise ValueError(f"query must have shape (queries, {support.shape[1]}), not empty, got {tuple(query.shape)}")
    if query.dtype != support.dtype:
        raise TypeError(f"query must be {support.dtype} as support, got {query.dtype}")
    missing = sorted(set(range(n_classes)) - set(y.tolist()))
    if missing:
        raise ValueError(f"support must have a sample of every class, got none of class {missing[0]}")
    return support, y, query
