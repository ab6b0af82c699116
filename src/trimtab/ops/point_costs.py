"""Costs of moving points onto points, as matrices over all pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import floating_tensor, in_range, one_of, tensor, tensor_problem

PointCost: TypeAlias = str | float | Callable[[Tensor, Tensor], Tensor]
"""A name ("sqeuclidean", "euclidean", "sphere"), a power of the Euclidean distance, or a function of both clouds."""


def sphere_distance(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    r"""Geodesic distance on the unit sphere between every row of `x` and every row of `y`, in [0, pi].

    From the chords to a point and to its antipode, so that it is exact, and its gradient finite, at angles where the
    arc cosine's is not. The rows must have length one.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: they are no matrices of as many columns.

    Example:
        >>> sphere_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[1.5708, 0.0000]])
    """
    if problem := tensor_problem(x=x, y=y):
        raise TypeError(problem)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be points of one dimension, got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = floating_tensor("x", x), floating_tensor("y", y)
    return 2 * torch.atan2(_distance(x, y), _distance(x, -y))


def point_costs(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], cost: PointCost = "sqeuclidean"
) -> Float[Tensor, "n m"]:
    """The cost of moving every row of `x` onto every row of `y`, differentiable in both.

    Distances are those of the differences of points, so that near points keep their digits far from the origin.

    Args:
        x, y: points, of floating point numbers.
        cost: "sqeuclidean", "euclidean", "sphere" (`sphere_distance`), a power at least 1 of the Euclidean distance, or
            a function of `x` and `y` that returns the matrix.

    Raises:
        TypeError: the points are no tensors or arrays of floating point numbers, or the cost is none of the above.
        ValueError: the name is unknown, the power is below 1 (its gradient is infinite where a point stays), the shapes
            do not fit, or the function's matrix has another shape.

    Example:
        >>> point_costs(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), cost=3)
        tensor([[125.]])
    """
    x, y = tensor("x", x, floating=True), tensor("y", y, floating=True)
    if x.ndim != 2 or y.ndim != 2 or 0 in x.shape or 0 in y.shape:
        raise ValueError(f"x and y must be non-empty (points, dim) matrices, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not callable(cost) and (x.dtype in (torch.float16, torch.bfloat16) or y.dtype != x.dtype):
        raise TypeError(f"x and y must be of one type, float32 or float64, got {x.dtype} and {y.dtype}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y must have points of the {x.shape[1]} dimensions of x, got {y.shape[1]}")
    with torch.autocast(x.device.type, enabled=False):
        if callable(cost):
            matrix = cost(x, y)
            if matrix.shape != (len(x), len(y)):
                raise ValueError(f"cost must return shape {(len(x), len(y))}, got {tuple(matrix.shape)}")
            return matrix
        if isinstance(cost, str):
            one_of("cost", cost, ("sqeuclidean", "euclidean", "sphere"))
            if cost == "sphere":
                return sphere_distance(x, y)
            power = 1.0 if cost == "euclidean" else 2.0
        else:
            power = in_range("cost", cost, 1, math.inf)
        return _distance(x, y) ** power


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
