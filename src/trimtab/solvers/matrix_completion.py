r"""Completion of a low-rank matrix from a sample of its entries, in time nearly linear in the entries times the rank.

Reach for it where a table or a matrix of ratings has missing entries and is close to low rank, above all where it is
too large to build the normal equations of every row and column at every sweep.

With $P_\Omega$ the sampled entries, it alternates two sets of regressions, one for each column and one for each row,
on a factor that is made orthonormal before each (by QR, turned to the singular directions of the product),

$$
V_j = \argmin_v \sum_{i : (i, j) \in \Omega} (U_i v - M_{ij})^2, \qquad
U_i = \argmin_u \sum_{j : (i, j) \in \Omega} (u V_j - M_{ij})^2,
$$

from the leading singular vectors of $P_\Omega(M)$ whose entries above $2 \mu \sqrt{k / m}$ are set to zero.
Regressions need not be solved exactly. All of a side are solved together by conjugate gradients, each step in
$O(|\Omega| k)$, from what the last sweep left. Where designs are ill-conditioned it pays to precondition by sketches of
them, $(R_j^\top R_j)^{-1}$ with $S_j U_{\Omega_j} = Q_j R_j$.

Reference:
    Yuzhou Gu, Zhao Song, Junze Yin and Lichen Zhang, "Low Rank Matrix Completion via Robust Alternating Minimization in
    Nearly Linear Time", ICLR 2024, arXiv 2302.11068.

As is done in practice, every sweep uses all entries, where the paper's proof gives each a part of its own; sketches are
drawn once; and a start from the last sweep's factor stands in for the paper's start from the sketched solution, so that
a few steps suffice at any accuracy. Where a regression has no more rows than its sketch, it is preconditioned exactly.
A ridge is offered that the paper has not, $\lambda \sum_l v_l^2 / \sigma_l$ with the singular values $\sigma$ of the
product: at convergence it is a penalty $2 \lambda$ on the nuclear norm, and real tables want one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from torch import Tensor

from trimtab.ops.sinkhorn import Array

Inner = Literal["sketch", "cholesky", "cg"]

_SKETCH_ROWS = 4  # rows of a sketch for each unit of rank
_DENSE = 0.2  # share of sampled entries from which dense products are faster
_BLOCK = 2**18  # numbers in the designs that are held at once, so that they stay in the cache
_PRODUCTS = 2**22  # products of two columns of a design that are held at once
_NEAR = 0.9  # cosine of the largest angle between two spaces for which one sketch serves
_FLOOR = 1e-5  # added to a sketched Gram matrix, as a share of its mean diagonal
_POWER_STEPS = 4
_MAX_INNER = 100


@dataclass(frozen=True)
class MatrixCompletionResult:
    """Two factors and how they were reached. Arrays are of the kind, dtype and device of the values that were given.

    Attributes:
        U: (m, k).
        V: (n, k), with orthonormal columns.
        ridge: (k,), what was added to the diagonals of the last regressions' normal equations.
        history: after each sweep, the norm of the residual on the sampled entries as a share of their norm.
        inner_steps: products of the regressions' normal equations with a factor, in all sweeps together.
        n_iter: sweeps.
        converged: whether the last sweep changed the residual by no more than `tol`.
    """

    U: Array
    V: Array
    ridge: Array
    history: tuple[float, ...]
    inner_steps: int
    n_iter: int
    converged: bool

    @property
    def matrix(self) -> Array:
        """The completed matrix, (m, n)."""
        return self.U @ self.V.T

    def predict(self, rows: Int[Array, " q"], cols: Int[Array, " q"]) -> Float[Array, " q"]:
        """The entries at these places, without forming the matrix."""
        return cast(Array, (self.U[rows] * self.V[cols]).sum(1))


@torch.no_grad()
def complete_matrix(
    rows: Int[Array, " entries"],
    cols: Int[Array, " entries"],
    values: Float[Array, " entries"],
    shape: tuple[int, int],
    rank: int,
    *,
    inner: Inner = "sketch",
    inner_tol: float = 1e-2,
    reg: float = 0.0,
    incoherence: float | None = 3.0,
    max_iter: int = 100,
    tol: float = 1e-6,
    generator: torch.Generator | None = None,
) -> MatrixCompletionResult:
    """Completes a low-rank matrix from a sample of its entries by alternating regressions solved approximately.

    Args:
        rows: row of each sampled entry.
        cols: column of each sampled entry.
        values: the entries, finite.
        shape: (m, n) of the matrix.
        rank: k, in [1, min(m, n)].
        inner: how regressions are solved: "sketch" (conjugate gradients preconditioned by sketched designs), "cg"
            (without a preconditioner: enough where every row and column has many entries that look alike) or "cholesky"
            (exactly, by normal equations, in time k times the entries times the rank).
        inner_tol: how much of the error that a regression starts with may be left, in (0, 1); "cholesky" ignores it.
        reg: lambda, as a share of the largest singular value of the sampled entries; at 1, nothing is left but zero.
            Needed where a row or column has fewer than k entries.
        incoherence: mu of the initial clipping; None clips nothing.
        max_iter: most sweeps.
        tol: change of the residual, as a share of the norm of the values, at which to stop.
        generator: draws the sketches and the start of the singular vectors; a fixed one by default.

    Raises:
        TypeError: `values` are no tensor or array of floating point numbers, or an index is no integer.
        ValueError: a shape or value does not fit, an entry is given twice, or the entries of a row or column do not
            determine its factor and `reg` is zero.

    Warns:
        sklearn.exceptions.ConvergenceWarning: the residual still changed by more than `tol` in the last sweep.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> truth = torch.randn(60, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
        >>> rows, cols = (torch.rand(60, 50, generator=generator) < 0.4).nonzero(as_tuple=True)
        >>> result = complete_matrix(rows, cols, truth[rows, cols], (60, 50), rank=2)
        >>> torch.allclose(result.matrix, truth, atol=1e-3)
        True
    """
    at_rows, at_cols, observed = _read_entries(rows, cols, values, shape)
    if not 1 <= rank <= min(shape):
        raise ValueError(f"rank must be in [1, {min(shape)}] for a matrix of shape {shape}, got {rank}")
    if inner not in get_args(Inner):
        raise ValueError(f"inner must be one of {', '.join(get_args(Inner))}, got {inner!r}")
    if not 0 < inner_tol < 1:
        raise ValueError(f"inner_tol must be in (0, 1), got {inner_tol}")
    if not (math.isfinite(reg) and reg >= 0):
        raise ValueError(f"reg must be a number that is not negative, got {reg}")
    if incoherence is not None and not incoherence > 0:
        raise ValueError(f"incoherence must be positive or None, got {incoherence}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)

    # In units in which the entries are of size one, whatever the user's are.
    unit = float(observed.abs().max()) or 1.0
    observed = observed / unit
    of_rows = Regressions(at_rows, at_cols, observed, shape, name="row")
    twice = (of_rows.of[1:] == of_rows.of[:-1]) & (of_rows.row[1:] == of_rows.row[:-1])
    if twice.any():
        where = int(twice.nonzero()[0])
        place = int(of_rows.of[where]), int(of_rows.row[where])
        raise ValueError(f"rows and cols must name every entry once, got {place} more often")
    of_cols = Regressions(at_cols, at_rows, observed, shape[::-1], name="column")
    solvers = []
    for regressions in (of_cols, of_rows):
        if not reg:
            regressions.check_counts(rank)
        solvers.append(_inner_solver(regressions, rank, inner, inner_tol, generator))
    solve_cols, solve_rows = solvers

    U, singular = spectral_start(of_rows, of_cols, rank, incoherence, generator)
    penalty = reg * singular[0]
    ridge = penalty / _floored(singular * (shape[0] * shape[1] / len(observed)))
    V = U.new_zeros(shape[1], rank)
    norm = float(observed.norm()) or 1.0
    history: list[float] = []
    inner_steps, converged = 0, False
    while not converged and len(history) < max_iter:
        V, steps = solve_cols(U, V, ridge)
        inner_steps += steps
        V, U, singular = orthonormalise(V, U)
        ridge = penalty / _floored(singular)
        U, steps = solve_rows(V, U, ridge)
        inner_steps += steps
        history.append(float(_values(of_rows.residual(U, V)).norm()) / norm)
        converged = history[-1] <= tol or (len(history) > 1 and abs(history[-2] - history[-1]) <= tol)
        if not converged and len(history) < max_iter:
            U, V, singular = orthonormalise(U, V)
            ridge = penalty / _floored(singular)
    if not converged:
        _warn_not_converged(history, tol)
    return MatrixCompletionResult(
        U=_like(U * unit, values),
        V=_like(V, values),
        ridge=_like(ridge, values),
        history=tuple(history),
        inner_steps=inner_steps,
        n_iter=len(history),
        converged=converged,
    )


class MatrixCompletion(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Fills in the missing entries of a table that is close to low rank: `complete_matrix` as an imputer.

    Missing entries are NaN. Rows that were not there at `fit` are filled in too, by the regression of what is known of
    them on the factor of the columns. Known entries stay as they are.

    Args:
        rank: k, in [1, min(n_samples, n_features)].
        inner, inner_tol, reg, incoherence, max_iter, tol: as for `complete_matrix`.
        random_state: draws the sketches and the start: None, an integer or a `numpy.random.RandomState`.

    Attributes:
        U_: (n_samples, k), factor of the rows at `fit`.
        V_: (n_features, k), orthonormal factor of the columns.
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
        >>> bool(np.allclose(MatrixCompletion(rank=1).fit_transform(table), truth, atol=1e-4))
        True
    """

    def __init__(
        self,
        rank: int = 5,
        *,
        inner: Inner = "sketch",
        inner_tol: float = 1e-2,
        reg: float = 0.0,
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
        from sklearn.utils import check_random_state
        from sklearn.utils.validation import validate_data

        table = validate_data(self, X, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan")
        if not 1 <= self.rank <= min(table.shape):
            n_samples, n_features = table.shape
            raise ValueError(
                f"rank must be in [1, min(n_samples, n_features)], got {self.rank} for a table with "
                f"n_samples = {n_samples} and n_features = {n_features}"
            )
        rows, cols = np.nonzero(~np.isnan(table))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        found = complete_matrix(
            rows,
            cols,
            table[rows, cols],
            table.shape,
            self.rank,
            inner=self.inner,
            inner_tol=self.inner_tol,
            reg=self.reg,
            incoherence=self.incoherence,
            max_iter=self.max_iter,
            tol=self.tol,
            generator=torch.Generator().manual_seed(seed),
        )
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
            if not self.reg:
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


class Regressions:
    """One least squares problem for each row (or column) of a sampled matrix, on the factor of the other side.

    Regression j explains `values[entries of j]` by the rows of the design that those entries name. Residuals are a
    (n, m) matrix that is zero off the sample: sparse, or dense where that makes faster products.

    Args:
        of: to which regression each entry belongs.
        row: which row of the design it uses.
        values: the entries.
        shape: (n, m), the numbers of regressions and of rows of the design.
        name: what a regression stands for, "row" or "column", for messages.
    """

    def __init__(self, of: Tensor, row: Tensor, values: Tensor, shape: tuple[int, ...], name: str) -> None:
        order = (of * shape[1] + row).argsort()
        self.of, self.row, self.shape, self.name = of[order], row[order], shape, name
        self.counts = torch.bincount(of, minlength=shape[0])
        self.starts = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        values = values[order]
        self.mask: Tensor | None = None
        if len(values) > _DENSE * shape[0] * shape[1]:
            self.values = values.new_zeros(shape).index_put_((self.of, self.row), values)
            self.mask = torch.zeros_like(self.values).index_put_((self.of, self.row), values.new_ones(()))
        else:
            self.values = _csr(self.starts, self.row, values, shape)

    def check_counts(self, rank: int) -> None:
        """Refuses regressions with fewer entries than unknowns."""
        if (few := self.counts < rank).any():
            where = int(few.nonzero()[0])
            raise ValueError(
                f"rank = {rank} needs as many entries in every row and column, and {self.name} {where} has "
                f"{int(self.counts[where])}; give a reg above zero, or a lower rank"
            )

    def products(self, x: Float[Tensor, "n k"], design: Float[Tensor, "m k"]) -> Tensor:
        """What the coefficients x predict, on the sample."""
        return self._sampled(x, design, 0.0, 1.0)

    def residual(self, x: Float[Tensor, "n k"], design: Float[Tensor, "m k"]) -> Tensor:
        """Values less what the coefficients x predict, on the sample."""
        return self._sampled(x, design, 1.0, -1.0)

    def _sampled(self, x: Tensor, design: Tensor, beta: float, alpha: float) -> Tensor:
        if self.mask is not None:
            return torch.addmm(self.values, x, design.T, beta=beta, alpha=alpha).mul_(self.mask)
        if x.is_cuda or torch.backends.mkl.is_available():
            return cast(Tensor, torch.sparse.sampled_addmm(self.values, x, design.T, beta=beta, alpha=alpha))
        predicted = torch.cat([(x[of] * design[row]).sum(1) for of, row in zip(*self._pieces(x.shape[1]), strict=True)])
        return _csr(self.starts, self.row, beta * self.values.values() + alpha * predicted, self.shape)

    def _pieces(self, rank: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        size = max(1, _BLOCK // rank)
        return self.of.split(size), self.row.split(size)


class Designs:
    """The Gram matrices of all designs, exactly or from sketches, block by block of regressions.

    Each entry of a regression goes to a row of its compressed design: to one of its own if there are enough, else to
    one drawn at random, with a random sign (CountSketch). So sketching costs one product of a sparse matrix, with as
    many non-zeros as there are entries, and short designs are kept exactly.

    Args:
        regressions: whose designs.
        rank: columns of a design.
        rows: most rows of a compressed design; None compresses none.
        dtype: in which to compute.
        generator: draws the sketch.
    """

    def __init__(
        self, regressions: Regressions, rank: int, rows: int | None, dtype: torch.dtype, generator: torch.Generator
    ) -> None:
        of, counts = regressions.of, regressions.counts
        bucket = torch.arange(len(of), device=of.device) - regressions.starts[of]
        signs = torch.ones(len(of), dtype=dtype, device=of.device)
        if rows is not None:
            hashed = counts[of] > rows
            drawn = torch.randint(2 * rows, (int(hashed.sum()),), generator=generator).to(of.device)
            bucket[hashed], signs[hashed] = drawn % rows, (drawn // rows * 2 - 1).to(dtype)
        # Regressions of similar widths stand together, so that the padding of a block to its widest is small.
        widths, self._order = counts.clamp(1, rows).sort()
        ends = _block_ends(widths.tolist(), rank)
        padded, begin = torch.empty_like(widths), 0
        for end in ends:
            padded[begin:end] = widths[end - 1]
            begin = end
        first = torch.empty_like(widths)
        first[self._order] = padded.cumsum(0) - padded
        at = first[of] + bucket
        order = (at * regressions.shape[1] + regressions.row).argsort()
        crow = torch.cat([at.new_zeros(1), torch.bincount(at, minlength=int(padded.sum())).cumsum(0)])
        columns, signs = regressions.row[order], signs[order]
        self.dtype, self._rank = dtype, rank
        self._blocks: list[tuple[Tensor, Tensor]] = []
        begin = top = 0
        for end in ends:
            height = (end - begin) * int(padded[begin])
            part = crow[top : top + height + 1]
            low, high = int(part[0]), int(part[-1])
            shape = (height, regressions.shape[1])
            compress = _csr(part - low, columns[low:high], signs[low:high], shape)
            self._blocks.append((self._order[begin:end], compress))
            begin, top = end, top + height

    def grams(self, design: Float[Tensor, "m k"]) -> Float[Tensor, "n k k"]:
        """The Gram matrix of each regression's compressed design."""
        design = design.to(self.dtype)
        found = design.new_empty(len(self._order), self._rank, self._rank)
        for which, compress in self._blocks:
            compressed = (compress @ design).view(len(which), -1, self._rank)
            found[which] = compressed.mT @ compressed
        return found


def exact_grams(regressions: Regressions, rank: int) -> Callable[[Tensor], Tensor]:
    """A function of a design that returns the exact Gram matrices (n, k, k), in O(|Omega| k^2)."""
    if regressions.mask is None:
        return Designs(regressions, rank, None, regressions.values.dtype, torch.Generator()).grams
    # Of a dense sample, one large product with the columns' products is faster than many small ones.
    mask = regressions.mask
    first, second = torch.triu_indices(rank, rank, device=mask.device)
    place = torch.empty(rank, rank, dtype=torch.int64, device=mask.device)
    place[first, second] = place[second, first] = torch.arange(len(first), device=mask.device)
    step = max(1, _PRODUCTS // mask.shape[1])

    def grams(design: Tensor) -> Tensor:
        pairs = zip(first.split(step), second.split(step), strict=True)
        triangle = torch.cat([mask @ (design[:, i] * design[:, j]) for i, j in pairs], dim=1)
        return triangle[:, place.flatten()].view(-1, rank, rank)

    return grams


class SketchedPreconditioner:
    """The inverse Gram matrices of sketched designs, for as long as the design spans about the same space.

    Designs are orthonormal. One that has been turned within its space since it was sketched, `design = sketched @ O`,
    has the Gram matrices `O.T @ G @ O`, so that turning the gradients is enough.
    """

    def __init__(self, designs: Designs) -> None:
        self._designs = designs
        self._sketched: Tensor | None = None

    def _serves(self, design: Tensor, ridge: Tensor) -> bool:
        if self._sketched is None or torch.linalg.svdvals(self._sketched.T @ design)[-1] < _NEAR:
            return False
        return bool(((ridge.sort().values - self._ridge).abs() <= 0.5 * self._ridge).all())

    def __call__(self, design: Float[Tensor, "m k"], ridge: Float[Tensor, " k"]) -> Callable[[Tensor], Tensor]:
        """A function that applies the inverses to gradients (n, k)."""
        if self._sketched is None or not self._serves(design, ridge):
            self._sketched, self._ridge = design, ridge.sort().values
            grams = self._designs.grams(design)
            # A sketch may be singular where the design is not; the preconditioner must not be.
            floor = _FLOOR * grams.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(grams.dtype).tiny
            grams.diagonal(dim1=1, dim2=2).add_(ridge.to(floor) + floor[:, None])
            self._inverses = torch.cholesky_inverse(torch.linalg.cholesky(grams))
        turn = self._sketched.T @ design

        def apply(gradients: Tensor) -> Tensor:
            turned = (gradients @ turn.T).to(self._inverses.dtype)[:, :, None]
            return (self._inverses @ turned)[:, :, 0].to(gradients.dtype) @ turn

        return apply


def conjugate_gradients(
    regressions: Regressions,
    design: Float[Tensor, "m k"],
    start: Float[Tensor, "n k"],
    precondition: Callable[[Tensor], Tensor],
    *,
    tol: float,
    ridge: Tensor | float = 0.0,
    max_iter: int = _MAX_INNER,
) -> tuple[Float[Tensor, "n k"], int]:
    """Solves all regressions together to a share `tol` of the error that they start with.

    The error is measured by the preconditioner, and summed over the regressions. Where that is (nearly) the Gram
    matrix, it is the excess of the residual's norm over the least one.

    Returns:
        The coefficients, and the number of products with the normal equations.
    """
    x = start.clone()
    rest = regressions.residual(x, design) @ design - ridge * x
    scaled = precondition(rest)
    size = (rest * scaled).sum(1)
    goal = tol**2 * float(size.sum())
    search = scaled
    steps = 0
    while steps < max_iter and float(size.sum()) > goal:
        image = regressions.products(search, design) @ design + ridge * search
        steps += 1
        curvature = (search * image).sum(1)
        length = torch.where(curvature > 0, size / curvature, 0.0)[:, None]
        x.add_(length * search)
        rest.sub_(length * image)
        scaled = precondition(rest)
        previous, size = size, (rest * scaled).sum(1)
        search = scaled + torch.where(previous > 0, size / previous, 0.0)[:, None] * search
    return x, steps


def spectral_start(
    of_rows: Regressions,
    of_cols: Regressions,
    rank: int,
    incoherence: float | None,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"]]:
    """Leading left singular vectors of the sampled entries, by subspace iteration; clipped, and orthonormal again.

    With the singular values; the share of sampled entries, by which the paper divides, changes these alone.
    """
    m, n = of_rows.shape
    width = min(rank + 5, m, n)
    basis: Tensor = torch.randn(n, width, generator=generator, dtype=torch.float64).to(of_rows.values)
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(of_cols.values @ torch.linalg.qr(of_rows.values @ basis).Q).Q
    left, singular, _ = torch.linalg.svd(of_rows.values @ basis, full_matrices=False)
    U = left[:, :rank]
    if incoherence is not None:
        U = torch.where(U.abs() > 2 * incoherence * math.sqrt(rank / m), 0.0, U)
    return torch.linalg.qr(U).Q, singular[:rank]


def orthonormalise(
    solved: Float[Tensor, "n k"], design: Float[Tensor, "m k"]
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "m k"], Float[Tensor, " k"]]:
    """Writes `design @ solved.T`, whose design is orthonormal, with the other factor orthonormal.

    Returns:
        The solved factor with orthonormal columns, the other factor, whose columns are orthogonal, and the singular
        values of the product.
    """
    basis, triangle = torch.linalg.qr(solved)
    left, singular, right = torch.linalg.svd(triangle)
    return basis @ left, design @ (right.T * singular), singular


def normal_equations(
    regressions: Regressions,
    grams: Callable[[Tensor], Tensor],
    design: Float[Tensor, "m k"],
    ridge: Float[Tensor, " k"],
) -> Float[Tensor, "n k"]:
    """Solves all regressions exactly, by the Gram matrices (n, k, k) that `grams` makes of the design.

    Raises:
        ValueError: the entries of a regression do not determine its coefficients.
    """
    matrices = grams(design)
    matrices.diagonal(dim1=1, dim2=2).add_(ridge)
    triangles, failed = torch.linalg.cholesky_ex(matrices)
    if failed.any():
        where = int(failed.nonzero()[0])
        raise ValueError(
            f"rank = {design.shape[1]} is more than the entries of {regressions.name} {where} determine; give a reg "
            "above zero, or a lower rank"
        )
    right = regressions.values @ design
    return torch.cholesky_solve(right[:, :, None], triangles)[:, :, 0]


_Solver = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, int]]


def _inner_solver(regressions: Regressions, rank: int, inner: Inner, tol: float, generator: torch.Generator) -> _Solver:
    """A function of the design, the coefficients to start from and the ridge: the new ones and the number of steps."""
    if inner == "cholesky":
        grams = exact_grams(regressions, rank)
        return lambda design, start, ridge: (normal_equations(regressions, grams, design, ridge), 0)
    if inner == "sketch":
        # In single precision: a preconditioner need not be accurate.
        preconditioner = SketchedPreconditioner(
            Designs(regressions, rank, _SKETCH_ROWS * rank, torch.float32, generator)
        )
        return lambda design, start, ridge: conjugate_gradients(
            regressions, design, start, preconditioner(design, ridge), tol=tol, ridge=ridge
        )
    # The Gram matrix of a typical regression: that of a uniform sample of an orthonormal design's rows.
    share = (regressions.counts / regressions.shape[1]).to(regressions.values.dtype)[:, None]

    def plainly(design: Tensor, start: Tensor, ridge: Tensor) -> tuple[Tensor, int]:
        typical = share + ridge
        inverse = torch.where(typical > 0, typical.reciprocal(), 0.0)
        return conjugate_gradients(regressions, design, start, lambda g: inverse * g, tol=tol, ridge=ridge)

    return plainly


def _floored(singular: Tensor) -> Tensor:
    """Singular values without zeros, by which to divide."""
    return singular.clamp_min(1e-6 * float(singular[0]) + torch.finfo(singular.dtype).tiny)


def _block_ends(widths: list[int], rank: int) -> list[int]:
    """Where blocks of regressions, sorted by width, end so that each one's designs stay within `_BLOCK` numbers."""
    ends, begin = [], 0
    for end in range(1, len(widths) + 1):
        if end == len(widths) or (end + 1 - begin) * widths[end] * rank > _BLOCK:
            ends.append(end)
            begin = end
    return ends


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse (CSR|invariant).*")  # that they are in beta
        return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


def _values(matrix: Tensor) -> Tensor:
    return matrix if matrix.layout == torch.strided else matrix.values()


def _read_entries(rows: Array, cols: Array, values: Array, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    for name, value in (("rows", rows), ("cols", cols), ("values", values)):
        if not isinstance(value, Tensor | np.ndarray):
            raise TypeError(f"{name} must be a torch tensor or a NumPy array, got {type(value).__name__}")
    observed = torch.as_tensor(values).detach()
    if not observed.is_floating_point():
        raise TypeError(f"values must hold floating point numbers, got {values.dtype}")
    if observed.ndim != 1 or not len(observed):
        raise ValueError(f"values must be a non-empty vector, got shape {tuple(observed.shape)}")
    if not observed.isfinite().all():
        raise ValueError("values must be finite, got NaN or infinity")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape must be two positive numbers, got {shape}")
    places = []
    for name, given, size in (("rows", rows, shape[0]), ("cols", cols, shape[1])):
        index = torch.as_tensor(given).detach().to(observed.device)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"{name} must hold integers, got {given.dtype}")
        if index.shape != observed.shape:
            raise ValueError(f"{name} must have shape {tuple(observed.shape)}, got {tuple(index.shape)}")
        if index.min() < 0 or index.max() >= size:
            raise ValueError(f"{name} must be in [0, {size}), got {int(index.min())} to {int(index.max())}")
        places.append(index.long())
    return places[0], places[1], observed


def _like(value: Tensor, given: Array) -> Array:
    return value if isinstance(given, Tensor) else value.cpu().numpy()


def _warn_not_converged(history: list[float], tol: float) -> None:
    from sklearn.exceptions import ConvergenceWarning

    change = abs(history[-2] - history[-1]) if len(history) > 1 else math.inf
    warnings.warn(
        f"complete_matrix stopped after {len(history)} sweeps while the residual changed by {change:.2e}, wanted "
        f"{tol:.2e}; allow more sweeps, a larger reg or a larger tol",
        ConvergenceWarning,
        stacklevel=4,  # past torch.no_grad's wrapper
    )
