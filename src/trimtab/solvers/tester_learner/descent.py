"""The smoothed error of a halfspace, and projected stochastic gradient descent on it."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from trimtab.ops.arguments import labels, positive
from trimtab.solvers.tester_learner.directions import Matrix, read_samples, unit


def smoothed_error(
    w: Float[Matrix, " d"], X: Float[Matrix, "n d"], y: Float[Matrix, " n"], sigma: float
) -> tuple[float, Float[Matrix, " d"]]:
    """The smoothed error $L_\\sigma$ of the direction of w, and its gradient on the unit sphere.

    Args:
        w: (d,) weights, of which only the direction counts.
        X: (n, d) samples.
        y: (n,) labels, -1 and 1; of their means between, the gradient is the mean gradient.
        sigma: width of the band that counts, positive.

    Returns:
        The mean of $\\ell_\\sigma(-y \\langle w, x \\rangle)$ for w of unit length, and its gradient there, which is
        orthogonal to w.

    Raises:
        TypeError: an argument is no array of numbers.
        ValueError: shapes do not fit, a value is not finite, a label is beyond -1 and 1, w is zero, or sigma is not
            positive.

    Example:
        >>> value, gradient = smoothed_error(np.array([3.0, 4.0]), np.array([[4.0, -3.0]]), np.array([1.0]), sigma=0.5)
        >>> round(value, 6)
        0.5
        >>> gradient
        array([-8.,  6.])
    """
    read_samples(w, X, y)
    w, sigma = unit(w), positive("sigma", sigma)
    return float(_step(-y * (X @ w) / sigma).mean()), _gradient(w, X, y, sigma)


def _gradient(w: Matrix, X: Matrix, y: Matrix, sigma: float) -> Matrix:
    margins = (X @ w) / sigma
    inside = np.abs(margins) < 0.5
    pull = -(y[inside] * slope(margins[inside])) @ X[inside] / (sigma * len(X))
    gradient: Matrix = pull - (pull @ w) * w
    return gradient


def _step(t: Matrix) -> Matrix:
    """The smoothed step of width 1: linear in its middle third, and a cubic Hermite join to 0 and 1 on either side."""
    u = np.clip(3 * np.abs(t) - 0.5, 0, 1)
    rise = np.minimum(np.abs(t), 1 / 6) + (u + u**2 - u**3) / 3
    return 0.5 + np.sign(t) * rise


def slope(t: Matrix) -> Matrix:
    """The derivative of the smoothed step of width 1."""
    u = np.clip(3 * np.abs(t) - 0.5, 0, 1)
    return (1 - u) * (1 + 3 * u)


def halfspace_iterates(
    X: Float[Matrix, "n d"],
    y: Float[Matrix, " n"],
    sigma: float,
    *,
    start: Float[Matrix, " d"],
    batches: Int[NDArray[np.int64], "steps batch"],
    lr: float = 0.5,
) -> Float[Matrix, "steps_and_one d"]:
    """Projected stochastic gradient descent on the smoothed error, with step sizes `lr` / sqrt(t).

    Args:
        X: (n, d) samples.
        y: (n,) labels, -1 and 1.
        sigma: width of the band that counts, positive.
        start: (d,) first weights, not zero.
        batches: (steps, batch) the rows of X that each step looks at.
        lr: first step size, positive.

    Returns:
        The start and every iterate, each of unit length.

    Raises:
        TypeError: an argument is no array of numbers, or batches are no integers.
        ValueError: an argument is out of its range or not finite, or shapes do not fit.
    """
    read_samples(start, X, y)
    sigma, lr = positive("sigma", sigma), positive("lr", lr)
    if batches.ndim != 2 or not batches.shape[1]:
        raise ValueError(f"batches must be of shape (steps, batch) with batch > 0, got shape {batches.shape}")
    labels("batches", batches.ravel(), len(X))
    iterates = np.empty((len(batches) + 1, len(start)))
    iterates[0] = unit(start)
    for t, rows in enumerate(batches):
        w = iterates[t]
        iterates[t + 1] = unit(w - lr / math.sqrt(t + 1) * _gradient(w, X[rows], y[rows], sigma))
    return iterates
