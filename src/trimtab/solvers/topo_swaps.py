r"""Topological swaps: learns a causal graph, or improves another method's, by swapping nodes of its order.

For any score of the NOTEARS kind: least squares, with or without a lasso penalty, logistic, or your own regression of a
node on its parents. It can follow every other method (`polish_dag`), and takes milliseconds where the score is least
squares.

$$
\min_\pi F(\pi), \qquad F(\pi) = \min_{W:\ W_{ij} = 0 \text{ unless } i \text{ stands before } j \text{ in } \pi} F(W)
$$

Where $W$ is optimal for its order, an edge $i \to j$ that the order forbids violates the optimality conditions of the
problem without the order if it would close no cycle, $[\nabla h(|W|)]_{ij} = [(I - |W|)^{-\top}]_{ij} = 0$, and yet
would lower the score, $[\nabla F(W)]_{ij} \ne 0$. Candidates for a swap are the pairs with the least
$[\nabla h(|W|)]_{ij}$ among those with $|[\nabla F(W)]_{ij}| > \xi$.

Reference: Chang Deng, Kevin Bello, Bryon Aragam and Pradeep Ravikumar, "Optimizing NOTEARS Objectives via Topological
Swaps", ICML 2023, arXiv 2305.17277.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, validate_data

from trimtab.ops.arguments import integer, non_negative
from trimtab.solvers.acyclicity import check_weights, path_weights, to_dag, topological_order
from trimtab.solvers.order_scores import (
    LeastSquares,
    Matrix,
    Nodewise,
    Order,
    OrderScore,
    Regress,
    covariance,
    lasso_score,
    logistic_score,
    noise_unit,
    swap,
)

Loss = Literal["l2", "logistic"] | Regress

_PENALTY = 0.05  # of what `polish_dag` returns, where noise has unit variance
_LEAST_GAIN = 1e-10  # as a share of the score: less is rounding


@dataclass(frozen=True)
class TopoSwapsResult:
    """An order, and the best weights for it.

    Attributes:
        order: (d,) nodes from first to last.
        weights: (d, d) of the edges i -> j, which go from earlier to later nodes; not thresholded.
        score: of the weights.
        history: scores at the start and after each round of swaps; each is lower than the one before.
        num_swaps: swaps made in all.
    """

    order: Int[Order, " d"]
    weights: Float[Matrix, "d d"]
    score: float
    history: tuple[float, ...]
    num_swaps: int


def topo_swaps(
    score: OrderScore,
    order: Int[ArrayLike, " d"],
    *,
    size_small: int | None = None,
    size_large: int | None = None,
    n_large_search: int = 1,
    xi: float = 0.0,
) -> TopoSwapsResult:
    """Swaps pairs of an order until no candidate lowers the score.

    A round makes all improving swaps of the candidates, the best first, that do not reach into the range of positions
    of one made before: what they gain adds up. Where the few best candidates hold no improvement, more are tried, up
    to a number of successful times.

    Args:
        score: of an order, as `order_scores.LeastSquares(S)`.
        order: (d,) a permutation of the nodes to start from.
        size_small: number of candidates of a round, and those that tie with the last of them; by default 100, or 23 %
            of the pairs if that is more: the authors' share at 30 nodes.
        size_large: number where there is no improvement among the small; by default 400, or 92 % of the pairs. Both
            are cut down to the number of pairs, d (d - 1) / 2.
        n_large_search: how often a large set may be turned to and help, at least 0.
        xi: what the gradient of a candidate must exceed, at least 0.

    Raises:
        ValueError: the order is no permutation, or an argument is out of its range.

    Example:
        >>> S = np.array([[1.0, 2.0, 4.0], [2.0, 5.0, 10.0], [4.0, 10.0, 21.0]])
        >>> from trimtab.solvers.order_scores import LeastSquares
        >>> result = topo_swaps(LeastSquares(S), order=[2, 1, 0])
        >>> result.order, round(result.score, 6)
        (array([0, 1, 2]), 1.5)
    """
    order = _check_order(order)
    pairs = len(order) * (len(order) - 1) // 2
    small = max(100, math.ceil(0.23 * pairs)) if size_small is None else size_small
    large = max(400, math.ceil(0.92 * pairs)) if size_large is None else size_large
    small, large = integer("size_small", small), integer("size_large", large)
    n_large_search, xi = integer("n_large_search", n_large_search, 0), non_negative("xi", xi)
    weights, value = score.fit(order)
    history, num_swaps, large_searches = [value], 0, 0
    while True:
        few = candidate_swaps(weights, order, score.gradient(weights), small, xi)
        chosen = _improving(score.swapped(order, few), value)
        if not chosen and large_searches < n_large_search:
            more = candidate_swaps(weights, order, score.gradient(weights), large, xi) & ~few
            chosen = _improving(score.swapped(order, more), value)
            large_searches += bool(chosen)
        changed = order
        for a, b in chosen:
            changed = swap(changed, a, b)
        new_weights, new_value = score.fit(changed) if chosen else (weights, value)
        if not new_value < value:
            return TopoSwapsResult(order, weights, value, tuple(history), num_swaps)
        order, weights, value = changed, new_weights, new_value
        history.append(value)
        num_swaps += len(chosen)


def candidate_swaps(
    W: Float[Matrix, "d d"], order: Int[Order, " d"], gradient: Float[Matrix, "d d"] | None, size: int, xi: float = 0.0
) -> NDArray[np.bool_]:
    """The pairs of positions a < b to try: those where the edge from b's node to a's is nearest to closing no cycle.

    Args:
        W: (d, d) weights that keep to the order.
        order: (d,) the order.
        gradient: (d, d) of the score; where None, no pair is left out for it.
        size: how many pairs, and those that tie with the last of them.
        xi: what the absolute gradient must exceed.

    Returns:
        (d, d), true at (a, b).
    """
    possible = np.triu(np.ones(W.shape, dtype=bool), 1)
    if gradient is not None:
        possible &= np.abs(gradient[np.ix_(order, order)].T) > xi
    cycles = path_weights(W[np.ix_(order, order)])
    values = cycles[possible]
    if len(values) <= size:
        return possible
    nearest: NDArray[np.bool_] = possible & (cycles <= np.partition(values, size - 1)[size - 1])
    return nearest


def polish_dag(
    W: Float[ArrayLike, "d d"],
    X: Float[ArrayLike, "n d"],
    *,
    loss: Loss = "l2",
    lambda1: float | None = None,
    **search: Any,
) -> TopoSwapsResult:
    """Improves the graph that another method has found: its order is the start.

    The score of the result is at most that of `W`, cycles of its weakest edges cut first if it has any. Without a
    penalty the score never prefers fewer edges, and on few samples the order that fits best has many false ones: at 100
    samples of 20 variables, a graph with 2 wrong edges came back with 23, and with the penalty with 2. So there is one
    by default; 0 for the bare score.

    Args:
        W: (d, d) weights of the edges i -> j.
        X: (n, d) the data.
        loss: as for `TopoSwaps`.
        lambda1: weight of the sum of absolute weights, at least 0. By default 0.05 for "logistic", and for "l2" 0.05
            times the geometric mean of the variables' noise variances, so that the unit of X does not matter; your own
            function sees to its own penalty.
        **search: `size_small`, `size_large`, `n_large_search`, `xi`; see `topo_swaps`.

    Raises:
        ValueError: W is no finite square matrix for these data, or the data do not suit the loss.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(500, 3))
        >>> X = np.stack([z[:, 0], z[:, 1] + z[:, 0], z[:, 2] - z[:, 0] + 2 * z[:, 1]], axis=1)
        >>> reversed_edges = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]])
        >>> polish_dag(reversed_edges, X).order
        array([0, 1, 2])
    """
    start = check_weights(W)
    data: Matrix = check_array(X, dtype=np.float64, ensure_min_samples=2, ensure_min_features=2, input_name="X")
    if len(start) != data.shape[1]:
        raise ValueError(f"W must be of one row for each of the {data.shape[1]} columns of X, got shape {start.shape}")
    if lambda1 is None:
        lambda1 = 0.0 if callable(loss) else _PENALTY
        if loss == "l2":
            lambda1 *= noise_unit(covariance(data)) ** 2
    return topo_swaps(_order_score(data, loss, lambda1), _order_of(start), **search)


class TopoSwaps(BaseEstimator):  # type: ignore[misc]
    """Learns a graph by topological swaps.

    The result is a local optimum that depends on the start, more so with a penalty: of several starts keep the one with
    the lowest `score_`, or start from another method's graph.

    Args:
        loss: "l2" (least squares of the centred data), "logistic" (columns of zeros and ones), or a function
            `(parents (n, k), node (n,)) -> (weights (k,), score)` that fits one node, k from 0 to d - 1: the scores of
            all nodes are summed. It is called once for every set of parents.
        lambda1: weight of the sum of absolute weights, at least 0; your own function sees to its own penalty.
        size_small: number of candidate pairs of a round; see `topo_swaps`.
        size_large: number where there is no improvement among the small.
        n_large_search: how often a large set may be turned to and help.
        xi: what the gradient of a candidate must exceed.
        init: where to start: "random", an order (d,), or weights (d, d) as `polish_dag` takes them.
        threshold: least absolute weight of an edge.
        random_state: seeds the random start.

    Attributes:
        order_: (d,) nodes from first to last.
        weights_: (d, d) weights of the graph's edges i -> j: `raw_weights_` after the threshold.
        adjacency_: (d, d) whether there is an edge from i to j.
        raw_weights_: (d, d) the best weights for the order.
        score_: of `raw_weights_`.
        history_: scores at the start and after each round of swaps.
        num_swaps_: swaps made in all.
        n_features_in_: d.

    Raises:
        ValueError: the data are not finite or do not suit the loss, or an argument is out of its range.

    Example:
        >>> z = np.random.default_rng(0).normal(size=(500, 3))
        >>> X = np.stack([z[:, 0], z[:, 1] + z[:, 0], z[:, 2] + 2 * (z[:, 0] + z[:, 1])], axis=1)
        >>> model = TopoSwaps(random_state=0).fit(X)
        >>> model.adjacency_.astype(int)
        array([[0, 1, 0], [0, 0, 1], [0, 0, 0]])
    """

    def __init__(
        self,
        loss: Loss = "l2",
        *,
        lambda1: float = 0.0,
        size_small: int | None = None,
        size_large: int | None = None,
        n_large_search: int = 1,
        xi: float = 0.0,
        init: Literal["random"] | ArrayLike = "random",
        threshold: float = 0.3,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.loss = loss
        self.lambda1 = lambda1
        self.size_small = size_small
        self.size_large = size_large
        self.n_large_search = n_large_search
        self.xi = xi
        self.init = init
        self.threshold = threshold
        self.random_state = random_state

    def fit(self, X: Float[ArrayLike, "n d"], y: Any = None) -> Self:
        """Learns the graph of the columns of X; `y` is ignored."""
        data: Matrix = check_array(
            X, dtype=np.float64, ensure_min_samples=2, ensure_min_features=2, estimator=self, input_name="X"
        )
        threshold = non_negative("threshold", self.threshold)
        found = topo_swaps(
            _order_score(data, self.loss, self.lambda1),
            self._start(data.shape[1]),
            size_small=self.size_small,
            size_large=self.size_large,
            n_large_search=self.n_large_search,
            xi=self.xi,
        )
        validate_data(self, X, skip_check_array=True)  # remembers the columns, once nothing can be refused any more
        self.weights_ = to_dag(found.weights, threshold)
        self.adjacency_ = self.weights_ != 0
        self.order_, self.raw_weights_ = found.order, found.weights
        self.score_, self.history_, self.num_swaps_ = found.score, found.history, found.num_swaps
        return self

    def _start(self, d: int) -> Order:
        if isinstance(self.init, str):
            if self.init != "random":
                raise ValueError(f'init must be "random", an order or weights, got {self.init!r}')
            return np.asarray(check_random_state(self.random_state).permutation(d), dtype=np.int64)
        start = np.asarray(self.init)
        if start.shape not in ((d,), (d, d)):
            raise ValueError(f"init must be an order ({d},) or weights ({d}, {d}), got shape {start.shape}")
        return _check_order(start, "init") if start.ndim == 1 else _order_of(check_weights(start, "init"))


def _order_score(X: Matrix, loss: Loss, lambda1: float) -> OrderScore:
    lambda1 = non_negative("lambda1", lambda1)
    if callable(loss):
        if lambda1:
            raise ValueError(f"lambda1 must be 0 where loss is a function, got {lambda1}")
        return Nodewise(X, loss)
    if loss == "logistic":
        if not np.isin(X, (0, 1)).all():
            raise ValueError('X must be zeros and ones for loss="logistic", got other values')
        return logistic_score(X, lambda1)
    if loss != "l2":
        raise ValueError(f'loss must be "l2", "logistic" or a function, got {loss!r}')
    S = covariance(X)
    return lasso_score(S, lambda1) if lambda1 else LeastSquares(S)


def _order_of(W: Matrix) -> Order:
    order = topological_order(to_dag(W, 0))
    if order is None:
        raise ValueError("W must be without cycles once its weakest edges are cut, got one with a cycle")
    return order


def _check_order(order: ArrayLike, name: str = "order") -> Order:
    given = np.asarray(order)
    if given.ndim != 1 or not len(given) or not np.array_equal(np.sort(given), np.arange(len(given))):
        raise ValueError(f"{name} must be a permutation of 0 .. d - 1, got {given}")
    return given.astype(np.int64)


def _improving(scores: Float[Matrix, "d d"], value: float) -> list[tuple[int, int]]:
    """Swaps that lower the score, the best first, none reaching into the positions of one before it."""
    better = np.argwhere(scores < value - _LEAST_GAIN * abs(value))
    free = np.ones(len(scores), dtype=bool)
    chosen = []
    for a, b in better[np.argsort(scores[tuple(better.T)], kind="stable")]:
        if free[a : b + 1].all():
            free[a : b + 1] = False
            chosen.append((int(a), int(b)))
    return chosen
