"""Matrix completion by alternating regressions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, in_range, integer, non_negative, one_of, positive, tensor
from trimtab.ops.sinkhorn import Array
from trimtab.solvers.matrix_completion.designs import Designs, SketchedPreconditioner, exact_grams
from trimtab.solvers.matrix_completion.regressions import Regressions, conjugate_gradients, normal_equations

Inner = Literal["sketch", "cholesky", "cg"]

_SKETCH_ROWS = 4  # rows of a sketch for each unit of rank
_POWER_STEPS = 4


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
        converged: whether the residual is at most `tol`, or the last sweep changed it by no more than that.
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
        """The entries at these places, without forming the matrix.

        Raises:
            ValueError: a row or column is not in the matrix, or there are not as many of both.
        """
        if len(rows) != len(cols):
            raise ValueError(f"cols must be {len(rows)} as rows, got {len(cols)}")
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self.U)):
            raise ValueError(f"rows must be in [0, {len(self.U)}), got {int(rows.min())} to {int(rows.max())}")
        if len(cols) and (cols.min() < 0 or cols.max() >= len(self.V)):
            raise ValueError(f"cols must be in [0, {len(self.V)}), got {int(cols.min())} to {int(cols.max())}")
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
        TypeError: `values` are no tensor or array of float32 or float64 numbers, or an index is no integer.
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
    shape = _read_shape(shape)
    at_rows, at_cols, observed = _read_entries(rows, cols, values, shape)
    if torch.is_autocast_enabled(observed.device.type):
        raise ValueError("values must be completed outside autocast, whose half precision no sparse product takes")
    rank = integer("rank", rank, most=min(shape))
    one_of("inner", inner, get_args(Inner))
    inner_tol = in_range("inner_tol", inner_tol, 0, 1, "neither")
    reg = non_negative("reg", reg)
    if incoherence is not None:
        incoherence = positive("incoherence", incoherence)
    max_iter, tol = integer("max_iter", max_iter), positive("tol", tol)
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


def _values(matrix: Tensor) -> Tensor:
    return matrix if matrix.layout == torch.strided else matrix.values()


def _read_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"shape must be two numbers, got {shape}")
    return integer("shape[0]", shape[0]), integer("shape[1]", shape[1])


def _read_entries(rows: Array, cols: Array, values: Array, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    observed = finite_tensor("values", values, ndim=1, floating=True).detach()
    if not len(observed):
        raise ValueError("values must be a non-empty vector, got shape (0,)")
    if observed.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"values must be float32 or float64, got {observed.dtype}")
    places = []
    for name, given, size in (("rows", rows, shape[0]), ("cols", cols, shape[1])):
        index = tensor(name, given).detach().to(observed.device)
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {index.dtype}")
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
