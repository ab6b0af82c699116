r"""Weighted directed graphs without cycles: how far a matrix is from one, and the way back to one.

A matrix $W$ holds the weight of the edge $i \to j$ in $W_{ij}$. Functions $h$ that are zero exactly at acyclic graphs,
with their gradients:

$$
h_s(W) = d \log s - \log\det(s I - W \circ W), \qquad
\nabla h_s(W) = 2 W \circ (s I - W \circ W)^{-\top}
$$

$$
h(W) = \operatorname{tr} e^{W \circ W} - d, \qquad \nabla h(W) = 2 W \circ (e^{W \circ W})^\top
$$

References:
    Kevin Bello, Bryon Aragam and Pradeep Ravikumar, "DAGMA: Learning DAGs via M-matrices and a Log-Determinant
    Acyclicity Characterization", NeurIPS 2022, arXiv 2209.08037.
    Xun Zheng, Bryon Aragam, Pradeep Ravikumar and Eric P. Xing, "DAGs with NO TEARS: Continuous Optimization for
    Structure Learning", NeurIPS 2018, arXiv 1803.01422.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import expm

from trimtab.ops.arguments import non_negative, positive

Matrix = NDArray[np.float64]


def h_logdet(W: Float[ArrayLike, "d d"], s: float = 1.0) -> tuple[float, Float[Matrix, "d d"]]:
    """The log-determinant's value and gradient (DAGMA, Theorem 1).

    Args:
        W: (d, d) weights in the domain: the spectral radius of their squares is below `s`.
        s: positive; the domain's size.

    Returns:
        The value and the gradient, (d, d); (inf, matrix of nan) outside the domain. Both are exactly zero without
        cycles, however large the weights.

    Raises:
        ValueError: W is no finite square matrix, it has a cycle and a weight whose square is not finite, or `s` is not
            positive.

    Example:
        >>> value, gradient = h_logdet([[0.0, 0.5], [0.5, 0.0]])
        >>> round(value, 5)
        0.06454
        >>> h_logdet([[0.0, 3.0], [0.0, 0.0]])[0]
        0.0
    """
    W, s = check_weights(W), positive("s", s)
    # An edge's gradient is the weight of the paths back from its end: there are none.
    if is_dag(W):
        return 0.0, np.zeros_like(W)
    squares = _squares(W)
    if np.abs(np.linalg.eigvals(squares)).max() >= s:
        return math.inf, np.full_like(W, np.nan)
    matrix = s * np.eye(len(W)) - squares
    value = len(W) * math.log(s) - float(np.linalg.slogdet(matrix)[1])
    return max(value, 0.0), 2 * W * np.linalg.inv(matrix).T


def h_expm(W: Float[ArrayLike, "d d"]) -> tuple[float, Float[Matrix, "d d"]]:
    """The matrix exponential's value and gradient (NOTEARS, Theorem 1); both exactly zero without cycles.

    Raises:
        ValueError: W is no finite square matrix, or so large that its exponential is not finite.

    Example:
        >>> value, gradient = h_expm([[0.0, 0.5], [0.5, 0.0]])
        >>> round(value, 5)
        0.06283
    """
    W = check_weights(W)
    if is_dag(W):
        return 0.0, np.zeros_like(W)
    with np.errstate(over="ignore", invalid="ignore"):
        exponential = expm(_squares(W))
    if not np.isfinite(exponential).all():
        raise ValueError(f"W must be so small that its exponential is finite, got weights up to {np.abs(W).max():.3g}")
    return float(np.trace(exponential)) - len(W), 2 * W * exponential.T


def topological_order(W: Float[ArrayLike, "d d"]) -> Int[NDArray[np.int64], " d"] | None:
    """Nodes such that every edge goes from an earlier to a later one; None where there is a cycle.

    Raises:
        ValueError: W is no finite square matrix.

    Example:
        >>> topological_order([[0, 0, 1], [2, 0, 0], [0, 0, 0]])
        array([1, 0, 2])
        >>> topological_order([[0, 1], [1, 0]]) is None
        True
    """
    edges = check_weights(W) != 0
    incoming = edges.sum(0)
    order: list[int] = []
    ready = list(np.flatnonzero(incoming == 0))
    while ready:
        node = ready.pop(0)
        order.append(int(node))
        children = np.flatnonzero(edges[node])
        incoming[children] -= 1
        ready += list(children[incoming[children] == 0])
    return np.array(order, dtype=np.int64) if len(order) == len(edges) else None


def is_dag(W: Float[ArrayLike, "d d"]) -> bool:
    """Whether the non-zero entries are the edges of a graph without cycles, self-loops included."""
    return topological_order(W) is not None


def to_dag(W: Float[ArrayLike, "d d"], threshold: float = 0.3) -> Float[Matrix, "d d"]:
    """Removes the edges weaker than a threshold, and then the weakest ones until no cycle is left.

    Args:
        W: (d, d) weights.
        threshold: least absolute weight of an edge, at least 0.

    Returns:
        A copy of W with zeros for the edges removed.

    Raises:
        ValueError: W is no finite square matrix, or the threshold is negative.

    Example:
        >>> to_dag([[0.0, 2.0, 0.1], [0.4, 0.0, 1.0], [0.5, 0.0, 0.0]])
        array([[0., 2., 0.], [0., 0., 1.], [0., 0., 0.]])
    """
    W, threshold = check_weights(W).copy(), non_negative("threshold", threshold)
    W[np.abs(W) < threshold] = 0
    np.fill_diagonal(W, 0)
    edges = np.argwhere(W)
    edges = edges[np.argsort(np.abs(W[tuple(edges.T)]), kind="stable")]
    # The fewest edges of the list's head without which no cycle is left: found by bisection, since removing more of
    # them never closes one.
    few, many = 0, len(edges)
    while few < many:
        middle = (few + many) // 2
        trial = W.copy()
        trial[tuple(edges[:middle].T)] = 0
        few, many = (few, middle) if is_dag(trial) else (middle + 1, many)
    W[tuple(edges[:few].T)] = 0
    return W


def path_weights(W: Float[Matrix, "d d"]) -> Float[Matrix, "d d"]:
    r"""Sum over the paths from i to j of the products of their absolute weights, $(I - |W|)^{-1}_{ij}$, of a DAG.

    Its transpose is the gradient of $-\log\det(I - |W|)$ with respect to $|W|$.
    """
    return np.asarray(np.linalg.inv(np.eye(len(W)) - np.abs(W)), dtype=np.float64)


def check_weights(W: ArrayLike, name: str = "W") -> Float[Matrix, "d d"]:
    """W as a float64 array.

    Raises:
        ValueError: it is no finite square matrix.
    """
    matrix = np.asarray(W, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"{name} must be a square matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return matrix


def _squares(W: Float[Matrix, "d d"]) -> Float[Matrix, "d d"]:
    with np.errstate(over="ignore"):
        squares = W * W
    if not np.isfinite(squares).all():
        raise ValueError(f"W must be so small that its squares are finite, got weights up to {np.abs(W).max():.3g}")
    return squares
