r"""A dictionary of few atoms that reconstructs the data and tells their classes apart at once.

Reach for it where a handful of features must both describe the samples and predict a label, above all where the
directions that matter for the label carry little of the variance, so that PCA or NMF before a classifier loses them.

With data $X$ ($p \times n$), dictionary $W$ ($p \times r$), codes $H$, covariates $z_i$ that go past the dictionary and
the negative log-likelihood $\ell$ of a logistic regression whose first class is the reference, it minimises

$$
\sum_i \ell\big(y_i,\; \beta^\top f_i + \Gamma^\top z_i + b\big) + \xi \lVert X - W H \rVert_F^2
    + \tfrac{\nu}{2} \big(\lVert A \rVert_F^2 + \lVert \Gamma \rVert_F^2\big),
$$

where $f_i$ is what the dictionary's filters answer, $W^\top x_i$ with $A = W \beta$ ("filter"), or the sample's code,
$h_i$ with $A = \beta^\top H$ ("feature").

*Low-rank projected gradient descent* lifts this to $(A, B = W H, \Gamma)$, in which it is convex but for one
constraint: $[A, B]$, side by side or one above the other, has rank $r$. Each step descends along the gradient and goes
back by a truncated SVD. *Block coordinate descent* goes through $W$, $H$ and $(\beta, \Gamma, b)$, each within a ball
around its last value that shrinks; there, $W$ and $H$ may be kept from being negative.

Reference:
    Joowon Lee, Hanbaek Lyu and Weixin Yao, "Supervised Dictionary Learning with Auxiliary Covariates", 2022,
    arXiv 2206.06774.

Of the many units in which $A$ can be measured beside $B$, which change neither the objective nor the constraint, the
projected gradient takes the one that gives both blocks the same Lipschitz constant. At the step $1 / L$ this makes the
step in $B$ land on $X$ itself, so that $B$ need not be stored and a projection is an eigenproblem of the Gram matrix of
$X$ with a change of rank one for each class. It starts from the minimum without the rank constraint, or from a
truncated SVD, where the authors' release starts at random. The intercept is not penalised, as is usual. In each block
of coordinate descent a quadratic bound is minimised, where the authors' release takes decreasing steps, so that the
objective never rises. A test sample's code is the best one for its reconstruction. (The paper also searches over
labels: with two classes and free codes that gives the same label.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Self, cast, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh
from scipy.optimize import minimize
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_non_negative, validate_data

Matrix = NDArray[np.float64]
Mode = Literal["filter", "feature"]
Solver = Literal["lpgd", "bcd"]

_DENSE = 200  # size up to which all eigenvalues cost less than the leading ones
_FILTER_STEPS = 5  # on the dictionary, whose loss is far from quadratic in the filter form
_PATIENCE = 5  # iterations: after a start, accelerated steps are small
_TINY = np.finfo(np.float64).tiny
_EIGEN_TOL = 1e-10
_NO_ATOM = 1e-12
_NO_WEIGHT = 1e-10  # of reconstruction in a projection, as a share of the labels', where xi is zero


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


def probe(size: int) -> Float[Matrix, " size"]:
    """What Lanczos' iteration starts from: random, and always the same."""
    return np.random.RandomState(0).uniform(-1, 1, size)


def log_partition(logits: Float[Matrix, "n k"]) -> Float[Matrix, "n 1"]:
    """Logarithm of the sum of exponentials, that of the reference class, exp(0), included."""
    top = np.maximum(logits.max(1, keepdims=True), 0)
    return cast(Matrix, top + np.log(np.exp(-top) + np.exp(logits - top).sum(1, keepdims=True)))


# Low-rank projected gradient descent


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


def principal_axes(X: Float[Matrix, "n p"]) -> tuple[Float[Matrix, "p m"], Float[Matrix, " m"]]:
    """Orthonormal directions in which the rows of X are uncorrelated, m = min(n, p), and the sums of squares there."""
    n, p = X.shape
    if n < p:
        basis, triangle = np.linalg.qr(X.T)
        values, vectors = eigh(triangle @ triangle.T)
        vectors = basis @ vectors
    else:
        values, vectors = eigh(X.T @ X)
    return vectors[:, ::-1], np.maximum(values[::-1], 0.0)


def largest_spread(problem: Problem, basis: Matrix, spectrum: Matrix) -> float:
    """The largest eigenvalue of the centred samples' Gram matrix, from the principal axes of those not centred."""
    mean = (problem.mean @ basis)[:, None]
    values, _ = leading_eigenvectors(
        lambda v: spectrum[:, None] * v - len(problem.X) * mean @ (mean.T @ v), len(mean), 1
    )
    return float(values[0])


def leading_eigenvectors(
    product: Callable[[Matrix], Matrix], size: int, count: int
) -> tuple[Float[Matrix, " count"], Float[Matrix, "size count"]]:
    """The largest eigenvalues of a symmetric matrix, in falling order, with their vectors.

    Args:
        product: multiplies the matrix with (size, any) columns.
        size: of the matrix.
        count: how many. Where that is few of many, Lanczos' iteration finds them.
    """
    if size <= max(_DENSE, 3 * count):
        values, vectors = eigh(product(np.eye(size)), subset_by_index=(size - count, size - 1))
    else:
        operator = LinearOperator((size, size), matvec=lambda v: product(v.reshape(-1, 1))[:, 0], dtype=np.float64)
        values, vectors = eigsh(operator, k=count, which="LA", v0=probe(size), tol=_EIGEN_TOL)
    return values[::-1], vectors[:, ::-1]


# Block coordinate descent


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


def within(radius: float, centre: Matrix, point: Matrix) -> Matrix:
    """The point, or where the way there from the centre leaves the ball; on it a convex function falls too."""
    distance = float(np.linalg.norm(point - centre))
    return point if distance <= radius else centre + (radius / distance) * (point - centre)


def unit_atoms(factors: Factors, mode: Mode) -> Factors:
    """The same model with atoms of length one, those of zeros excepted."""
    length = np.linalg.norm(factors.components, axis=0)
    length[length == 0] = 1.0
    coef = factors.coef * length[:, None] if mode == "filter" else factors.coef / length[:, None]
    return Factors(factors.components / length, factors.codes * length, coef, factors.extra)


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


def reconstruction_codes(
    X: Float[Matrix, "n p"], components: Float[Matrix, "p r"], nonnegative: bool = False
) -> Float[Matrix, "n r"]:
    """The codes with the least squared error, (n, r)."""
    if not nonnegative:
        return X @ np.linalg.pinv(components).T
    gram, target = components.T @ components, X @ components
    codes = np.zeros_like(target)
    for _ in range(500):
        new = minimise_bound(codes, codes @ gram - target, gram, nonnegative=True)
        change, codes = np.abs(new - codes).max(initial=0.0), new
        if change <= 1e-8 * np.abs(codes).max(initial=0.0):
            break
    return codes


class SupervisedDictionary(ClassNamePrefixFeaturesOutMixin, ClassifierMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Supervised dictionary learning: a classifier on a dictionary that also reconstructs the data.

    Features should be of similar scale; they are not centred. The error of the whole matrix is weighed against the sum
    of all samples' losses, so that `xi = len(X) / (X**2).sum()` gives an unexplained sample the weight of a loss of 1.

    Args:
        n_components: r, the number of atoms, in [1, min(n_samples, n_features)].
        mode: "filter" (labels are regressed on the responses of the atoms as filters: linear in the data, the better
            start) or "feature" (on the codes, which at training know the labels).
        solver: "lpgd" (low-rank projected gradient of the lifted problem) or "bcd" (block coordinate
            descent, from a random dictionary).
        xi: weight of the squared reconstruction error, at least 0, and positive in the feature form.
        nu: weight of the penalty on the regression's coefficients, at least 0.
        nonnegative: no negative entries in atoms and codes; "bcd" only.
        accelerated: extrapolate between the steps of "lpgd"; the paper's algorithm does not.
        radius: of the first ball around the last iterate of "bcd"; infinite for none.
        max_iter: most iterations.
        tol: relative fall of the objective in five iterations at which to stop.
        random_state: draws the dictionary that "bcd" starts from, and on which the minimum it finds depends: None, an
            integer or a `numpy.random.RandomState`.

    Attributes:
        classes_: the labels, sorted.
        components_: (r, n_features), atoms of length one.
        codes_: (n_samples, r), of the training data.
        coef_: (classes - 1, r), of the classes but the first, on filter responses `X @ components_.T` or codes.
        intercept_: (classes - 1,).
        aux_coef_: (classes - 1, n_aux).
        history_: the objective at the start and after every iteration.
        n_iter_: iterations after the start.
        n_features_in_: number of features.

    Raises:
        ValueError: the data are not finite or of one class, or an argument is out of its range.

    Warns:
        sklearn.exceptions.ConvergenceWarning: the objective still fell by more than `tol` in the last five iterations.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(400, 5)) * [10, 8, 6, 4, 1]
        >>> y = np.where(X[:, 4] > 0, "up", "down")  # the direction of least variance
        >>> model = SupervisedDictionary(n_components=2, xi=1e-3).fit(X, y)
        >>> model.score(X, y) > 0.95, model.transform(X).shape
        (True, (400, 2))
    """

    def __init__(
        self,
        n_components: int = 2,
        *,
        mode: Mode = "filter",
        solver: Solver = "lpgd",
        xi: float = 1.0,
        nu: float = 0.1,
        nonnegative: bool = False,
        accelerated: bool = True,
        radius: float = 1000.0,
        max_iter: int = 500,
        tol: float = 1e-4,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.mode = mode
        self.solver = solver
        self.xi = xi
        self.nu = nu
        self.nonnegative = nonnegative
        self.accelerated = accelerated
        self.radius = radius
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Float[ArrayLike, "n p"], y: ArrayLike, aux: Float[ArrayLike, "n q"] | None = None) -> Self:
        """Learns dictionary and classifier.

        Args:
            X: data, samples in rows.
            y: (n,) labels.
            aux: covariates that the labels depend on and the dictionary need not reconstruct.
        """
        self._check_arguments()
        data, targets = validate_data(self, X, y, dtype=np.float64)
        if self.nonnegative:
            check_non_negative(data, "SupervisedDictionary with nonnegative=True (input X)")
        check_classification_targets(targets)
        self.classes_, labels = np.unique(targets, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, got 1 class, {self.classes_[0]!r}")
        if not 1 <= self.n_components <= min(data.shape):
            raise ValueError(
                f"n_components must be in [1, {min(data.shape)}] for n_samples = {data.shape[0]}, n_features = "
                f"{data.shape[1]}; got {self.n_components}"
            )
        covariates = np.empty((len(data), 0)) if aux is None else _read_aux(aux, len(data))
        means = covariates.mean(0)
        problem = Problem(
            data,
            data.mean(0),
            np.eye(len(self.classes_))[labels][:, 1:],
            np.concatenate([np.ones((len(data), 1)), covariates - means], axis=1),
            self.mode,
            self.xi,
            self.nu,
        )
        solve: Callable[..., Solution] = (
            partial(lifted_descent, accelerated=self.accelerated)
            if self.solver == "lpgd"
            else partial(
                block_descent,
                nonnegative=self.nonnegative,
                radius=self.radius,
                rng=check_random_state(self.random_state),
            )
        )
        found = solve(problem, self.n_components, max_iter=self.max_iter, tol=self.tol)
        if not found.converged:
            warnings.warn(
                f"SupervisedDictionary: the objective did not settle within {self.max_iter} iterations; raise max_iter "
                "or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        factors = found.factors
        # Signs are free: the largest entry of an atom is positive.
        largest = np.abs(factors.components).argmax(0)
        signs = np.where(factors.components[largest, np.arange(self.n_components)] < 0, -1.0, 1.0)
        self.components_ = (factors.components * signs).T
        self.codes_ = factors.codes * signs
        self.coef_ = factors.coef.T * signs
        self.aux_coef_ = factors.extra[1:].T.copy()
        self.intercept_ = factors.extra[0] - self.aux_coef_ @ means
        if self.mode == "filter":
            self.intercept_ -= self.coef_ @ (self.components_ @ problem.mean)
        self.history_ = found.history
        self.n_iter_ = max(1, len(found.history) - 1)
        return self

    def transform(self, X: Float[ArrayLike, "n p"]) -> NDArray[np.floating]:
        """The codes with which the dictionary reconstructs X best, (n, r)."""
        check_is_fitted(self)
        data = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        codes = reconstruction_codes(data.astype(np.float64, copy=False), self.components_.T, self.nonnegative)
        return cast(NDArray[np.floating], codes.astype(data.dtype, copy=False))

    def inverse_transform(self, X: Float[ArrayLike, "n r"]) -> NDArray[np.floating]:
        """The data that codes stand for, (n, p)."""
        check_is_fitted(self)
        codes = check_array(X, dtype=[np.float64, np.float32])
        if codes.shape[1] != self.n_components:
            raise ValueError(f"X must have {self.n_components} columns, one for each atom, got {codes.shape[1]}")
        return cast(NDArray[np.floating], codes @ self.components_.astype(codes.dtype, copy=False))

    def decision_function(
        self, X: Float[ArrayLike, "n p"], aux: Float[ArrayLike, "n q"] | None = None
    ) -> Float[Matrix, "..."]:
        """Log-odds of the second class, (n,), or with more classes those of each against the first, (n, classes)."""
        logits = self._logits(X, aux)
        return logits[:, 0] if len(self.classes_) == 2 else np.pad(logits, ((0, 0), (1, 0)))

    def predict_proba(
        self, X: Float[ArrayLike, "n p"], aux: Float[ArrayLike, "n q"] | None = None
    ) -> Float[Matrix, "n classes"]:
        """Probabilities of the classes."""
        return softmax(np.pad(self._logits(X, aux), ((0, 0), (1, 0))), axis=1)

    def predict(self, X: Float[ArrayLike, "n p"], aux: Float[ArrayLike, "n q"] | None = None) -> NDArray[Any]:
        """The most probable labels, (n,)."""
        logits = np.pad(self._logits(X, aux), ((0, 0), (1, 0)))
        return cast(NDArray[Any], self.classes_[logits.argmax(1)])

    def _logits(self, X: ArrayLike, aux: ArrayLike | None) -> Matrix:
        check_is_fitted(self)
        if self.mode == "filter":
            data = validate_data(self, X, dtype=np.float64, reset=False)
            features = data @ self.components_.T
        else:
            features = self.transform(X)
        given = np.empty((len(features), 0)) if aux is None else _read_aux(aux, len(features))
        if given.shape[1] != self.aux_coef_.shape[1]:
            raise ValueError(f"aux must have {self.aux_coef_.shape[1]} columns, as at fit, got {given.shape[1]}")
        logits: Matrix = features @ self.coef_.T + given @ self.aux_coef_.T + self.intercept_
        return logits

    def _check_arguments(self) -> None:
        for name, kinds in {"mode": Mode, "solver": Solver}.items():
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")
        for name in ("xi", "nu", "tol"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if self.mode == "feature" and not self.xi:
            raise ValueError(
                "xi must be positive in the feature form, where codes of new data come from reconstruction"
            )
        if self.nonnegative and self.solver != "bcd":
            raise ValueError(f'nonnegative must be False with solver "{self.solver}"; take solver "bcd"')
        if not self.radius > 0:
            raise ValueError(f"radius must be positive, got {self.radius}")
        if self.max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {self.max_iter}")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.input_tags.positive_only = self.nonnegative
        return tags

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)


def _read_aux(aux: ArrayLike, count: int) -> Matrix:
    found: Matrix = check_array(aux, dtype=np.float64, input_name="aux")
    if len(found) != count:
        raise ValueError(f"aux must have a row for each of the {count} samples, got {len(found)}")
    return found
