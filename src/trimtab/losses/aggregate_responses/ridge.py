"""Linear regression from bag means, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast, get_args

import numpy as np
from jaxtyping import Float
from scipy.linalg import lapack
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y, validate_data

from trimtab.losses.aggregate_responses.bags import Weighting, bag_sizes
from trimtab.ops.arguments import in_range, integer, non_negative, one_of

_WELL_CONDITIONED = 1e-8  # reciprocal condition from which the two ways to solve agree to eight digits


class AggregateRidge(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Linear regression from bag means by the interpolating squared loss, in closed form.

    Args:
        rho: weight of the instance-level loss, in [0, 1]. A sequence of weights is searched by cross-validation over
            bags: held-out bag means are predicted, with an error that for bags filled at random ranks weights as the
            error on single samples does.
        alpha: ridge penalty, not negative. Of several minimisers without it, the smallest is taken.
        fit_intercept: learn a constant too, which is not penalised.
        weighting: whether each "sample" counts alike, as in the paper's formula, or each "bag".
        cv: number of folds for the search of `rho`, bags dealt in turn; fewer where there are fewer bags.

    Attributes:
        coef_: (features,) weights.
        intercept_: constant, 0 without one.
        rho_: the weight used.
        cv_errors_: mean squared error on held-out bags for each of a sequence of weights.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X, bags = rng.normal(size=(300, 2)), np.arange(300) // 3
        >>> bag_means = (X @ [1.0, -2.0]).reshape(100, 3).mean(1)
        >>> AggregateRidge(rho=0.0).fit(X, bag_means, bags).coef_.round(3)
        array([ 1., -2.])
    """

    def __init__(
        self,
        rho: float | Sequence[float] = 0.5,
        alpha: float = 0.0,
        fit_intercept: bool = True,
        weighting: Weighting = "sample",
        cv: int = 5,
    ) -> None:
        self.rho = rho
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.weighting = weighting
        self.cv = cv

    def fit(self, X: Any, y: Any, bag_index: Any = None) -> Self:
        """Learns from samples and the mean responses of their bags.

        Args:
            X: (n, features) samples.
            y: (bags,) mean responses.
            bag_index: (n,) bag of each sample, in [0, bags), every bag with at least one; without it every sample is
                its own bag, and this is ridge regression.

        Raises:
            TypeError: if `bag_index` does not hold integers.
            ValueError: shapes do not fit, a value is not finite, or a parameter is out of its range.
        """
        rhos = np.atleast_1d(np.asarray(self.rho, dtype=np.float64))
        if rhos.ndim != 1 or not len(rhos):
            raise ValueError(f"rho must be a number or a sequence of numbers, got {self.rho!r}")
        for rho in rhos:
            in_range("rho", rho, 0, 1)
        non_negative("alpha", self.alpha)
        one_of("weighting", self.weighting, get_args(Weighting))
        integer("cv", self.cv, 2)
        given = X
        if bag_index is None:
            X, y = check_X_y(X, y, dtype=np.float64, y_numeric=True, estimator=self)
            bag_index = np.arange(len(X))
        else:
            X = check_array(X, dtype=np.float64, estimator=self)
            y = np.asarray(y, dtype=np.float64)
            if y.ndim != 1 or not np.isfinite(y).all():
                raise ValueError(f"y must be a vector of finite numbers, one a bag, got shape {y.shape}")
        bag_index = np.asarray(bag_index)
        sizes = bag_sizes(bag_index, len(X))
        if len(sizes) != len(y):
            raise ValueError(f"y must be {len(sizes)} responses, one a bag of bag_index, got {len(y)}")
        validate_data(self, given, skip_check_array=True)  # remembers the columns, once nothing can be refused any more

        members = csr_matrix((1 / sizes[bag_index], (bag_index, np.arange(len(X)))), shape=(len(y), len(X)))
        means = members @ X
        weights = sizes if self.weighting == "sample" else np.full(len(y), len(X) / len(y))
        deviations = means[bag_index]
        np.subtract(X, deviations, out=deviations)
        if self.weighting == "bag":
            deviations *= np.sqrt(weights / sizes)[bag_index, None]
        self.rho_ = float(rhos[0])
        self.__dict__.pop("cv_errors_", None)  # of an earlier search
        if len(rhos) > 1:
            folds = np.arange(len(y)) % min(self.cv, len(y))
            errors = np.zeros(len(rhos))
            parts = [deviations[folds[bag_index] == fold] for fold in range(folds.max() + 1)]
            spreads = [part.T @ part for part in parts]
            for fold in range(len(parts)) if len(y) > 1 else []:
                out, inside = folds == fold, sum(spreads[:fold] + spreads[fold + 1 :])
                coefs, intercepts = self._solve(means[~out], y[~out], weights[~out], inside, rhos)
                errors += weights[out] @ (means[out] @ coefs.T + intercepts - y[out, None]) ** 2 / weights.sum()
            self.cv_errors_ = errors
            self.rho_ = float(rhos[errors.argmin()])
        coefs, intercepts = self._solve(means, y, weights, deviations.T @ deviations, np.array([self.rho_]))
        self.coef_, self.intercept_ = coefs[0], float(intercepts[0])
        return self

    def _solve(
        self,
        means: Float[np.ndarray, "bags features"],
        y: Float[np.ndarray, " bags"],
        weights: Float[np.ndarray, " bags"],
        of_deviations: Float[np.ndarray, "features features"],
        rhos: Float[np.ndarray, " rhos"],
    ) -> tuple[Float[np.ndarray, "rhos features"], Float[np.ndarray, " rhos"]]:
        """Weights and constants for several `rho`, from bag means and the Gram matrix of weighted deviations."""
        x_mean, y_mean = np.zeros(means.shape[1]), 0.0
        if self.fit_intercept:
            x_mean, y_mean = weights @ means / weights.sum(), weights @ y / weights.sum()
        centred = means - x_mean
        weighted = weights[:, None] * centred
        right = weighted.T @ (y - y_mean)
        of_means = weighted.T @ centred + self.alpha * np.eye(len(x_mean))
        coefs = np.stack([_smallest_solution(of_means + rho * of_deviations, right) for rho in rhos])
        return coefs, y_mean - coefs @ x_mean

    def predict(self, X: Any) -> Float[np.ndarray, " n"]:
        """Responses of single samples (n, features)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return cast(np.ndarray, X @ self.coef_ + self.intercept_)


def _smallest_solution(
    gram: Float[np.ndarray, "features features"], right: Float[np.ndarray, " features"]
) -> Float[np.ndarray, " features"]:
    """Of normal equations: by Cholesky's factors, many times faster than eigenvalues, where they leave digits."""
    factor, failed = lapack.dpotrf(gram)
    if not failed and lapack.dpocon(factor, np.abs(gram).sum(0).max())[0] > _WELL_CONDITIONED:
        return cast(np.ndarray, lapack.dpotrs(factor, right)[0])
    # The pseudo-inverse gives the smallest solution where bags or samples are fewer than features.
    return cast(np.ndarray, np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ right)
