"""Unit vectors and their complements, and the readers of what the functions of halfspaces take."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from trimtab.ops.arguments import finite_tensor

Matrix = NDArray[np.float64]


def unit(w: Matrix) -> Matrix:
    """The vector of length 1 in the direction of w."""
    norm = float(np.linalg.norm(w))
    if not 0 < norm < math.inf:
        raise ValueError(f"w must be finite and not zero, got a vector of norm {norm}")
    return w / norm


def orthogonal(w: Matrix) -> Float[Matrix, "d d_minus_1"]:
    """An orthonormal basis of the complement of a unit vector, by the reflection that takes it to an axis."""
    normal = w.copy()
    normal[0] += math.copysign(1.0, w[0])
    reflection = np.eye(len(w)) - np.outer(normal, normal) * (2 / (normal @ normal))
    return reflection[:, 1:]


def read_samples(w: Matrix, X: Matrix, y: Matrix | None = None) -> None:
    """Refuses weights, samples and labels that are not finite or do not fit each other."""
    for name, array, ndim in (("w", w, 1), ("X", X, 2), ("y", y, 1)):
        if array is not None and not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
        if array is not None:
            finite_tensor(name, array, ndim=ndim)
    if not X.size:
        raise ValueError(f"X must be of shape (n, d) with n > 0 and d > 0, got shape {X.shape}")
    if w.shape != X.shape[1:]:
        raise ValueError(f"w must be {X.shape[1]} weights, one for each column of X, got {len(w)}")
    if y is not None and y.shape != X.shape[:1]:
        raise ValueError(f"y must be {len(X)} labels, one for each row of X, got {len(y)}")
    if y is not None and not (np.abs(y) <= 1).all():
        raise ValueError(f"y must be labels -1 and 1, or means of such, got {y[np.abs(y) > 1][0]}")
