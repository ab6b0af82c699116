"""The whole search for a minimum of a plain function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import integer, non_negative, positive
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
from trimtab.optim.gradient_normalized.step import Metric, gradient_normalized_step


@dataclass(frozen=True)
class NewtonResult:
    """Where a minimisation ended, named like SciPy's results.

    Attributes:
        x: (d,), the point.
        fun: its value.
        jac: (d,), its gradient.
        nit: accepted steps.
        n_solves: linear systems solved, those of refused tries included.
        grad_norms: dual norm of the gradient at the start and after every step.
        gammas: radius of every accepted step.
        success: whether the gradient's norm fell to `grad_tol`.
        message: why it ended.
    """

    x: Float[Tensor, " d"]
    fun: float
    jac: Float[Tensor, " d"]
    nit: int
    n_solves: int
    grad_norms: tuple[float, ...]
    gammas: tuple[float, ...]
    success: bool
    message: str


@torch.no_grad()
def gradient_normalized_newton(
    fun: Function,
    x0: Float[Tensor, " d"],
    *,
    gradient: Gradient | None = None,
    hessian: HessianName | Curvature = "exact",
    metric: Float[Tensor, "d d"] | None = None,
    gamma: float = 1.0,
    grad_tol: float = 1e-8,
    max_iter: int = 1000,
    max_halvings: int = 40,
    callback: Callable[[Float[Tensor, " d"]], object] | None = None,
) -> NewtonResult:
    """Minimises a smooth function by Newton steps regularised by gradient-normalized smoothness.

    Derivatives are the function's own, if it has methods `gradient(x)` and `hessian(x)` as those of
    `trimtab.optim.objectives` have, and else found by `torch.func`. Use double precision: in single precision
    gradients seldom fall below 1e-4.

    Args:
        fun: maps (d,) to a scalar.
        x0: (d,), the start.
        gradient: maps (d,) to (d,); replaces the function's own.
        hessian: "exact"; "gauss_newton" or "fisher", for a function with methods of these names; "zero", for normalised
            gradient steps; or a function that maps (d,) to (d, d), symmetric and best positive semi-definite.
        metric: (d, d), the matrix B of the norm; the identity if not given.
        gamma: radius of the first try, positive.
        grad_tol: dual norm of the gradient at which to stop, at least 0.
        max_iter: most steps.
        max_halvings: most tries for a step, at least 1.
        callback: called with the start and the point after every step.

    Raises:
        TypeError: `x0` is not of floating point numbers of single or double precision.
        ValueError: an argument is out of its range, the function has no such Hessian, or its value, gradient or Hessian
            at an iterate is not finite or has the wrong shape.

    Example:
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> result = gradient_normalized_newton(rosenbrock, torch.tensor([-2.0, 2.0], dtype=torch.float64))
        >>> result.success, result.nit < 100
        (True, True)
        >>> torch.allclose(result.x, torch.ones(2, dtype=torch.float64))
        True
    """
    check_start(x0)
    positive("gamma", gamma)
    non_negative("grad_tol", grad_tol)
    integer("max_iter", max_iter, 0)
    integer("max_halvings", max_halvings)
    evaluate, curvature = derivatives(fun, gradient, hessian)
    norm = Metric(metric)
    x = x0.detach().clone()
    value, slope = checked(x, *evaluate(x))
    grad_norms, gammas, n_solves, message = [float(norm.dual_norm(slope))], [], 0, "the iterations are used up"
    if callback is not None:
        callback(x)
    for _ in range(max_iter):
        if grad_norms[-1] <= grad_tol:
            break
        step = gradient_normalized_step(
            lambda direction, x=x: evaluate(x + direction),  # type: ignore[misc]
            value,
            slope,
            checked_hessian(x, curvature(x)),
            gamma,
            metric=norm,
            max_halvings=max_halvings,
        )
        if step is None:
            n_solves += max_halvings
            message = "no step was accepted: the gradient is as small as rounding allows, or wrong"
            break
        x, value, slope, gamma = x + step.direction, step.value, step.gradient, step.gamma
        n_solves += step.n_solves
        grad_norms.append(float(norm.dual_norm(slope)))
        gammas.append(grad_norms[-2] / step.regularizer)
        if callback is not None:
            callback(x)
    success = grad_norms[-1] <= grad_tol
    return NewtonResult(
        x=x,
        fun=float(value),
        jac=slope,
        nit=len(gammas),
        n_solves=n_solves,
        grad_norms=tuple(grad_norms),
        gammas=tuple(gammas),
        success=success,
        message="the gradient's norm is within grad_tol" if success else message,
    )
