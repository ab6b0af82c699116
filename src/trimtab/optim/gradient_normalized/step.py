"""The step of Algorithm 1 and the search of Algorithm 3, in the norm of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import all_finite, integer, tensor_problem

_ROUNDING = 4.5  # units of rounding of f that an accepted decrease may fall short by: 1e-15 in double precision


class Metric:
    """The norm of a symmetric positive definite matrix B, and Newton systems regularised by it.

    Args:
        matrix: (d, d); None is the identity.

    Raises:
        ValueError: the matrix is not square, or not positive definite.
    """

    def __init__(self, matrix: Float[Tensor, "d d"] | None = None) -> None:
        self.matrix = matrix
        if matrix is not None:
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
                raise ValueError(f"metric must be a square matrix, got shape {tuple(matrix.shape)}")
            self.factor, failed = torch.linalg.cholesky_ex(matrix)
            if failed or not matrix.isfinite().all():
                raise ValueError("metric must be positive definite, got a matrix that is not")

    def norm(self, h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """The norm of steps."""
        length: Tensor = torch.linalg.vector_norm(h if self.matrix is None else h @ self.factor, dim=-1)
        return length

    def dual_norm(self, g: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """The norm of gradients."""
        if self.matrix is not None:
            g = torch.linalg.solve_triangular(self.factor, g.unsqueeze(-1), upper=False).squeeze(-1)
        length: Tensor = torch.linalg.vector_norm(g, dim=-1)
        return length

    def newton_direction(
        self, gradient: Float[Tensor, " d"], hessian: Float[Tensor, "d d"] | None, regularizer: float
    ) -> Float[Tensor, " d"] | None:
        """Minus the inverse of `hessian + regularizer * B` times the gradient, by Cholesky's factors.

        None where the sum is not positive definite; a Hessian of None is zero.
        """
        if hessian is None:
            if self.matrix is None:
                return gradient / -regularizer
            return torch.cholesky_solve(gradient[:, None], self.factor)[:, 0] / -regularizer
        if self.matrix is None:
            system = hessian.clone()
            system.diagonal().add_(regularizer)
        else:
            system = hessian.add(self.matrix, alpha=regularizer)
        factor, failed = torch.linalg.cholesky_ex(system)
        return None if failed else torch.cholesky_solve(gradient[:, None], factor)[:, 0].neg()


@dataclass(frozen=True)
class GradientNormalizedStep:
    """An accepted step.

    Attributes:
        direction: (d,), what to add to the point.
        value: the function's value there.
        gradient: (d,), and its gradient.
        gamma: the radius for the next step.
        regularizer: the $\\lambda$ of this step.
        n_solves: systems solved, those of refused tries included.
    """

    direction: Float[Tensor, " d"]
    value: Float[Tensor, ""]
    gradient: Float[Tensor, " d"]
    gamma: float
    regularizer: float
    n_solves: int


def gradient_normalized_step(
    evaluate: Callable[[Float[Tensor, " d"]], tuple[Tensor, Tensor]],
    value: Float[Tensor, ""],
    gradient: Float[Tensor, " d"],
    hessian: Float[Tensor, "d d"] | None,
    gamma: float,
    *,
    metric: Metric | None = None,
    gamma_min: float = 1e-9,
    max_halvings: int = 40,
) -> GradientNormalizedStep | None:
    """One iteration of Algorithm 3: tries radii from `gamma` downwards until a step is accepted.

    Args:
        evaluate: maps a direction (d,) to the value and the gradient at the point moved by it.
        value: the function's value at the point.
        gradient: (d,), its gradient there, not zero.
        hessian: (d, d), exact or approximate; None is zero, and gives normalised gradient steps.
        gamma: the radius to try first, positive.
        metric: the norm; by default the Euclidean one.
        gamma_min: least radius for the next step.
        max_halvings: most tries.

    Returns:
        The step; None where no try was accepted.

    Raises:
        TypeError: `max_halvings` is no integer, or `gradient` of half precision, in which nothing is solved.
        ValueError: `gamma` is not positive and finite, `gamma_min` negative, or `value`, `gradient` or `hessian` not
            finite.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> evaluate = lambda step: (0.5 * (x + step).square().sum(), x + step)
        >>> gradient_normalized_step(evaluate, torch.tensor(2.5), x, torch.eye(2), gamma=5**0.5).direction
        tensor([-0.5000, -1.0000])
    """
    if problem := tensor_problem(value=value, gradient=gradient, hessian=hessian):
        raise TypeError(problem)
    if gradient.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(f"gradient must be float32 or float64, got {gradient.dtype}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if not 0 <= gamma_min < math.inf:
        raise ValueError(f"gamma_min must be at least 0 and finite, got {gamma_min}")
    if integer("max_halvings", max_halvings) < 1:
        raise ValueError(f"max_halvings must be at least 1, got {max_halvings}")
    if not (value.isfinite().all() and gradient.isfinite().all() and (hessian is None or all_finite(hessian))):
        raise ValueError("value, gradient and hessian must be finite, got NaN or infinity")
    metric = metric or Metric()
    length = float(metric.dual_norm(gradient))
    slack = _ROUNDING * torch.finfo(gradient.dtype).eps * max(1.0, abs(float(value)))
    for halvings in range(max_halvings):
        regularizer = length / gamma
        direction = metric.newton_direction(gradient, hessian, regularizer)
        if direction is not None:
            new_value, new_gradient = evaluate(direction)
            decrease = float(value) - float(new_value) + slack
            # As a product, so that a regulariser that has run out of digits is not divided by; a NaN is refused.
            if 8 * regularizer * decrease >= float(metric.dual_norm(new_gradient)) ** 2:
                ahead = max(2 * gamma, gamma_min)
                return GradientNormalizedStep(
                    direction, new_value, new_gradient, ahead, regularizer, n_solves=halvings + 1
                )
        gamma /= 2
    return None
