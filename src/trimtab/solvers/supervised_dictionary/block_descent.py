"""Block coordinate descent on dictionary, codes and coefficients."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from trimtab.solvers.supervised_dictionary.problem import (
    Factors,
    Matrix,
    Problem,
    Solution,
    regress,
    settled,
    unit_atoms,
    within,
)
from trimtab.solvers.supervised_dictionary.spectra import largest_spread, principal_axes

_FILTER_STEPS = 5  # on the dictionary, whose loss is far from quadratic in the filter form


def block_descent(
    problem: Problem,
    rank: int,
    *,
    nonnegative: bool,
    radius: float,
    max_iter: int,
    tol: float,
    rng: np.random.RandomState,
) -> Solution:
    """Block coordinate descent from a random dictionary, within balls of radius `radius / (t log(t + 1))`."""
    X, Y, Z, xi, nu = problem.X, problem.Y, problem.Z, problem.xi, problem.nu
    filters = problem.mode == "filter"
    W = rng.uniform(size=(X.shape[1], rank)) if nonnegative else rng.normal(size=(X.shape[1], rank))
    W /= np.linalg.norm(W, axis=0)
    H = minimise_bound(np.zeros((len(X), rank)), -X @ W, W.T @ W, nonnegative)
    coef, extra = np.zeros((rank, Y.shape[1])), np.zeros((Z.shape[1], Y.shape[1]))
    # Largest second derivative in A, on which the responses to filters depend through the samples.
    spread = largest_spread(problem, *principal_axes(X)) if filters else 1.0
    bound = problem.curvature * max(spread, 0.0) + nu
    factors = regress(problem, Factors(W, H, coef, extra), steps=10, radius=math.inf)
    history, converged = [problem.loss(factors)], False
    for t in range(1, max_iter + 1):
        ball = radius / (t * math.log(t + 1))
        W, H, coef, extra = factors.components, factors.codes, factors.coef, factors.extra

        gram, target, centre = 2 * xi * (H.T @ H), 2 * xi * (X.T @ H), W
        if filters:
            steeper = gram + bound * (coef @ coef.T)
            for _ in range(_FILTER_STEPS):
                slope = problem.slope(problem.responses(W @ coef) + Z @ extra)
                gradient = W @ gram - target + (problem.pull(slope) + nu * (W @ coef)) @ coef.T
                W = within(ball, centre, minimise_bound(W, gradient, steeper, nonnegative))
        else:
            W = within(ball, centre, minimise_bound(W, W @ gram - target, gram, nonnegative))

        gradient, gram = 2 * xi * (H @ (W.T @ W) - X @ W), 2 * xi * (W.T @ W)
        if not filters:
            slope = problem.slope(H @ coef + Z @ extra)
            gradient += (slope + nu * (H @ coef)) @ coef.T
            gram += bound * (coef @ coef.T)
        H = within(ball, H, minimise_bound(H, gradient, gram, nonnegative))

        factors = unit_atoms(Factors(W, H, coef, extra), problem.mode)
        factors = regress(problem, factors, steps=3, radius=ball)
        history.append(problem.loss(factors))
        converged = settled(history, tol)
        if converged:
            break
    return Solution(factors, history, converged)


def minimise_bound(
    V: Float[Matrix, "n r"], gradient: Float[Matrix, "n r"], gram: Float[Matrix, "r r"], nonnegative: bool
) -> Float[Matrix, "n r"]:
    """Descends on the quadratic with this gradient at V and, in every row, this second derivative.

    To its minimum, or where entries must not be negative, by one exact minimisation of each column in turn.
    """
    if not nonnegative:
        return V - gradient @ np.linalg.pinv(gram, hermitian=True)
    V, gradient = V.copy(order="F"), gradient.copy(order="F")
    for k in np.flatnonzero(gram.diagonal() > 0):
        column = np.maximum(V[:, k] - gradient[:, k] / gram[k, k], 0)
        gradient += np.outer(column - V[:, k], gram[k])
        V[:, k] = column
    return V
