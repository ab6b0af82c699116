r"""CoLiDE: learns a linear causal graph together with the scale of its noise.

For observational data of a linear structural equation model $x = W^\top x + z$. As the noise scale is estimated beside
the weights, the sparsity weight $\lambda$ need not follow the noise; with `noise="unequal"` every variable has a scale
of its own.

For centred data with covariance $S$, at every stage of a path $\mu \to 0$:

$$
\min_{W,\ \sigma \ge \sigma_0}\ \mu \left[ \frac{1}{2\sigma} \operatorname{tr}\left((I-W)^\top S (I-W)\right)
+ \frac{d\sigma}{2} + \lambda \lVert W \rVert_1 \right] + d \log s - \log\det(s I - W \circ W)
$$

$$
\hat\sigma = \max\left(\sqrt{\operatorname{tr}\left((I-W)^\top S (I-W)\right) / d},\ \sigma_0\right), \qquad
\hat\sigma_j = \max\left(\sqrt{\left[(I-W)^\top S (I-W)\right]_{jj}},\ \sigma_{0j}\right)
$$

Reference: Seyed Saman Saboksayr, Gonzalo Mateos and Mariano Tepper, "CoLiDE: Concomitant Linear DAG Estimation",
ICLR 2024, arXiv 2310.02895.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import lapack
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_array, validate_data

from trimtab.ops.arguments import in_range, integer, non_negative, one_of, positive
from trimtab.solvers.acyclicity import check_weights, h_logdet, is_dag, to_dag
from trimtab.solvers.order_scores import covariance, noise_unit

Matrix = NDArray[np.float64]
Noise = Literal["equal", "unequal"]

_LEAST_SCALE = 1e-2  # of the noise, as a share of the data's (the bound sigma_0)
_LEAST_RATE = 1e-16
_STRONG = 0.5  # correlation
_OUTSIDE = -1e-6  # an entry of the inverse below it: not an M-matrix
_CHECK_EVERY = 1000


def colide_score(
    W: Float[ArrayLike, "d d"], S: Float[ArrayLike, "d d"], sigma: float | Float[ArrayLike, " d"]
) -> tuple[float, Float[Matrix, "d d"]]:
    """The score without its penalties, and its gradient with respect to W (Section 4).

    Args:
        W: (d, d) weights, those of the edges i -> j in row i.
        S: (d, d) covariance.
        sigma: standard deviation of the noise, positive: one number, or (d,) numbers.

    Raises:
        ValueError: an argument is not finite or of another shape, or sigma is not positive.

    Example:
        >>> value, gradient = colide_score([[0.0, 1.0], [0.0, 0.0]], [[4.0, 6.0], [6.0, 12.0]], sigma=2.0)
        >>> value
        4.0
        >>> gradient
        array([[-2., -1.], [-3., -3.]])
    """
    rest, image = _residuals(W, S)
    scale = np.asarray(sigma, dtype=np.float64)
    if scale.shape not in ((), (len(rest),)) or not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ValueError(f"sigma must be one or {len(rest)} positive numbers, got {scale}")
    scale = np.broadcast_to(scale, len(rest))
    return float((((rest * image).sum(0) / scale) + scale).sum() / 2), -image / scale


def noise_scale(
    W: Float[ArrayLike, "d d"], S: Float[ArrayLike, "d d"], noise: Noise = "equal"
) -> float | Float[Matrix, " d"]:
    """The standard deviation of the noise that minimises `colide_score` given W: one number, or one for each variable.

    At least a hundredth of that of the data.

    Raises:
        ValueError: an argument is not finite or of another shape, or `noise` is neither "equal" nor "unequal".

    Example:
        >>> noise_scale([[0.0, 1.0], [0.0, 0.0]], [[4.0, 4.0], [4.0, 8.0]])
        2.0
    """
    rest, image = _residuals(W, S)
    one_of("noise", noise, ("equal", "unequal"))
    residual, least = (rest * image).sum(0), _LEAST_SCALE**2 * np.asarray(S, dtype=np.float64).diagonal()
    if noise == "equal":
        return math.sqrt(max(float(residual.mean()), float(least.mean())))
    return np.asarray(np.sqrt(np.maximum(residual, least)))


def _residuals(W: ArrayLike, S: ArrayLike) -> tuple[Matrix, Matrix]:
    """I - W, and S (I - W)."""
    weights, matrix = check_weights(W), check_weights(S, "S")
    if weights.shape != matrix.shape:
        raise ValueError(f"S must be of shape {weights.shape} as W, got shape {matrix.shape}")
    rest = np.eye(len(weights)) - weights
    return rest, matrix @ rest


class CoLiDE(BaseEstimator):  # type: ignore[misc]
    """Concomitant linear DAG estimation, with equal (CoLiDE-EV) or unequal (CoLiDE-NV) noise.

    A path of stages, each started where the one before ended. In a stage every iteration takes one step of Adam on W
    and then the best noise scale in closed form. Where a step leaves the domain of the log-determinant, in which the
    inverse of $sI - W \\circ W$ has no negative entry, it is undone and taken at half the rate; at a stage's start, or
    where s is at most 0.9, the stage begins again with half the rate and s raised by 0.1.

    The path suits noise of about unit scale, so that the data are measured in the geometric mean of their noise scales,
    $\\det(S)^{1/2d}$, which no graph changes; the authors take them as they come. The fit then depends on the unit of
    the data by the penalty alone: data multiplied by c are fitted as with `lambda1 / c`, where least squares fits them
    as with `lambda1 / c**2`.

    Args:
        noise: "equal" or "unequal" scales of the variables' noise.
        lambda1: weight of the sum of absolute weights, at least 0.
        mu: weight of the score at each stage, positive.
        s: size of the log-determinant's domain at each stage, positive; as many as `mu`.
        warm_iter: most iterations of every stage but the last.
        max_iter: most iterations of the last stage.
        lr: Adam's learning rate, positive.
        betas: Adam's decay rates, in [0, 1).
        tol: a stage ends if its objective changes by no more than this share in 1,000 iterations.
        threshold: least absolute weight of an edge.

    Attributes:
        weights_: (d, d) weights of the graph, without cycles: what is left of `raw_weights_` after the threshold, and
            after the weakest edges where cycles remained.
        adjacency_: (d, d) whether there is an edge from i to j.
        noise_std_: (d,) standard deviation of each variable's noise.
        raw_weights_: (d, d) weights at the end of the path.
        is_dag_: whether the threshold alone left no cycle.
        n_iter_: iterations in all, those of stages begun again included.
        n_features_in_: d.

    Raises:
        ValueError: the data are not finite, a variable is constant, or an argument is out of its range.

    Warns:
        sklearn.exceptions.ConvergenceWarning: the last stage ended before its objective settled.
        UserWarning: in the data's unit `lambda1` outweighs every edge, though variables are strongly correlated.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 3.0, 2.0]
        >>> X = np.stack([z[:, 0], z[:, 1] + 2 * z[:, 0], z[:, 2]], axis=1)
        >>> model = CoLiDE(noise="unequal", warm_iter=2000, lr=1e-3).fit(X)
        >>> model.adjacency_.astype(int)
        array([[0, 1, 0], [0, 0, 0], [0, 0, 0]])
        >>> model.noise_std_.round()
        array([1., 3., 2.])
    """

    def __init__(
        self,
        noise: Noise = "equal",
        *,
        lambda1: float = 0.05,
        mu: Sequence[float] = (1.0, 0.1, 0.01, 0.001),
        s: Sequence[float] = (1.0, 0.9, 0.8, 0.7),
        warm_iter: int = 20_000,
        max_iter: int = 70_000,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.99, 0.999),
        tol: float = 1e-6,
        threshold: float = 0.3,
    ) -> None:
        self.noise = noise
        self.lambda1 = lambda1
        self.mu = mu
        self.s = s
        self.warm_iter = warm_iter
        self.max_iter = max_iter
        self.lr = lr
        self.betas = betas
        self.tol = tol
        self.threshold = threshold

    def fit(self, X: Float[ArrayLike, "n d"], y: Any = None) -> Self:
        """Learns the graph of the columns of X; `y` is ignored."""
        self._check_arguments()
        data: Matrix = check_array(
            X, dtype=np.float64, ensure_min_samples=2, ensure_min_features=2, estimator=self, input_name="X"
        )
        S = covariance(data)
        validate_data(self, X, skip_check_array=True)  # remembers the columns, once nothing can be refused any more
        unit = noise_unit(S)
        self._warn_of_penalty(S)
        W, n_iter, converged = np.zeros_like(S), 0, True
        sizes = [self.warm_iter] * (len(self.mu) - 1) + [self.max_iter]
        for mu, s, size in zip(self.mu, self.s, sizes, strict=True):
            lr = self.lr
            while True:
                stage = _Stage(S / unit**2, self.noise, self.lambda1 / unit, mu, s)
                found = stage.minimise(W, size, lr, self.betas, self.tol)
                n_iter += found.n_iter
                if found.inside:
                    break
                lr, s = lr / 2, s + 0.1
            W, converged = found.W, found.converged
        if not converged:
            warnings.warn(
                f"CoLiDE: the objective did not settle within {self.max_iter} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.raw_weights_ = W
        self.is_dag_ = is_dag(np.where(np.abs(W) < self.threshold, 0, W))
        self.weights_ = to_dag(W, self.threshold)
        self.adjacency_ = self.weights_ != 0
        self.noise_std_ = np.broadcast_to(noise_scale(W, S, self.noise), len(S)).copy()
        self.n_iter_ = n_iter
        return self

    def _check_arguments(self) -> None:
        one_of("noise", self.noise, ("equal", "unequal"))
        if not len(self.mu):
            raise ValueError("mu must be one value for each stage, got none")
        if len(self.s) != len(self.mu):
            raise ValueError(f"s must be one value for each of the {len(self.mu)} stages of mu, got {len(self.s)}")
        for name in ("mu", "s"):
            for place, value in enumerate(getattr(self, name)):
                positive(f"{name}[{place}]", value)
        positive("lr", self.lr)
        for name in ("lambda1", "tol", "threshold"):
            non_negative(name, getattr(self, name))
        for name in ("warm_iter", "max_iter"):
            integer(name, getattr(self, name))
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {len(self.betas)}")
        for place, beta in enumerate(self.betas):
            in_range(f"betas[{place}]", beta, 0, 1, "left")

    def _warn_of_penalty(self, S: Matrix) -> None:
        """Where no edge may appear at all, and it is the unit's doing rather than the graph's."""
        between, scales = np.abs(S - np.diag(S.diagonal())), np.sqrt(S.diagonal())
        noise = noise_scale(np.zeros_like(S), S, self.noise)
        most = float((between / noise).max())
        correlation = float((between / np.outer(scales, scales)).max())
        if self.lambda1 >= most and correlation > _STRONG:
            warnings.warn(
                f"CoLiDE: lambda1 = {self.lambda1:g} leaves no edge in these data's unit, though columns correlate by "
                f"{correlation:.2f}; lambda1 must be below {most:.3g} for one",
                UserWarning,
                stacklevel=3,
            )


@dataclass(frozen=True)
class _Found:
    W: Matrix
    n_iter: int
    converged: bool
    inside: bool
    """Whether the stage kept to its domain; where it did not, W is of no use."""


class _Stage:
    """One stage of the path. Arrays of an iteration are made once: with d below 30, calls are what takes the time."""

    def __init__(self, S: Matrix, noise: Noise, lambda1: float, mu: float, s: float) -> None:
        self.S, self.noise, self.lambda1, self.mu, self.s = S, noise, lambda1, mu, s
        d = len(S)
        self.equal = noise == "equal"
        self.least = _LEAST_SCALE**2 * (S.diagonal().mean() if self.equal else S.diagonal())
        self.minus, self.image, self.buffer = np.empty((d, d)), np.empty((d, d)), np.empty((d, d))
        self.minus_diagonal, self.buffer_diagonal = self.minus.ravel()[:: d + 1], self.buffer.ravel()[:: d + 1]

    def move(self, W: Matrix) -> Matrix | None:
        r"""Goes to W: $S(W - I)$ and $\mu/\sigma$ there, and $(sI - W \circ W)^{-\top}$; None outside the domain."""
        np.copyto(self.minus, W)
        self.minus_diagonal -= 1
        np.dot(self.S, self.minus, out=self.image)
        if self.equal:
            mean = float(np.vdot(self.minus, self.image)) / len(W)
            self.weight: float | Matrix = self.mu / math.sqrt(max(mean, self.least))
        else:
            np.multiply(self.minus, self.image, out=self.buffer)
            variances = np.maximum(np.add.reduce(self.buffer, 0), self.least)
            self.weight = self.mu / np.sqrt(variances, out=variances)
        np.multiply(W, W, out=self.buffer)
        np.negative(self.buffer, out=self.buffer)
        self.buffer_diagonal += self.s
        # LAPACK reads the rows of the buffer as columns, and so inverts its transpose in place.
        factors, pivots, failed = lapack.dgetrf(self.buffer.T, overwrite_a=1)
        if failed:
            return None
        inverse, failed = lapack.dgetri(factors, pivots, overwrite_lu=1)
        return inverse if np.minimum.reduce(inverse, None) >= _OUTSIDE else None

    def minimise(self, W: Matrix, max_iter: int, lr: float, betas: tuple[float, float], tol: float) -> _Found:
        """Adam on W from a start that is left as it is, with the noise scale best at every step."""
        W = W.copy()
        beta1, beta2 = betas
        mean, square, grad, step = (np.zeros_like(W) for _ in range(4))
        penalty, previous = self.mu * self.lambda1, math.nan
        inverse = self.move(W)
        if inverse is None:
            return _Found(W, 0, False, inside=False)
        for t in range(1, max_iter + 1):
            np.multiply(W, inverse, out=grad)
            grad *= 2
            self.image *= self.weight
            grad += self.image
            np.sign(W, out=step)
            step *= penalty
            grad += step

            mean *= beta1
            np.multiply(grad, 1 - beta1, out=step)
            mean += step
            square *= beta2
            grad *= grad
            grad *= 1 - beta2
            square += grad
            # Both corrections of Adam's bias in one factor, and in the constant that keeps from dividing by zero.
            correction = math.sqrt(1 - beta2**t)
            np.sqrt(square, out=step)
            step += 1e-8 * correction
            np.divide(mean, step, out=step)
            step *= correction / (1 - beta1**t)
            np.multiply(step, lr, out=grad)
            W -= grad

            inverse = self.move(W)
            while inverse is None:
                if self.s <= 0.9:
                    return _Found(W, t, False, inside=False)
                W += grad
                lr /= 2
                if lr <= _LEAST_RATE:
                    return _Found(W, t, False, inside=True)
                np.multiply(step, lr, out=grad)
                W -= grad
                inverse = self.move(W)

            if t % _CHECK_EVERY == 0 or t == max_iter:
                objective = self.objective(W)
                if abs(previous - objective) <= tol * abs(previous):
                    return _Found(W, t, True, inside=True)
                previous = objective
        return _Found(W, max_iter, False, inside=True)

    def objective(self, W: Matrix) -> float:
        score, _ = colide_score(W, self.S, noise_scale(W, self.S, self.noise))
        return self.mu * (score + self.lambda1 * float(np.abs(W).sum())) + h_logdet(W, self.s)[0]
