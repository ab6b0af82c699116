"""Euclidean projection onto the points of a simplex that have few non-zero entries."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import integer, looked_at, tensor_problem


def project_descending(x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
    """`trimtab.ops.simplex.project_simplex` of entries that descend along the last dimension, which is not checked.

    The threshold that leaves j entries above zero is (their sum - 1) / j; the right one of them is the largest.

    Raises:
        TypeError: x is no real tensor.

    Example:
        >>> project_descending(torch.tensor([0.9, 0.5, -3.0]))
        tensor([0.7000, 0.3000, 0.0000])
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    x = x - x[..., :1].detach()
    excess = x.cumsum(-1) - 1
    threshold = (excess / torch.arange(1, x.shape[-1] + 1, device=x.device)).max(-1, keepdim=True).values
    return (x - threshold).clamp_min(0)


def top_entries_on_simplex(
    x: Float[Tensor, "*batch n"], k: int
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """The entries that `project_topk_simplex` may leave above zero, projected, and where they stand.

    Raises:
        TypeError: `k` is no integer, or `x` not floating point.
        ValueError: `k` is not in [1, n], or `x` a single number.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if not x.ndim:
        raise ValueError("x must have entries along its last dimension, got a single number")
    k = integer("k", k, most=x.shape[-1])
    top, index = x.topk(k, dim=-1)
    return project_descending(top), index


def project_topk_simplex(x: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch n"]:
    r"""The nearest point with non-negative entries that sum to 1, of which at most `k` are above zero.

    Taken along the last dimension: the `k` largest entries are projected onto the simplex and the others are zero.
    Among equal entries an arbitrary one is kept, as the nearest point is not unique there. Autograd flows through the
    entries kept. From Kyrillidis, Becker, Cevher and Koch, "Sparse projections onto the simplex", ICML 2013, arXiv
    1206.1529.

    Args:
        x: any points.
        k: how many entries may be above zero, in [1, n]; with n it is `trimtab.ops.simplex.project_simplex`.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `k` is out of range or, on the CPU, `x` not finite.

    Example:
        >>> project_topk_simplex(torch.tensor([0.5, 0.9, 0.4]), k=2)
        tensor([0.3000, 0.7000, 0.0000])
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if looked_at(x) and not x.isfinite().all():
        raise ValueError("x must be finite, got NaN or infinity")
    top, index = top_entries_on_simplex(x, k)
    return torch.zeros_like(x).scatter(-1, index, top)
