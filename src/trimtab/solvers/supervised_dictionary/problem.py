"""What supervised dictionary learning minimises, and the regression on a dictionary that stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Mode = Literal["filter", "feature"]

_PATIENCE = 5  # iterations: after a start, accelerated steps are small


@dataclass(frozen=True)
class Factors:
    """A dictionary and the regression on it. Classes but the first have a column each.

    Attributes:
        components: (features, r), the atoms W in columns.
        codes: (n, r), the transpose of H.
        coef: (r, classes - 1), beta.
        extra: (1 + aux, classes - 1), the intercept and Gamma.
    """

    components: Matrix
    codes: Matrix
    coef: Matrix
    extra: Matrix


class Solution(NamedTuple):
    """What a solver returns: the factors, the objective after every iteration, and whether it settled."""

    factors: Factors
    history: list[float]
    converged: bool


@dataclass(frozen=True)
class Problem:
    """Samples in rows, and the objective's weights.

    Filters answer to what is left of a sample without the mean. This changes the intercept alone, and leaves the
    blocks as far from parallel as can be.

    Attributes:
        X: (n, features).
        mean: (features,), of X.
        Y: (n, classes - 1), one-hot labels without the first class.
        Z: (n, 1 + aux), ones and the covariates, centred.
        mode: what the labels are regressed on.
        xi: weight of the reconstruction error.
        nu: weight of the penalty.
    """

    X: Matrix
    mean: Matrix
    Y: Matrix
    Z: Matrix
    mode: Mode
    xi: float
    nu: float

    @property
    def curvature(self) -> float:
        """Largest second derivative of a sample's loss in its logits."""
        return 0.25 if self.Y.shape[1] == 1 else 0.5

    @property
    def penalty(self) -> Float[Matrix, "extra extra"]:
        """Of the intercept, which has none, and the covariates."""
        return np.diag([0.0] + [self.nu] * (self.Z.shape[1] - 1))

    def label_loss(self, logits: Matrix, A: Matrix, extra: Matrix) -> float:
        """The objective without the reconstruction, at the logits that `A` and `extra` give."""
        return self.misfit(logits) + self.nu / 2 * float((A**2).sum() + (extra[1:] ** 2).sum())

    def misfit(self, logits: Matrix) -> float:
        """The negative log-likelihood."""
        return float(log_partition(logits).sum() - (self.Y * logits).sum())

    def slope(self, logits: Matrix) -> Matrix:
        """Derivative of the misfit in the logits: predicted probabilities less labels."""
        return cast(Matrix, np.exp(logits - log_partition(logits))) - self.Y

    def responses(self, filters: Float[Matrix, "p any"]) -> Float[Matrix, "n any"]:
        """The centred samples' inner products with filters."""
        return self.X @ filters - self.mean @ filters

    def pull(self, slope: Float[Matrix, "n any"]) -> Float[Matrix, "p any"]:
        """The transpose of `responses`."""
        return self.X.T @ slope - np.outer(self.mean, slope.sum(0))

    def features(self, components: Matrix, codes: Matrix) -> Matrix:
        """What the labels are regressed on, (n, r)."""
        return self.responses(components) if self.mode == "filter" else codes

    def loss(self, factors: Factors) -> float:
        """The objective."""
        W, H = factors.components, factors.codes
        A = (W if self.mode == "filter" else H) @ factors.coef
        logits = self.features(W, H) @ factors.coef + self.Z @ factors.extra
        return self.label_loss(logits, A, factors.extra) + self.xi * float(((self.X - H @ W.T) ** 2).sum())


def settled(history: list[float], tol: float) -> bool:
    """Whether the last iterations lowered the objective by no more than a share `tol`."""
    return len(history) > _PATIENCE and history[-1 - _PATIENCE] - history[-1] <= tol * abs(history[-1])


def log_partition(logits: Float[Matrix, "n k"]) -> Float[Matrix, "n 1"]:
    """Logarithm of the sum of exponentials, that of the reference class, exp(0), included."""
    top = np.maximum(logits.max(1, keepdims=True), 0)
    return cast(Matrix, top + np.log(np.exp(-top) + np.exp(logits - top).sum(1, keepdims=True)))


def unit_atoms(factors: Factors, mode: Mode) -> Factors:
    """The same model with atoms of length one, those of zeros excepted."""
    length = np.linalg.norm(factors.components, axis=0)
    length[length == 0] = 1.0
    coef = factors.coef * length[:, None] if mode == "filter" else factors.coef / length[:, None]
    return Factors(factors.components / length, factors.codes * length, coef, factors.extra)


def within(radius: float, centre: Matrix, point: Matrix) -> Matrix:
    """The point, or where the way there from the centre leaves the ball; on it a convex function falls too."""
    distance = float(np.linalg.norm(point - centre))
    return point if distance <= radius else centre + (radius / distance) * (point - centre)


def regress(problem: Problem, factors: Factors, steps: int, radius: float) -> Factors:
    """Newton steps in the regression's coefficients, halved until the objective falls."""
    W, H = factors.components, factors.codes
    rank = W.shape[1]
    design = np.concatenate([problem.features(W, H), problem.Z], axis=1)
    size, classes = design.shape[1], problem.Y.shape[1]
    penalty = np.zeros((size, size))
    penalty[:rank, :rank] = problem.nu * (W.T @ W if problem.mode == "filter" else H.T @ H)
    penalty[rank:, rank:] = problem.penalty

    def loss(theta: Matrix) -> float:
        return problem.misfit(design @ theta) + float((theta * (penalty @ theta)).sum()) / 2

    centre = theta = np.concatenate([factors.coef, factors.extra])
    value = loss(theta)
    for _ in range(steps):
        slope = problem.slope(design @ theta)
        chance = slope + problem.Y
        gradient = design.T @ slope + penalty @ theta
        # Second derivatives, class by class: p_a (1 if a is b) - p_a p_b.
        weighted = (chance[:, :, None] * design[:, None, :]).reshape(len(design), -1)
        hessian = -weighted.T @ weighted
        own = np.einsum("nas,nt->ast", weighted.reshape(len(design), classes, size), design, optimize=True) + penalty
        for a in range(classes):
            hessian[a * size : (a + 1) * size, a * size : (a + 1) * size] += own[a]
        hessian.flat[:: len(hessian) + 1] += 1e-10 * (1 + np.trace(hessian) / len(hessian))
        step = np.linalg.solve(hessian, gradient.T.ravel()).reshape(classes, size).T
        share, floor = 1.0, 1e-6
        while share > floor:
            new = within(radius, centre, theta - share * step)
            if (new_value := loss(new)) < value:
                break
            share /= 2
        if share <= floor:
            break
        settled = value - new_value <= 1e-9 * abs(value)
        theta, value = new, new_value
        if settled:
            break
    return Factors(W, H, theta[:rank], theta[rank:])
