"""Matrix completion as an imputer of scikit-learn."""

from __future__ import annotations

import warnings
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning

from trimtab.ops.arguments import integer
from trimtab.solvers.matrix_completion.designs import exact_grams
from trimtab.solvers.matrix_completion.regressions import Regressions, normal_equations
from trimtab.solvers.matrix_completion.solver import Inner, MatrixCompletionResult, complete_matrix

_RANK = 10
_REGS = (0.3, 0.1, 0.03, 0.01, 0.003)
_SAFE_REG = 0.1
_FEW = 20  # entries, too few to hold any out


class MatrixCompletion(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Fills in the missing entries of a table that is close to low rank: `complete_matrix` as an imputer.

    Missing entries are NaN. Rows that were not there at `fit` are filled in too, by the regression of what is known of
    them on the factor of the columns. Known entries stay as they are.

    Args:
        rank: k, in [1, min(n_samples, n_features)]; None takes 10, or as many as a smaller table has.
        reg: as for `complete_matrix`. None takes the one of 0.3, 0.1, 0.03, 0.01 and 0.003 that predicts best a tenth
            of the known entries, held out: real tables are rarely of low rank, and a fit without a ridge may be far
            worse than the columns' means. Of fewer than 20 known entries none is held out, and it takes 0.1.
        inner, inner_tol, incoherence, max_iter, tol: as for `complete_matrix`.
        random_state: draws the sketches, the start and the entries held out: None, an integer or a
            `numpy.random.RandomState`.

    Attributes:
        U_: (n_samples, k), factor of the rows at `fit`.
        V_: (n_features, k), orthonormal factor of the columns.
        rank_, reg_: those used.
        ridge_: (k,), of the regressions by which rows are filled in.
        history_: residual after each sweep, as a share of the norm of the known entries.
        n_iter_: sweeps.
        n_features_in_: number of columns.

    Raises:
        ValueError: as `complete_matrix`; at `transform` too, a row with fewer than k known entries where `reg` is zero.

    Example:
        >>> truth = np.outer([1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 2.0])
        >>> table = truth.copy()
        >>> table[0, 1] = table[2, 2] = np.nan
        >>> bool(np.allclose(MatrixCompletion(rank=1, reg=0.0).fit_transform(table), truth, atol=1e-4))
        True
    """

    def __init__(
        self,
        rank: int | None = None,
        *,
        inner: Inner = "sketch",
        inner_tol: float = 1e-2,
        reg: float | None = None,
        incoherence: float | None = 3.0,
        max_iter: int = 100,
        tol: float = 1e-6,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.rank = rank
        self.inner = inner
        self.inner_tol = inner_tol
        self.reg = reg
        self.incoherence = incoherence
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: object = None) -> Self:
        """Learns the factors from the entries of X (n_samples, n_features) that are not NaN."""
        from sklearn.utils import check_array, check_random_state
        from sklearn.utils.validation import validate_data

        table = check_array(X, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan", estimator=self)
        n_samples, n_features = table.shape
        rank = min(_RANK, *table.shape) if self.rank is None else integer("rank", self.rank)
        if rank > min(table.shape):
            raise ValueError(
                f"rank must be in [1, min(n_samples, n_features)], got {rank} for a table with n_samples = {n_samples} "
                f"and n_features = {n_features}"
            )
        random_state = check_random_state(self.random_state)
        seed = int(random_state.randint(2**31 - 1))
        rows, cols = np.nonzero(~np.isnan(table))
        values = table[rows, cols]

        def complete(which: Any, reg: float) -> MatrixCompletionResult:
            return complete_matrix(
                rows[which],
                cols[which],
                values[which],
                table.shape,
                rank,
                inner=self.inner,
                inner_tol=self.inner_tol,
                reg=reg,
                incoherence=self.incoherence,
                max_iter=self.max_iter,
                tol=self.tol,
                generator=torch.Generator().manual_seed(seed),
            )

        reg = self.reg
        if reg is None and len(values) < _FEW:
            reg = _SAFE_REG
        elif reg is None:
            held_out = random_state.permutation(len(values)) < len(values) // 10

            def error(reg: float) -> float:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    predicted = complete(~held_out, reg).predict(rows[held_out], cols[held_out])
                return float(((predicted - values[held_out]) ** 2).sum())

            reg = min(_REGS, key=error)
        found = complete(slice(None), reg)
        validate_data(self, X, skip_check_array=True)  # remembers the columns, once nothing can be refused any more
        self.rank_, self.reg_ = rank, reg
        self.U_, self.V_, self.ridge_ = found.U, found.V, found.ridge
        self.history_, self.n_iter_ = found.history, found.n_iter
        return self

    def transform(self, X: ArrayLike) -> NDArray[Any]:
        """X with its NaN filled in: (n_samples, n_features)."""
        from sklearn.utils.validation import check_is_fitted, validate_data

        check_is_fitted(self)
        table = validate_data(self, X, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan", reset=False)
        missing = np.isnan(table)
        open_rows = np.flatnonzero(missing.any(1))
        filled = table.copy()
        if len(open_rows):
            given, gaps = table[open_rows], missing[open_rows]
            at_rows, at_cols = np.nonzero(~gaps)
            design, ridge = (torch.as_tensor(part).to(torch.as_tensor(given)) for part in (self.V_, self.ridge_))
            known = torch.as_tensor(given[at_rows, at_cols])
            regressions = Regressions(torch.as_tensor(at_rows), torch.as_tensor(at_cols), known, given.shape, "row")
            if not self.reg_:
                regressions.check_counts(design.shape[1])
            with torch.no_grad():
                factor = normal_equations(regressions, exact_grams(regressions, design.shape[1]), design, ridge)
            given[gaps] = (factor @ design.T).numpy()[gaps]
            filled[open_rows] = given
        return cast(NDArray[Any], filled)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
