"""Low-rank projected gradient descent on the lifted variables."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize

from trimtab.solvers.supervised_dictionary.problem import (
    Factors,
    Matrix,
    Problem,
    Solution,
    regress,
    settled,
    unit_atoms,
)
from trimtab.solvers.supervised_dictionary.spectra import largest_spread, leading_eigenvectors, principal_axes

_TINY = np.finfo(np.float64).tiny
_NO_ATOM = 1e-12
_NO_WEIGHT = 1e-10  # of reconstruction in a projection, as a share of the labels', where xi is zero


class Projection(NamedTuple):
    """The nearest pair of joint rank r.

    Attributes:
        A: the labels' block.
        error: squared reconstruction error of the data's block.
        before: the labels' block that was projected.
        vectors: the singular vectors kept.
    """

    A: Matrix
    error: float
    before: Matrix
    vectors: Matrix


class FilterLift:
    """The labels' block A (features, classes - 1), beside B, in the filter form.

    The two share their left singular vectors, which lie in the space of the samples: eigenvectors there of
    `weight A A' + 2 xi X' X` (X with samples in rows).
    """

    def __init__(self, problem: Problem, rank: int) -> None:
        self.X, self.rank = problem.X, rank
        self.basis, self.spectrum = principal_axes(problem.X)
        self.shared = 2.0 if problem.Z.shape[1] > 1 else 1.0
        # Data that are constant need a weight too.
        spread = max(largest_spread(problem, self.basis, self.spectrum), _TINY)
        self.weight = self.shared * problem.curvature * spread + problem.nu
        self.data_weight = max(2 * problem.xi, _NO_WEIGHT * self.weight / max(float(self.spectrum[0]), _TINY))
        self.shape = (problem.X.shape[1], problem.Y.shape[1])
        self.logits, self.gradient = problem.responses, problem.pull

    def project(self, A: Matrix) -> Projection:
        inner = self.basis.T @ A
        _, vectors = leading_eigenvectors(
            lambda v: self.data_weight * self.spectrum[:, None] * v + self.weight * (inner @ (inner.T @ v)),
            len(inner),
            self.rank,
        )
        error = float(self.spectrum.sum() - (self.spectrum @ vectors**2).sum())
        return Projection(self.basis @ (vectors @ (vectors.T @ inner)), max(error, 0.0), A, vectors)

    def factors(self, found: Projection, extra: Matrix) -> Factors:
        W = self.basis @ found.vectors
        return Factors(W, self.X @ W, W.T @ found.A, extra)


class FeatureLift:
    """The labels' block A (n, classes - 1), on top of B, in the feature form.

    The two share their right singular vectors, the codes; the left ones are eigenvectors of the Gram matrix of
    `[sqrt(weight) A, sqrt(2 xi) X]`, taken on the principal axes of X, where it is diagonal but for A's rows.
    """

    def __init__(self, problem: Problem, rank: int) -> None:
        self.X, self.rank = problem.X, rank
        self.basis, self.spectrum = principal_axes(problem.X)
        self.shared = 2.0
        self.weight = self.shared * problem.curvature + problem.nu
        self.data_weight = 2 * problem.xi
        self.shape = problem.Y.shape

    def logits(self, A: Matrix) -> Matrix:
        return A

    def gradient(self, slope: Matrix) -> Matrix:
        return slope

    def project(self, A: Matrix) -> Projection:
        k = A.shape[1]
        corner = self.weight * (A.T @ A)
        side = math.sqrt(self.weight * self.data_weight) * (self.basis.T @ (self.X.T @ A))
        values, vectors = leading_eigenvectors(
            lambda v: np.concatenate(
                [
                    corner @ v[:k] + side.T @ v[k:],
                    side @ v[:k] + self.data_weight * self.spectrum[:, None] * v[k:],
                ]
            ),
            k + len(self.spectrum),
            self.rank,
        )
        of_labels, of_data = vectors[:k], vectors[k:]
        turned = math.sqrt(self.data_weight / self.weight) * (self.basis @ (of_data @ of_labels.T))
        kept = float((values * (of_data**2).sum(0)).sum()) / self.data_weight
        projected = A @ (of_labels @ of_labels.T) + self.X @ turned
        return Projection(projected, max(float(self.spectrum.sum()) - kept, 0.0), A, vectors)

    def factors(self, found: Projection, extra: Matrix) -> Factors:
        k = self.shape[1]
        of_labels, of_data = found.vectors[:k], found.vectors[k:]
        # A code of nothing but the labels has no atom: what is left is rounding.
        of_data = np.where(np.linalg.norm(of_data, axis=0) > _NO_ATOM, of_data, 0.0)
        W = self.basis @ of_data / math.sqrt(self.data_weight)
        codes = math.sqrt(self.weight) * found.before @ of_labels + math.sqrt(self.data_weight) * (
            self.X @ (self.basis @ of_data)
        )
        return unit_atoms(Factors(W, codes, of_labels.T / math.sqrt(self.weight), extra), "feature")


def lifted_descent(problem: Problem, rank: int, *, accelerated: bool, max_iter: int, tol: float) -> Solution:
    """Low-rank projected gradient descent at the step 1 / L, from the better of two starts.

    One is the minimum without a constraint on the rank, at which B is X itself and A a logistic regression. The other
    is the truncated SVD of X and a regression on that. From there, as from zero, projections leave nothing of a
    direction in which the data vary little: a step would have to make the labels' block outweigh the data's at once.
    """
    lift = (FilterLift if problem.mode == "filter" else FeatureLift)(problem, rank)
    W = lift.basis[:, :rank]
    beta, extra = np.zeros((rank, problem.Y.shape[1])), np.zeros((problem.Z.shape[1], problem.Y.shape[1]))
    plain = regress(problem, Factors(W, problem.X @ W, beta, extra), 20, math.inf)
    on_axes = (plain.components if problem.mode == "filter" else plain.codes) @ plain.coef
    go = partial(descend, problem, lift, accelerated=accelerated, tol=tol)
    starts = relax(problem, lift, max_iter, tol), (on_axes, plain.extra)
    start = min(starts, key=lambda start: go(*start, max_iter=0).history[0])
    end = go(*start, max_iter=max_iter)
    return Solution(lift.factors(end.found, end.extra), end.history, end.converged)


def relax(
    problem: Problem, lift: FilterLift | FeatureLift, max_iter: int, tol: float
) -> tuple[Matrix, Float[Matrix, "extra k"]]:
    """The labels' block and the covariates' where the rank is not constrained, by L-BFGS."""
    size = lift.shape[0]

    def value_and_gradient(flat: Matrix) -> tuple[float, Matrix]:
        both = flat.reshape(-1, problem.Y.shape[1])
        A, extra = both[:size], both[size:]
        logits = lift.logits(A) + problem.Z @ extra
        slope = problem.slope(logits)
        gradient = [lift.gradient(slope) + problem.nu * A, problem.Z.T @ slope + problem.penalty @ extra]
        return problem.label_loss(logits, A, extra), np.concatenate(gradient).ravel()

    start = np.zeros((size + problem.Z.shape[1]) * problem.Y.shape[1])
    found = minimize(
        value_and_gradient,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iter, "ftol": tol, "gtol": 0.0},
    )
    both = found.x.reshape(-1, problem.Y.shape[1])
    return both[:size], both[size:]


class Descent(NamedTuple):
    """Where projected gradient descent ended, in the lifted variables."""

    found: Projection
    extra: Matrix
    history: list[float]
    converged: bool


def descend(
    problem: Problem,
    lift: FilterLift | FeatureLift,
    A: Matrix,
    extra: Matrix,
    *,
    accelerated: bool,
    max_iter: int,
    tol: float,
) -> Descent:
    """Projected gradient descent; the covariates' block is not projected, and is measured in its own metric.

    With `accelerated`, gradients are taken at a point beyond the last one (Nesterov), from anew wherever the objective
    would rise.
    """
    Z = problem.Z
    inverse = np.linalg.pinv(lift.shared * problem.curvature * (Z.T @ Z) + problem.penalty, hermitian=True)
    found = lift.project(A)
    A, logits = found.A, lift.logits(found.A) + Z @ extra
    value = problem.label_loss(logits, A, extra) + problem.xi * found.error
    old_A, old_extra, old_logits = A, extra, logits
    pace, history, converged = 1.0, [value], False
    for _ in range(max_iter):
        next_pace = (1 + math.sqrt(1 + 4 * pace**2)) / 2
        ahead = (pace - 1) / next_pace if accelerated else 0.0
        point_A, point_extra = A + ahead * (A - old_A), extra + ahead * (extra - old_extra)
        slope = problem.slope(logits + ahead * (logits - old_logits))
        trial = lift.project(point_A - (lift.gradient(slope) + problem.nu * point_A) / lift.weight)
        new_extra = point_extra - inverse @ (Z.T @ slope + problem.penalty @ point_extra)
        new_logits = lift.logits(trial.A) + Z @ new_extra
        new_value = problem.label_loss(new_logits, trial.A, new_extra) + problem.xi * trial.error
        old_A, old_extra, old_logits = A, extra, logits
        if ahead and new_value > value:
            pace = 1.0
            continue
        found, A, extra, logits, pace = trial, trial.A, new_extra, new_logits, next_pace
        history.append(new_value)
        converged = settled(history, tol)
        value = new_value
        if converged:
            break
    return Descent(found, extra, history, converged)
