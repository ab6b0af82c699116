"""Topological swaps against brute force over orders, and the guarantees of the search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

from trimtab.solvers import TopoSwaps, graph_distance, polish_dag, topo_swaps
from trimtab.solvers.acyclicity import is_dag, path_weights, to_dag
from trimtab.solvers.order_scores import LeastSquares, swap
from trimtab.solvers.topo_swaps import _improving, candidate_swaps


def problem(d: int = 5, n: int = 500, seed: int = 0, density: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    order = rng.permutation(d)
    upper = np.triu(rng.uniform(0.5, 2, (d, d)) * rng.choice([-1, 1], (d, d)) * (rng.random((d, d)) < density), 1)
    X = rng.normal(size=(n, d)) @ np.linalg.inv(np.eye(d) - upper)
    W, mixed = np.zeros((d, d)), np.zeros((n, d))
    W[np.ix_(order, order)], mixed[:, order] = upper, X
    return mixed - mixed.mean(0), W


def least_squares(X: np.ndarray) -> LeastSquares:
    return LeastSquares(X.T @ X / len(X))


def test_finds_the_global_optimum_of_small_problems_from_nearly_every_start() -> None:
    found = 0
    for seed in range(4):
        X, _ = problem(seed=seed)
        score = least_squares(X)
        best = min(score.fit(np.array(order))[1] for order in itertools.permutations(range(5)))
        for start in range(10):
            result = topo_swaps(score, np.random.default_rng(start).permutation(5))
            assert result.score >= best - 1e-12
            found += result.score <= best * (1 + 1e-9)
    assert found >= 36


@pytest.mark.parametrize("seed", range(3))
def test_every_round_lowers_the_score_and_the_weights_keep_to_the_order(seed: int) -> None:
    X, _ = problem(12, seed=seed)
    score, start = least_squares(X), np.random.default_rng(seed).permutation(12)
    result = topo_swaps(score, start, size_small=10, size_large=40)
    assert result.history[0] == score.fit(start)[1]
    assert all(later < earlier for earlier, later in itertools.pairwise(result.history))
    assert result.score == result.history[-1] == pytest.approx(((X - X @ result.weights) ** 2).sum() / (2 * len(X)))
    assert len(result.history) - 1 <= result.num_swaps
    assert sorted(result.order) == list(range(12))
    assert not np.tril(result.weights[np.ix_(result.order, result.order)]).any()


def test_with_all_pairs_no_swap_is_left_that_would_help() -> None:
    X, _ = problem(9, seed=1)
    score = least_squares(X)
    result = topo_swaps(score, np.arange(9), size_small=36)
    for a, b in itertools.combinations(range(9), 2):
        assert score.fit(swap(result.order, a, b))[1] >= result.score * (1 - 1e-9)


def test_large_sets_are_turned_to_as_often_as_allowed() -> None:
    scores = [
        [
            topo_swaps(
                least_squares(problem(12, seed=seed)[0]), np.arange(12)[::-1], size_small=2, n_large_search=n
            ).score
            for n in (0, 1, 50)
        ]
        for seed in range(6)
    ]
    never, once, often = np.array(scores).T
    assert (once <= never).all()
    assert (often <= once).all()
    assert (once < never).any()
    assert (often < once).any()


def test_candidates_are_the_pairs_nearest_to_closing_no_cycle() -> None:
    W = np.zeros((4, 4))
    W[2, 0], W[0, 3], W[2, 1] = 0.5, -2.0, 0.1  # the order is 2, 0, 3, 1
    order = np.array([2, 0, 3, 1])
    # An edge back from b's node to a's would close a cycle of the weight of the paths from a's to b's.
    cycles = {(0, 1): 0.5, (0, 2): 1.0, (0, 3): 0.1, (1, 2): 2.0, (1, 3): 0.0, (2, 3): 0.0}
    assert path_weights(W)[2, 3] == cycles[0, 2]
    for size in range(1, 7):
        worst = sorted(cycles.values())[size - 1]
        expected = {pair for pair, weight in cycles.items() if weight <= worst}  # ties stay together
        assert {tuple(pair) for pair in np.argwhere(candidate_swaps(W, order, None, size))} == expected


def test_pairs_whose_edge_would_not_help_are_no_candidates() -> None:
    W, order = np.zeros((3, 3)), np.array([2, 0, 1])
    gradient = np.zeros((3, 3))
    gradient[1, 2] = -0.5  # the edge 1 -> 2, from the last place to the first
    gradient[2, 1] = 9.0  # allowed by the order: no candidate
    assert np.argwhere(candidate_swaps(W, order, gradient, 3)).tolist() == [[0, 2]]
    assert not candidate_swaps(W, order, gradient, 3, xi=0.5).any()


def test_swaps_are_taken_best_first_and_without_overlap() -> None:
    scores = np.full((6, 6), np.inf)
    scores[0, 2], scores[1, 3], scores[3, 5], scores[2, 4], scores[0, 1] = 0.5, 0.2, 0.6, 0.4, 1.0
    assert _improving(scores, 1.0) == [(1, 3)]  # overlaps all the others
    scores[1, 3] = np.inf
    assert _improving(scores, 1.0) == [(2, 4), (0, 1)][:1]
    scores[0, 1] = 0.9
    assert _improving(scores, 1.0) == [(2, 4), (0, 1)]


def test_polish_never_worsens_a_graph() -> None:
    for seed in range(5):
        X, _ = problem(8, seed=seed)
        W = np.random.default_rng(seed).normal(size=(8, 8)) * np.triu(np.ones((8, 8)), 1)
        for loss, lambda1 in (("l2", 0.0), ("l2", 0.1)):
            result = polish_dag(W, X, loss=loss, lambda1=lambda1)  # type: ignore[arg-type]
            assert result.score <= ((X - X @ W) ** 2).sum() / (2 * len(X)) + lambda1 * np.abs(W).sum()
            assert is_dag(result.weights)


def test_by_default_polish_does_not_fit_few_samples_with_false_edges() -> None:
    """NOTEARS' own problem, four edges a node and equal noise, at n = 100: the bare score's order has many more."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        W = np.triu(rng.uniform(0.5, 2, (20, 20)) * rng.choice([-1, 1], (20, 20)) * (rng.random((20, 20)) < 0.2), 1)
        X = rng.normal(size=(100, 20)) @ np.linalg.inv(np.eye(20) - W)

        def distance(W: np.ndarray = W, X: np.ndarray = X, **options: float) -> int:
            return graph_distance(to_dag(polish_dag(W, X, **options).weights), W).shd  # type: ignore[arg-type]

        assert distance() <= 4
        assert distance(lambda1=0.0) >= distance() + 5


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_by_default_the_unit_of_the_data_does_not_matter(unit: float) -> None:
    X, W = problem(8, seed=1)
    np.testing.assert_allclose(polish_dag(W, unit * X).weights, polish_dag(W, X).weights, rtol=1e-6, atol=1e-9)


def test_polish_starts_from_the_order_of_what_it_is_given() -> None:
    X, W = problem(8, seed=2)
    assert len(polish_dag(W, X, size_small=1, n_large_search=0).history) <= 2
    cyclic = W + 1e-3 * (W.T != 0)
    assert polish_dag(cyclic, X).history[0] == polish_dag(W, X).history[0]


@pytest.mark.parametrize("lambda1", [0.0, 0.05])
def test_recovers_the_graph_of_equal_noise(lambda1: float) -> None:
    X, W = problem(8, n=3000, seed=4, density=0.4)
    model = min((TopoSwaps(lambda1=lambda1, random_state=i).fit(X) for i in range(4)), key=lambda m: m.score_)
    assert graph_distance(model.weights_, W).shd == 0
    assert np.abs(model.weights_[model.adjacency_]).min() >= 0.3
    np.testing.assert_array_equal(model.adjacency_, model.weights_ != 0)


def test_a_function_of_your_own_gives_the_same_as_the_built_in() -> None:
    X, _ = problem(6)

    def regress(parents: np.ndarray, node: np.ndarray) -> tuple[np.ndarray, float]:
        weights = np.linalg.lstsq(parents, node, rcond=None)[0]
        return weights, float(np.square(node - parents @ weights).mean()) / 2

    own, built_in = (TopoSwaps(loss, init=np.arange(6)).fit(X) for loss in (regress, "l2"))
    np.testing.assert_array_equal(own.order_, built_in.order_)
    np.testing.assert_allclose(own.history_, built_in.history_, rtol=1e-9)
    np.testing.assert_allclose(own.raw_weights_, built_in.raw_weights_, atol=1e-8)


def test_logistic_improves_on_zeros_and_ones() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(600) < 0.5
    b = rng.random(600) < np.where(a, 0.9, 0.2)
    c = rng.random(600) < np.where(b, 0.85, 0.1)
    X = np.stack([c, a, b], axis=1).astype(float)
    model = TopoSwaps("logistic", lambda1=0.01, init=np.array([0, 1, 2])).fit(X)
    assert model.history_[-1] < model.history_[0]
    with pytest.raises(ValueError, match="zeros and ones"):
        TopoSwaps("logistic").fit(X + 0.5)


def test_more_variables_than_samples_are_borne() -> None:
    X, _ = problem(12, n=8)
    model = TopoSwaps(random_state=0).fit(X)
    assert np.isfinite(model.raw_weights_).all()
    assert model.score_ <= model.history_[0]


def test_starts() -> None:
    X, W = problem(6)
    random = [TopoSwaps(random_state=seed, size_small=1, n_large_search=0).fit(X).history_[0] for seed in (0, 0, 1)]
    assert random[0] == random[1] != random[2]
    order = np.random.default_rng(5).permutation(6)
    assert TopoSwaps(init=order).fit(X).history_[0] == least_squares(X).fit(order)[1]
    assert TopoSwaps(init=W).fit(X).history_ == polish_dag(W, X, lambda1=0).history


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("loss", "l1"),
        ("lambda1", -1.0),
        ("size_small", 0),
        ("size_large", 0),
        ("n_large_search", -1),
        ("xi", -1.0),
        ("threshold", -0.1),
        ("init", "first"),
        ("init", np.zeros(5)),
        ("init", np.arange(4)),
    ],
)
def test_arguments_out_of_range_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        TopoSwaps(**{argument: value}).fit(problem()[0])  # type: ignore[arg-type]


def test_bad_data_are_refused() -> None:
    X, W = problem()
    with pytest.raises(ValueError, match=r"X must be without constant columns, got \[2\]"):
        TopoSwaps().fit(np.where(np.arange(5) == 2, 1.0, X))
    with pytest.raises(ValueError, match="W must be of one row for each of the 5 columns"):
        polish_dag(np.zeros((4, 4)), X)
    with pytest.raises(ValueError, match="W must be finite"):
        polish_dag(np.nan * W, X)
    with pytest.raises(ValueError, match="lambda1 must be 0"):
        TopoSwaps(lambda parents, node: (node[:0], 0.0), lambda1=1.0).fit(X)


@pytest.mark.filterwarnings("ignore")
def test_keeps_scikit_learns_conventions() -> None:
    check_estimator(TopoSwaps())
