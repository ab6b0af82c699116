"""The nearest other samples of each sample, as graphs are made of them."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, floating_tensor, integer, looked_at, real_problem

_BLOCK = 1 << 22  # distances that are held at a time
_FAR = 30.0  # spreads of the samples


@torch.no_grad()
def nearest_others(x: Float[Tensor, "n dim"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Euclidean distances to the k nearest other samples, and which they are, nearest first.

    Args:
        x: samples.
        k: neighbours of each, fewer than there are samples; a sample is none of its own.

    Raises:
        TypeError: `x` is not floating point, or `k` no integer.
        ValueError: `x` is no finite matrix, or `k` out of range.

    Example:
        >>> nearest_others(torch.tensor([[0.0], [1.0], [5.0]]), k=1)[1].flatten()
        tensor([1, 0, 1])
    """
    x = floating_tensor("x", finite_tensor("x", x, ndim=2)).detach()
    n = len(x)
    k = integer("k", k, 1, max(1, n - 1))
    if n < 2:
        raise ValueError(f"x must have at least 2 samples, got {n}")
    # The quick product of matrices would lose the digits of distances where samples lie far from the origin.
    centre = x.mean(0)
    far = bool(centre.norm() > _FAR * (x - centre).square().sum(1).mean().sqrt())
    mode = "donot_use_mm_for_euclid_dist" if far else "use_mm_for_euclid_dist_if_necessary"
    found = []
    for start in range(0, n, block := max(1, _BLOCK // n)):
        distances = torch.cdist(x[start : start + block], x, compute_mode=mode)
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, start + rows] = math.inf
        found.append(distances.topk(k, largest=False))
    nearest, which = (torch.cat(parts) for parts in zip(*found, strict=True))
    return nearest, which


def neighbor_graph(values: Float[Tensor, "n k"], which: Int[Tensor, "n k"]) -> Tensor:
    """A sparse matrix (n, n) with these values at each sample's neighbours; it is not symmetric.

    Args:
        values: a number for each neighbour.
        which: which sample each neighbour is, as `nearest_others` gives them.

    Raises:
        TypeError: `values` is no real tensor, or `which` not int64.
        ValueError: the two are not matrices of one shape, or a neighbour is no sample.

    Example:
        >>> neighbor_graph(torch.ones(2, 1), torch.tensor([[1], [0]])).to_dense()
        tensor([[0., 1.],
                [1., 0.]])
    """
    if problem := real_problem(values=values, which=which):
        raise TypeError(problem)
    if which.dtype != torch.int64:
        raise TypeError(f"which must be int64, got {which.dtype}")
    if which.ndim != 2 or values.shape != which.shape:
        raise ValueError(f"values and which must be (n, k), got {tuple(values.shape)} and {tuple(which.shape)}")
    if looked_at(which) and not ((which >= 0) & (which < len(which))).all():
        raise ValueError(f"which must be in [0, {len(which)}), got others")
    n, k = which.shape
    rows = torch.arange(n, device=which.device).repeat_interleave(k)
    places = torch.stack([rows, which.flatten()])
    return torch.sparse_coo_tensor(places, values.flatten(), (n, n), check_invariants=False).coalesce()
