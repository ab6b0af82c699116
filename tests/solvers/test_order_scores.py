"""Scores of orders against regressions one by one, scikit-learn's lasso, and refits after every swap."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import Lasso, LinearRegression

from trimtab.solvers.order_scores import (
    LeastSquares,
    Nodewise,
    beyond,
    lasso_score,
    logistic_score,
    quadratic_lasso,
    swap,
    swap_changes,
)


def centred(d: int = 6, n: int = 80, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) @ (np.eye(d) + rng.normal(size=(d, d)))
    return X - X.mean(0)


def every(d: int) -> np.ndarray:
    return np.triu(np.ones((d, d), dtype=bool), 1)


def test_least_squares_fits_each_node_by_those_before_it() -> None:
    X, order = centred(), np.array([3, 0, 5, 1, 4, 2])
    weights, score = LeastSquares(X.T @ X / len(X)).fit(order)
    expected = np.zeros((6, 6))
    for k in range(1, 6):
        expected[order[:k], order[k]] = LinearRegression(fit_intercept=False).fit(X[:, order[:k]], X[:, order[k]]).coef_
    np.testing.assert_allclose(weights, expected, atol=1e-10)
    assert score == pytest.approx(((X - X @ expected) ** 2).sum() / (2 * len(X)), rel=1e-12)


@given(seed=st.integers(0, 10_000), d=st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_all_swaps_at_once_are_as_a_full_refit_after_each(seed: int, d: int) -> None:
    X = centred(d, seed=seed)
    score, order = LeastSquares(X.T @ X / len(X)), np.random.default_rng(seed).permutation(d)
    found = score.swapped(order, every(d))
    for a, b in itertools.combinations(range(d), 2):
        assert found[a, b] == pytest.approx(score.fit(swap(order, a, b))[1], rel=1e-9)
    assert np.isinf(found[~every(d)]).all()


def test_swap_of_neighbours_by_hand() -> None:
    """Var(x) = 1, Var(y | x) = 4 with slope 2; the other way round Var(y) = 8 and Var(x | y) = 1/2."""
    covariance = np.array([[1.0, 2.0], [2.0, 8.0]])
    changes = swap_changes(np.linalg.cholesky(covariance))
    assert changes[0, 1] == pytest.approx((8 + 0.5) - (1 + 4))


def logistic_data() -> np.ndarray:
    return (centred(5, 120, seed=2) > 0).astype(float)


SCORES = {
    "least squares": lambda: LeastSquares(centred().T @ centred() / 80),
    "lasso": lambda: lasso_score(centred().T @ centred() / 80, 0.2),
    "logistic": lambda: logistic_score(logistic_data(), 0.01),
}


@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
def test_disjoint_swaps_add_up(make: object) -> None:
    score = make()  # type: ignore[operator]
    order = np.arange(5 if isinstance(score, Nodewise) and len(score.X) == 120 else 6)
    value = score.fit(order)[1]
    found = score.swapped(order, every(len(order)))
    both = score.fit(swap(swap(order, 0, 1), 2, 4))[1]
    assert both - value == pytest.approx((found[0, 1] - value) + (found[2, 4] - value), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
def test_only_candidates_are_scored(make: object) -> None:
    score = make()  # type: ignore[operator]
    order = np.arange(5 if isinstance(score, Nodewise) and len(score.X) == 120 else 6)
    few = np.zeros((len(order), len(order)), dtype=bool)
    few[1, 3] = True
    found = score.swapped(order, few)
    assert (np.isfinite(found) == few).all()
    assert found[1, 3] == pytest.approx(score.fit(swap(order, 1, 3))[1], rel=1e-7)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 10), lambda1=st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_quadratic_lasso_is_optimal_from_any_start(seed: int, k: int, lambda1: float) -> None:
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(k + 2, k))
    G, q = A.T @ A + 1e-2 * np.eye(k), 2 * rng.normal(size=k)
    for start in (None, np.zeros(k), rng.normal(size=k) * (rng.random(k) < 0.5)):
        w = quadratic_lasso(G, q, lambda1, start)
        gradient = G @ w - q
        tolerance = 1e-8 * (1 + lambda1 + np.abs(q).max())
        assert (np.abs(gradient[w == 0]) <= lambda1 + tolerance).all()
        np.testing.assert_allclose(gradient[w != 0], -lambda1 * np.sign(w[w != 0]), atol=tolerance)


def test_lasso_is_scikit_learns() -> None:
    X, order = centred(), np.array([3, 0, 5, 1, 4, 2])
    weights, score = lasso_score(X.T @ X / len(X), 0.3).fit(order)
    expected = np.zeros((6, 6))
    for k in range(1, 6):
        model = Lasso(0.3, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(X[:, order[:k]], X[:, order[k]])
        expected[order[:k], order[k]] = model.coef_
    assert (expected[np.ix_(order, order)][every(6)] == 0).any()
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert score == pytest.approx(((X - X @ expected) ** 2).sum() / 160 + 0.3 * np.abs(expected).sum(), rel=1e-9)


@pytest.mark.parametrize("lambda1", [0.0, 0.02])
def test_logistic_is_the_minimum(lambda1: float) -> None:
    X = logistic_data()
    weights, score = logistic_score(X, lambda1).fit(np.arange(5))
    total = 0.0
    for k in range(5):

        def value(w: np.ndarray, k: int = k) -> float:
            logits = X[:, :k] @ w
            return (np.logaddexp(0, logits) - X[:, k] * logits).mean() + lambda1 * np.abs(w).sum()

        assert not weights[k:, k].any()
        total += value(weights[:k, k])
        if k:
            best = minimize(value, weights[:k, k] + 0.01, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
            assert value(weights[:k, k]) <= best.fun + 1e-9
    assert score == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
def test_gradient_is_how_fast_an_absent_edge_lowers_the_score(make: object) -> None:
    """By finite differences of the whole score, penalty included, in both directions of a weight at zero."""
    score = make()  # type: ignore[operator]
    if isinstance(score, LeastSquares):
        S, lambda1 = score.S, 0.0
        plain = lambda W: np.trace((np.eye(6) - W).T @ S @ (np.eye(6) - W)) / 2
    elif len(score.X) == 120:
        X, lambda1 = score.X, 0.01
        plain = lambda W: (np.logaddexp(0, X @ W) - X * (X @ W)).sum() / 120
    else:
        X, lambda1 = score.X, 0.2
        plain = lambda W: ((X - X @ W) ** 2).sum() / (2 * len(X))
    d = 5 if isinstance(score, Nodewise) and len(score.X) == 120 else 6
    W, _ = score.fit(np.arange(d))
    gradient = score.gradient(W)
    for i, j in [(d - 1, 0), (3, 1), (4, 2)]:
        step = np.zeros((d, d))
        step[i, j] = 1e-6
        up, down = (plain(W + step) - plain(W)) / 1e-6 + lambda1, (plain(W - step) - plain(W)) / 1e-6 + lambda1
        assert abs(gradient[i, j]) == pytest.approx(max(0.0, -up, -down), abs=1e-4)


def test_beyond_is_soft_thresholding() -> None:
    np.testing.assert_array_equal(beyond(np.array([3.0, -0.5, -2.0]), 1.0), [2, 0, -1])


def test_each_set_of_parents_is_fitted_once() -> None:
    X, seen = centred(4), []

    def regress(parents: np.ndarray, node: np.ndarray) -> tuple[np.ndarray, float]:
        seen.append((node[0], *parents[0]))
        return np.zeros(parents.shape[1]), float(node @ node)

    score = Nodewise(X, regress)
    score.fit(np.arange(4))
    score.swapped(np.arange(4), every(4))
    score.swapped(np.array([1, 0, 2, 3]), every(4))
    assert len(seen) == len(set(seen))
    assert score.gradient(np.zeros((4, 4))) is None


def test_a_regression_must_return_weights_and_a_number() -> None:
    with pytest.raises(ValueError, match="loss must return 1 finite weights"):
        Nodewise(centred(3), lambda parents, node: (np.zeros(7), 0.0)).node(0, np.array([1]))
    with pytest.raises(ValueError, match="loss must return"):
        Nodewise(centred(3), lambda parents, node: (np.zeros(parents.shape[1]), np.nan)).node(0, np.array([1]))


def test_variables_that_depend_on_each_other_are_borne() -> None:
    X = centred(4)
    X = np.concatenate([X, X[:, :1] + X[:, 1:2]], axis=1)
    score = LeastSquares(X.T @ X / len(X))
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 17):
        weights, value = score.fit(np.array(order))
        assert np.isfinite(weights).all()
        assert value == pytest.approx(((X - X @ weights) ** 2).sum() / (2 * len(X)), rel=1e-6)
