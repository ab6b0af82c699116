"""Supervised dictionary learning as a classifier and transformer of scikit-learn."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self, cast, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_non_negative, check_X_y, validate_data

from trimtab.ops.arguments import integer, non_negative, one_of, positive
from trimtab.solvers.supervised_dictionary.block_descent import block_descent, minimise_bound
from trimtab.solvers.supervised_dictionary.lifted_descent import lifted_descent
from trimtab.solvers.supervised_dictionary.problem import Matrix, Mode, Problem, Solution

Solver = Literal["lpgd", "bcd"]


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
        data, targets = check_X_y(X, y, dtype=np.float64, estimator=self)
        if self.nonnegative:
            check_non_negative(data, "SupervisedDictionary with nonnegative=True (input X)")
        check_classification_targets(targets)
        classes, labels = np.unique(targets, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y must hold at least two classes, got 1 class, {classes[0]!r}")
        if self.n_components > min(data.shape):
            raise ValueError(
                f"n_components must be in [1, {min(data.shape)}] for n_samples = {data.shape[0]}, n_features = "
                f"{data.shape[1]}, got {self.n_components}"
            )
        covariates = np.empty((len(data), 0)) if aux is None else _read_aux(aux, len(data))
        validate_data(self, X, skip_check_array=True)  # remembers the columns, once nothing can be refused any more
        self.classes_ = classes
        means = covariates.mean(0)
        problem = Problem(
            data,
            data.mean(0),
            np.eye(len(classes))[labels][:, 1:],
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
        one_of("mode", self.mode, get_args(Mode))
        one_of("solver", self.solver, get_args(Solver))
        for name in ("xi", "nu", "tol"):
            non_negative(name, getattr(self, name))
        if self.mode == "feature" and not self.xi:
            raise ValueError(
                "xi must be positive in the feature form, where codes of new data come from reconstruction, "
                f"got {self.xi}"
            )
        if self.nonnegative and self.solver != "bcd":
            raise ValueError(f'nonnegative must be False with solver "{self.solver}", got True; take solver "bcd"')
        if self.radius != math.inf:
            positive("radius", self.radius)
        integer("max_iter", self.max_iter)
        integer("n_components", self.n_components)

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
