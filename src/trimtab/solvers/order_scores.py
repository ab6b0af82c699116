r"""Scores of a topological order: the best fit of every node by the nodes before it.

A score that sums over nodes, $F(\pi) = \sum_k f(\pi_k \mid \{\pi_1, \dots, \pi_{k-1}\})$, depends on the nodes before
$\pi_k$ as a set only. Swapping two positions therefore changes the terms between them and no others, and swaps of
disjoint ranges of positions change it independently of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.linalg import cholesky, lapack, solve_triangular
from scipy.special import expit

Matrix = NDArray[np.float64]
Order = NDArray[np.int64]
Regress = Callable[[Matrix, Matrix], tuple[Matrix, float]]
"""Fits a node (n,) by its possible parents (n, k), k >= 0: their weights (k,), and the node's part of the score."""

_RIDGE = 1e-10  # of the mean variance: keeps the covariance definite where variables depend on each other
_NEWTON_STEPS = 50
_LEAST_VARIANCE = 1e-6  # of a direction, as a share of the mean


class OrderScore(Protocol):
    """What the search over orders asks for."""

    def fit(self, order: Order) -> tuple[Float[Matrix, "d d"], float]:
        """Weights of the best fit that has edges from earlier to later nodes only, and its score."""

    def swapped(self, order: Order, candidates: Bool[NDArray[np.bool_], "d d"]) -> Float[Matrix, "d d"]:
        """At (a, b), a < b, the score after swapping positions a and b; inf where that is no candidate."""

    def gradient(self, W: Float[Matrix, "d d"]) -> Float[Matrix, "d d"] | None:
        """How fast the score changes as an absent edge appears (its least subgradient); None where unknown."""


class LeastSquares:
    r"""Half the mean squared residuals, $F(W) = \frac{1}{2n} \lVert X - XW \rVert_F^2$, from the covariance alone.

    With the Cholesky factor of the covariance in the order, $F = \frac12 \sum_k L_{kk}^2$; all swaps together cost
    about as much as one factorisation for each position.

    Args:
        S: (d, d) covariance.
    """

    def __init__(self, S: Float[Matrix, "d d"]) -> None:
        self.S = regular(S)

    def fit(self, order: Order) -> tuple[Matrix, float]:
        factor = self._factor(order)
        # x = B x + e for the residuals e, whose covariance is that of L^-1 x times L's diagonal: I - B = diag(L) L^-1.
        inverse, _ = lapack.dtrtri(factor, lower=1)
        weights = np.zeros_like(self.S)
        weights[np.ix_(order, order)] = np.tril(-factor.diagonal()[:, None] * inverse, -1).T
        return weights, float(np.square(factor.diagonal()).sum()) / 2

    def swapped(self, order: Order, candidates: NDArray[np.bool_]) -> Matrix:
        factor = self._factor(order)
        score = float(np.square(factor.diagonal()).sum()) / 2
        return np.where(candidates, score + swap_changes(factor) / 2, np.inf)

    def gradient(self, W: Matrix) -> Matrix:
        return self.S @ (W - np.eye(len(W)))

    def _factor(self, order: Order) -> Matrix:
        return np.asarray(cholesky(self.S[np.ix_(order, order)], lower=True, check_finite=False))


def covariance(X: Float[Matrix, "n d"]) -> Float[Matrix, "d d"]:
    """Of the columns of X, divided by n.

    Raises:
        ValueError: X has a constant column, or values whose squares are not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        centred = X - X.mean(0)
        S: Matrix = centred.T @ centred / len(X)
    if not np.isfinite(S).all():
        raise ValueError(f"X must be so small that its squares are finite, got values up to {np.abs(X).max():.3g}")
    # The mean of equal numbers may be off by rounding, so that they seem to vary.
    if not ((S.diagonal() > 0) & (np.ptp(X, axis=0) > 0)).all():
        raise ValueError(
            "X must be without constant columns, got "
            f"{np.flatnonzero((S.diagonal() <= 0) | (np.ptp(X, axis=0) == 0)).tolist()}"
        )
    return S


def noise_unit(S: Float[Matrix, "d d"]) -> float:
    r"""The geometric mean of the noise scales of any linear model $x = W^\top x + z$ with covariance S.

    Without cycles $\det(I - W) = 1$, so that $\det S = \prod_j \sigma_j^2$ whatever the graph and its weights: the
    unit of the data that depends on neither. Directions with less than a millionth of the mean variance, as there are
    where samples are fewer than variables, count as having that much.

    Args:
        S: (d, d) covariance.

    Example:
        >>> round(noise_unit(np.array([[4.0, 8.0], [8.0, 17.0]])), 6)  # noise of 2 and 1
        1.414214
    """
    variances = np.linalg.eigvalsh(S)
    return math.exp(float(np.log(np.maximum(variances, _LEAST_VARIANCE * variances.mean())).mean()) / 2)


def regular(S: Float[Matrix, "d d"]) -> Float[Matrix, "d d"]:
    """S where it is definite; else, as where samples are few, with a ridge of 1e-10 of its mean diagonal."""
    mean = float(S.diagonal().mean())
    *_, info = lapack.dpstrf(S, tol=_RIDGE * mean)
    return S if info == 0 else S + _RIDGE * mean * np.eye(len(S))


def swap_changes(factor: Float[Matrix, "d d"]) -> Float[Matrix, "d d"]:
    r"""How much the sum of residual variances changes when two positions of an order are swapped.

    Take the node at position a out, and let $L'$ be the factor of the nodes after it given those before. The residual
    variance at a position k between a and b, where b's node has come in front, is then

    $$
    L'^2_{kk} \frac{v_{b, k+1}}{v_{bk}}, \qquad v_{bk} = \sum_{t=k}^{b} L'^2_{bt} = \operatorname{var}(x_b \mid x_{<k}),
    $$

    that of b's node in front is $v_{b, a+1}$, and the node from a is fitted by all up to b: a forward substitution.

    Args:
        factor: (d, d) lower Cholesky factor of the covariance in the order.

    Returns:
        (d, d), at (a, b) for a < b; zeros elsewhere.

    Example:
        >>> covariance = np.array([[1.0, 0.5], [0.5, 2.0]])
        >>> swapped = np.linalg.cholesky(covariance[::-1, ::-1])
        >>> before = np.linalg.cholesky(covariance)
        >>> change = swap_changes(before)[0, 1]
        >>> bool(np.isclose(change, np.square(np.diag(swapped)).sum() - np.square(np.diag(before)).sum()))
        True
    """
    d = len(factor)
    variances = np.square(factor.diagonal())
    changes = np.zeros((d, d))
    for a in range(d - 1):
        block = factor[a:, a:]
        covariance = block @ block.T
        rest = np.asarray(cholesky(covariance[1:, 1:], lower=True, check_finite=False))
        # ahead[b, k] is the variance of b given all before k without a's node; equal to L'[b, b]^2 at k = b.
        ahead = np.cumsum(np.square(rest)[:, ::-1], axis=1)[:, ::-1]
        kept = np.square(rest.diagonal())
        between = np.zeros_like(ahead)
        np.divide(ahead[:, 1:], ahead[:, :-1], out=between[:, :-1], where=ahead[:, :-1] > 0)
        between *= np.tri(d - a - 1, k=-1)  # positions before b
        explained = np.square(solve_triangular(rest, covariance[1:, 0], lower=True, check_finite=False))
        moved = variances[a] - np.cumsum(explained)
        after = ahead[:, 0] + between @ kept + moved
        changes[a, a + 1 :] = after - (variances[a] + np.cumsum(variances[a + 1 :]))
    return changes


class Nodewise:
    """Any score that is a sum over nodes, each fitted once for every set of nodes that came before it.

    Args:
        X: (n, d) the data.
        regress: fits one node.
        gradient: of the score with respect to absent edges, at weights (d, d).
        warm_start: give `regress` a third argument, weights (k,) to start from: those of the node's fit before.
    """

    def __init__(
        self,
        X: Matrix,
        regress: Callable[..., tuple[Matrix, float]],
        gradient: Callable[[Matrix], Matrix] | None = None,
        *,
        warm_start: bool = False,
    ) -> None:
        self.X, self.regress, self._gradient = X, regress, gradient
        self._fits: dict[tuple[int, bytes], tuple[Matrix, float]] = {}
        self._before = np.zeros((X.shape[1], X.shape[1])) if warm_start else None

    def fit(self, order: Order) -> tuple[Matrix, float]:
        d = len(order)
        weights, score = np.zeros((d, d)), 0.0
        for k, node in enumerate(order):
            weights[:, node], value = self.node(node, order[:k])
            score += value
        return weights, score

    def swapped(self, order: Order, candidates: NDArray[np.bool_]) -> Matrix:
        values = np.array([self.node(node, order[:k])[1] for k, node in enumerate(order)])
        scores = np.full(candidates.shape, np.inf)
        for a, b in np.argwhere(np.triu(candidates, 1)):
            changed = swap(order, a, b)
            inside = sum(self.node(changed[k], changed[:k])[1] for k in range(a, b + 1))
            scores[a, b] = values[:a].sum() + inside + values[b + 1 :].sum()
        return scores

    def gradient(self, W: Matrix) -> Matrix | None:
        return None if self._gradient is None else self._gradient(W)

    def node(self, node: int, parents: Order) -> tuple[Matrix, float]:
        """Weights (d,) of the node's fit by these parents, zero for all others, and its part of the score."""
        allowed = np.zeros(self.X.shape[1], dtype=bool)
        allowed[parents] = True
        key = int(node), allowed.tobytes()
        if key not in self._fits:
            weights = np.zeros(self.X.shape[1])
            start = () if self._before is None else (self._before[allowed, node],)
            found, value = self.regress(self.X[:, allowed], self.X[:, node], *start)
            found = np.asarray(found, dtype=np.float64)
            if found.shape != (allowed.sum(),) or not np.isfinite(found).all() or not math.isfinite(value):
                raise ValueError(
                    f"loss must return {allowed.sum()} finite weights and a finite number for that many parents, "
                    f"got weights of shape {found.shape} and {value}"
                )
            weights[allowed] = found
            if self._before is not None:
                self._before[:, node] = weights
            self._fits[key] = weights, float(value)
        return self._fits[key]


def swap(order: Int[Order, " d"], a: int, b: int) -> Int[Order, " d"]:
    """A copy with the nodes at two positions swapped."""
    changed = order.copy()
    changed[[a, b]] = order[[b, a]]
    return changed


def lasso_score(S: Float[Matrix, "d d"], lambda1: float) -> Nodewise:
    r"""Least squares with a penalty, $\frac{1}{2n} \lVert X - XW \rVert_F^2 + \lambda \lVert W \rVert_1$.

    The regressions see d rows with the covariance of the data instead of the n rows of data.
    """
    d = len(S)
    S = regular(S)
    rows = math.sqrt(d) * np.asarray(cholesky(S, lower=False))

    def regress(parents: Matrix, node: Matrix, start: Matrix) -> tuple[Matrix, float]:
        weights = quadratic_lasso(parents.T @ parents / d, parents.T @ node / d, lambda1, start)
        rest = node - parents @ weights
        return weights, float(rest @ rest) / (2 * d) + lambda1 * float(np.abs(weights).sum())

    return Nodewise(rows, regress, lambda W: beyond(S @ (W - np.eye(d)), lambda1), warm_start=True)


def logistic_score(X: Float[Matrix, "n d"], lambda1: float) -> Nodewise:
    r"""Logistic regressions of 0 and 1, $\frac1n \sum [\log(1+e^{XW}) - X \circ XW] + \lambda \lVert W \rVert_1$

    Solved by proximal Newton steps.
    """
    n = len(X)

    def regress(parents: Matrix, node: Matrix, start: Matrix) -> tuple[Matrix, float]:
        def value(w: Matrix) -> float:
            logits = parents @ w
            loss = float(np.logaddexp(0, logits).sum() - node @ logits) / n
            return loss + lambda1 * float(np.abs(w).sum())

        weights = start.copy()
        best = value(weights)
        for _ in range(_NEWTON_STEPS if len(weights) else 0):
            chance = expit(parents @ weights)
            gradient = parents.T @ (chance - node) / n
            curvature = (parents * (chance * (1 - chance))[:, None]).T @ parents / n
            curvature += max(_RIDGE, _RIDGE * curvature.diagonal().mean()) * np.eye(len(weights))
            step = quadratic_lasso(curvature, curvature @ weights - gradient, lambda1, start=weights) - weights
            model = float(gradient @ step) + lambda1 * float(np.abs(weights + step).sum() - np.abs(weights).sum())
            length, trial = 1.0, value(weights + step)
            while trial > best + 1e-4 * length * model and length > 1e-6:
                length /= 2
                trial = value(weights + length * step)
            if not trial < best:
                break
            settled = best - trial <= 1e-12 * best
            weights, best = weights + length * step, trial
            if settled:
                break
        return weights, best

    return Nodewise(X, regress, lambda W: beyond(X.T @ (expit(X @ W) - X) / n, lambda1), warm_start=True)


def beyond(gradient: Matrix, lambda1: float) -> Matrix:
    """What is left of a gradient at zero weights once the penalty has taken its share."""
    return np.sign(gradient) * np.maximum(np.abs(gradient) - lambda1, 0)


def quadratic_lasso(
    G: Float[Matrix, "k k"], q: Float[Matrix, " k"], lambda1: float, start: Float[Matrix, " k"] | None = None
) -> Float[Matrix, " k"]:
    r"""The minimiser of $\frac12 w^\top G w - q^\top w + \lambda \lVert w \rVert_1$, exact up to rounding.

    Feature-sign search (Lee, Battle, Raina and Ng, NIPS 2006): solves for the entries believed to be non-zero with the
    signs believed of them, goes there or to the best place on the way where a sign changes, and lets in the zero entry
    that violates optimality most. As the objective falls at every turn, no belief is held twice.

    Args:
        G: (k, k) positive definite.
        q: (k,) linear term.
        lambda1: weight of the penalty, at least 0.
        start: (k,) where to begin; by default where there is no penalty.

    Example:
        >>> quadratic_lasso(np.eye(3), np.array([3.0, -0.5, -2.0]), 1.0)
        array([ 2., 0., -1.])
    """
    w = np.asarray(np.linalg.solve(G, q) if start is None else start.copy(), dtype=np.float64)
    signs = np.sign(w)
    slack = 1e-10 * (lambda1 + float(np.abs(q).max(initial=0)))
    while True:
        active = np.flatnonzero(signs)
        goal = np.zeros_like(w)
        if len(active):
            goal[active] = lapack.dposv(G[active[:, None], active], q[active] - lambda1 * signs[active])[1]
        turned = active[(w[active] * goal[active] < 0) | ((w[active] == 0) & (signs[active] * goal[active] < 0))]
        if len(turned):
            shares = np.append(w[turned] / (w[turned] - goal[turned]), 1.0)
            points = w + shares[:, None] * (goal - w)
            points[np.arange(len(turned)), turned] = 0
            values = ((0.5 * points @ G - q) * points + lambda1 * np.abs(points)).sum(1)
            w = points[values.argmin()]
        else:
            w = goal
        signs = np.sign(w)
        gradient = G @ w - q
        if np.abs(gradient + lambda1 * signs)[signs != 0].max(initial=0) > slack:
            continue
        excess = np.where(signs == 0, np.abs(gradient) - lambda1, 0)
        worst = int(excess.argmax()) if len(w) else 0
        if not len(w) or excess[worst] <= slack:
            return w
        signs[worst] = -np.sign(gradient[worst])
