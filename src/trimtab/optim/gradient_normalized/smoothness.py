"""The radius that the method is named after, from its definition."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import integer, positive
from trimtab.optim.gradient_normalized.functions import (
    Curvature,
    Function,
    Gradient,
    HessianName,
    check_start,
    checked,
    checked_hessian,
    derivatives,
)
from trimtab.optim.gradient_normalized.step import Metric


@torch.no_grad()
def gradient_normalized_smoothness(
    fun: Function,
    x: Float[Tensor, " d"],
    *,
    gradient: Gradient | None = None,
    hessian: HessianName | Curvature = "exact",
    metric: Float[Tensor, "d d"] | None = None,
    n_directions: int = 64,
    max_radius: float = 1e6,
    generator: torch.Generator | None = None,
    directions: Float[Tensor, "n d"] | None = None,
) -> float:
    """Estimates the radius that the method is named after, from its definition, along random directions.

    As it looks only at some steps, of lengths that double, the estimate is never below the radius but for rounding, and
    comes down to it with more directions.

    Args:
        fun: maps (d,) to a scalar.
        x: (d,), a point where the gradient is not zero.
        gradient: as in `gradient_normalized_newton`.
        hessian: as in `gradient_normalized_newton`.
        metric: (d, d), the matrix B of the norm.
        n_directions: number of directions; each is looked at both ways.
        max_radius: where to stop looking.
        generator: where the directions are drawn from.
        directions: (n, d), the directions themselves, instead of drawn ones.

    Returns:
        The radius, within a thousandth; infinity if it is beyond `max_radius`.

    Raises:
        ValueError: the gradient is zero, or an argument is out of its range.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> gradient_normalized_smoothness(lambda x: x.square().sum(), x)
        inf
        >>> radius = gradient_normalized_smoothness(lambda x: x.square().sum(), x, hessian="zero")  # |gradient| / 2
        >>> round(radius / 5**0.5, 2)
        1.0
    """
    check_start(x)
    positive("max_radius", max_radius)
    evaluate, curvature = derivatives(fun, gradient, hessian)
    norm = Metric(metric)
    _, slope = checked(x, *evaluate(x))
    length = float(norm.dual_norm(slope))
    if length == 0:
        raise ValueError("x must not be stationary, got a point with gradient zero")
    if directions is None:
        integer("n_directions", n_directions)
        directions = torch.randn(n_directions, len(x), generator=generator, dtype=x.dtype, device=x.device)
    directions = directions / norm.norm(directions)[:, None]
    directions = torch.cat([directions, -directions])
    matrix = checked_hessian(x, curvature(x))
    bent = torch.zeros_like(directions) if matrix is None else directions @ matrix.mT

    def error(radius: float) -> float:
        """Largest error of the prediction at steps of this length, per unit of length."""
        moved = torch.stack([evaluate(x + radius * direction)[1] for direction in directions])
        return float(norm.dual_norm((moved - slope) / radius - bent).nan_to_num(nan=math.inf).max())

    # radius * (largest error up to radius) grows with the radius: walk up to where it passes the gradient's norm.
    radius, worst, below = 1e-6, 0.0, 0.0
    while radius <= max_radius:
        here = max(worst, error(radius))
        if radius * here > length:
            break
        radius, worst, below = 2 * radius, here, radius
    else:
        return math.inf
    while radius - below > 1e-3 * radius:
        middle = (below + radius) / 2
        here = max(worst, error(middle))
        if middle * here > length:
            radius = middle
        else:
            below, worst = middle, here
    return (below + radius) / 2
