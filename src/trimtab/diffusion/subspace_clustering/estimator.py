"""K-subspaces in scikit-learn's form."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from trimtab.ops.arguments import integer, non_negative

Matrix = NDArray[np.float64]


class KSubspaces(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    r"""K-subspaces: clusters samples by the linear subspace that they lie nearest to.

    $$\max_{U} \sum_k \sum_{i \in C_k} \lVert U_k^\top x_i \rVert^2, \qquad
    C_k = \{i : k = \arg\max_l \lVert U_l^\top x_i\rVert\}$$

    by turns: every sample goes to the subspace with the longest projection, every subspace to the principal components
    of its samples. Data are taken as they come, neither centred nor scaled: subspaces pass through the origin. Of
    `n_init` random starts the best result is kept.

    Args:
        n_clusters: number of subspaces.
        dim: of each subspace, at most the number of features.
        n_init: number of random starts.
        max_iter: most rounds of a start.
        tol: a start ends when its objective grows by no more than this share.
        random_state: seed or `np.random.RandomState` of the starts.

    Attributes:
        bases_: (n_clusters, n_features, dim) orthonormal columns.
        labels_: (n_samples,) clusters of the samples.
        inertia_: sum of squared distances to the samples' subspaces.
        history_: the objective after each round of the best start; it never falls.
        n_iter_: rounds of the best start.
        n_features_in_: number of features.

    Raises:
        ValueError: `dim` exceeds the number of features, there are fewer samples than clusters, or samples are not
            finite.

    Example:
        >>> X = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> model = KSubspaces(2, dim=1, random_state=0).fit(X)
        >>> bool(model.labels_[0] == model.labels_[1] != model.labels_[2])
        True
    """

    def __init__(
        self,
        n_clusters: int = 2,
        *,
        dim: int = 1,
        n_init: int = 10,
        max_iter: int = 100,
        tol: float = 1e-9,
        random_state: Any = None,
    ) -> None:
        self.n_clusters, self.dim, self.n_init = n_clusters, dim, n_init
        self.max_iter, self.tol, self.random_state = max_iter, tol, random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Finds the subspaces of samples (n, features); `y` is ignored."""
        X = validate_data(self, X, dtype=np.float64)
        self._check(X)
        draws = check_random_state(self.random_state)
        best = max((self._run(X, draws) for _ in range(self.n_init)), key=lambda found: found[1][-1])
        self.bases_, self.history_ = best
        self.n_iter_ = len(self.history_)
        self.labels_ = self.predict(X)
        self.inertia_ = float((X**2).sum() - self.history_[-1])
        return self

    def predict(self, X: Any) -> Int[Matrix, " n"]:
        """The nearest subspace of each sample."""
        return np.asarray(self.transform(X).argmin(1))

    def transform(self, X: Any) -> Float[Matrix, "n clusters"]:
        """Distances of samples to the subspaces."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return np.asarray(np.sqrt(np.maximum((X**2).sum(1, keepdims=True) - _lengths(X, self.bases_), 0)))

    def score(self, X: Any, y: Any = None) -> float:
        """The negative mean squared distance to the nearest subspace."""
        return float(-np.square(self.transform(X).min(1)).mean())

    @property
    def _n_features_out(self) -> int:
        return len(self.bases_)

    def _check(self, X: Matrix) -> None:
        for name in ("n_clusters", "dim", "n_init", "max_iter"):
            integer(name, getattr(self, name))
        non_negative("tol", self.tol)
        if self.dim > X.shape[1]:
            raise ValueError(f"dim must be at most the number of features, {X.shape[1]}, got {self.dim}")
        if len(X) < self.n_clusters:
            raise ValueError(f"X must have at least n_clusters={self.n_clusters} samples, got n_samples = {len(X)}")

    def _run(self, X: Matrix, draws: np.random.RandomState) -> tuple[Matrix, list[float]]:
        bases = np.linalg.qr(draws.normal(size=(self.n_clusters, X.shape[1], self.dim)))[0]
        history: list[float] = []
        for _ in range(self.max_iter):
            labels = _lengths(X, bases).argmax(1)
            for k in range(self.n_clusters):
                if (labels == k).any():  # a subspace without samples stays where it is
                    bases[k] = np.linalg.eigh(X[labels == k].T @ X[labels == k])[1][:, -self.dim :]
            history.append(float(_lengths(X, bases).max(1).sum()))
            if len(history) > 1 and history[-1] - history[-2] <= self.tol * history[-1]:
                break
        return bases, history


def _lengths(X: Matrix, bases: Matrix) -> Matrix:
    """Squared lengths of the projections, (samples, subspaces)."""
    return np.asarray(np.square(np.einsum("bn,knr->bkr", X, bases, optimize=True)).sum(-1))
