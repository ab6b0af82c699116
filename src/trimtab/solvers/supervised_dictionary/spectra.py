"""Eigenvalues and eigenvectors of samples, the leading ones alone where they are few."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.linalg import eigh
from scipy.sparse.linalg import LinearOperator, eigsh

from trimtab.solvers.supervised_dictionary.problem import Matrix, Problem

_DENSE = 200  # size up to which all eigenvalues cost less than the leading ones
_EIGEN_TOL = 1e-10


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


def probe(size: int) -> Float[Matrix, " size"]:
    """What Lanczos' iteration starts from: random, and always the same."""
    return np.random.RandomState(0).uniform(-1, 1, size)
