"""Second-order methods that others are measured against: damped, cubic-regularised and super-universal Newton.

Each takes a function with its derivatives and calls `record` with the start and every iterate. Near the solution a
decrease may fall short by as much as rounding explains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import scipy.optimize
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

Record = Callable[[Tensor], object]
_ROUNDING = 1e-15
_MAX_TRIES = 60


class SmoothFunction(Protocol):
    """A function of a vector with its derivatives."""

    def __call__(self, x: Float[Tensor, " d"]) -> Float[Tensor, ""]: ...

    def gradient(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]: ...

    def hessian(self, x: Float[Tensor, " d"]) -> Float[Tensor, "d d"]: ...

    def hessian_vector(self, x: Float[Tensor, " d"], v: Float[Tensor, " d"]) -> Float[Tensor, " d"]: ...


class Start(SmoothFunction, Protocol):
    """A function that says where to begin, and is told of every iterate."""

    start: Tensor

    def record(self, x: Float[Tensor, " d"]) -> None: ...


def run(method: Callable[[SmoothFunction, Tensor, float, int, Record], None], oracle: Start) -> None:
    """A method, to the end that the function puts to it."""
    method(oracle, oracle.start, 0.0, 10**6, oracle.record)


def damped_newton(fun: SmoothFunction, x: Tensor, tol: float, max_iter: int, record: Record) -> None:
    """Newton's direction, halved until the value falls by a ten-thousandth of what the slope promises (Armijo)."""
    record(x)
    value, gradient = fun(x), fun.gradient(x)
    for _ in range(max_iter):
        if gradient.norm() <= tol:
            return
        direction = _newton_direction(fun.hessian(x), gradient)
        slope, length = gradient.dot(direction), 1.0
        for _ in range(_MAX_TRIES):
            ahead = fun(x + length * direction)
            if ahead <= value + 1e-4 * length * slope + _slack(value):
                break
            length /= 2
        x = x + length * direction
        value, gradient = ahead, fun.gradient(x)
        record(x)


def _newton_direction(hessian: Tensor, gradient: Tensor) -> Tensor:
    """Where the Hessian is not positive definite, a multiple of the identity is added that grows until it is."""
    added = 1e-10 * float(hessian.diagonal().abs().max())
    factor, failed = torch.linalg.cholesky_ex(hessian)
    while failed:
        system = hessian.clone()
        system.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(system)
        added *= 10
    return -torch.cholesky_solve(gradient[:, None], factor)[:, 0]


def cubic_newton(fun: SmoothFunction, x: Tensor, tol: float, max_iter: int, record: Record) -> None:
    """Steps to the minimum of the second-order model plus `M / 6` times the cubed length (Nesterov and Polyak, 2006).

    M doubles until the model bounds the value, and halves after every step. One eigendecomposition serves all tries.
    """
    record(x)
    value, gradient, weight = fun(x), fun.gradient(x), 1.0
    for _ in range(max_iter):
        if gradient.norm() <= tol:
            return
        curvatures, axes = torch.linalg.eigh(fun.hessian(x))
        slopes = axes.mT @ gradient
        for _ in range(_MAX_TRIES):
            step = _cubic_step(slopes, curvatures, weight)
            model = slopes.dot(step) + 0.5 * curvatures.dot(step**2) + weight / 6 * step.norm() ** 3
            ahead = fun(x + axes @ step)
            if ahead <= value + model + _slack(value):
                break
            weight *= 2
        x = x + axes @ step
        value, gradient, weight = ahead, fun.gradient(x), max(weight / 2, 1e-5)
        record(x)


def _cubic_step(slopes: Tensor, curvatures: Tensor, weight: float) -> Tensor:
    """The model's minimum in the coordinates of the eigenvectors, where no curvature is negative."""
    curvatures = curvatures.clamp(min=0)

    def step(length: float) -> Tensor:
        return -slopes / (curvatures + 0.5 * weight * length)

    def excess(logarithm: float) -> float:
        length = float(np.exp(logarithm))
        return logarithm - float(step(length).norm().log())

    longest = float((2 * slopes.norm() / weight).sqrt().log())  # the step's length without any curvature
    shortest = longest
    while excess(shortest) > 0:
        shortest -= 5
    if shortest == longest:
        return step(float(np.exp(longest)))
    return step(float(np.exp(scipy.optimize.brentq(excess, shortest, longest, xtol=1e-12))))


def super_universal_newton(
    fun: SmoothFunction,
    x: Tensor,
    tol: float,
    max_iter: int,
    record: Record,
    *,
    power: float = 1.0,
    hessian: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Newton's system regularised by a constant times a power of the gradient's norm (Doikov et al., 2024).

    The constant is divided by four after every step, and multiplied by four until the next gradient agrees with the
    step.

    Args:
        fun: the function.
        x: the start.
        tol: norm of the gradient at which to stop.
        max_iter: most steps.
        record: called with the start and every iterate.
        power: of the gradient's norm.
        hessian: what stands in the Hessian's place; the function's own if not given.
    """
    record(x)
    gradient, constant = fun.gradient(x), 1.0
    for _ in range(max_iter):
        if gradient.norm() <= tol:
            break
        curvature = (hessian or fun.hessian)(x)
        for _ in range(_MAX_TRIES):
            regularizer = constant * gradient.norm() ** power
            system = curvature.clone()
            system.diagonal().add_(regularizer)
            direction = _newton_direction(system, gradient)
            ahead = fun.gradient(x + direction)
            if -ahead.dot(direction) >= ahead.square().sum() / (4 * regularizer):
                break
            constant *= 4
        x = x + direction
        gradient, constant = ahead, max(constant / 4, 1e-5)
        record(x)


def trust_ncg(fun: SmoothFunction, x: Tensor, tol: float, max_iter: int, record: Record) -> None:
    """SciPy's trust-region Newton method with conjugate gradients; no matrix is ever formed."""

    def tensors(function: Callable[[Tensor], Tensor]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        return lambda z: function(torch.from_numpy(z)).numpy()

    minimize: Any = scipy.optimize.minimize
    record(x)
    minimize(
        lambda z: float(fun(torch.from_numpy(z))),
        x.numpy(),
        method="trust-ncg",
        jac=tensors(fun.gradient),
        hessp=lambda z, v: fun.hessian_vector(torch.from_numpy(z), torch.from_numpy(v)).numpy(),
        callback=lambda z: record(torch.from_numpy(z)),
        options={"gtol": tol, "maxiter": max_iter},
    )


def _slack(value: Tensor) -> float:
    return _ROUNDING * max(1.0, abs(float(value)))
