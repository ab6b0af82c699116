"""The genetic search for a table with given statistics, and the private estimator around it."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from trimtab.solvers import PrivateGSD, genetic_search
from trimtab.solvers.private_gsd import (
    ExponentialWeights,
    between_quantiles,
    crossover,
    mutate,
    random_rows,
    swap,
)
from trimtab.solvers.private_gsd.accounting import rho_from_epsilon_delta
from trimtab.solvers.private_gsd.operators import OPERATORS, proposals_of
from trimtab.solvers.private_gsd.row_statistics import RowSums, halfspaces, marginals, prefixes

MIXED = [3, (0.0, 10.0), 4, (-1.0, 1.0)]


def binary_table(n, seed=0):
    """Five binary columns, each a noisy copy of the one before."""
    rng = np.random.default_rng(seed)
    columns = [rng.random(n) < 0.3]
    for _ in range(4):
        columns.append(columns[-1] ^ (rng.random(n) < 0.2))
    return np.stack(columns, 1).astype(float)


def test_finds_a_table_with_the_statistics_of_another():
    X, pairs = binary_table(1000), marginals([2] * 5)
    found = genetic_search([pairs], [pairs.counts(X) / 1000], [2] * 5, 500, generator=np.random.default_rng(0))
    assert found.converged
    assert np.abs(pairs.counts(found.table) / 500 - pairs.counts(X) / 1000).mean() < 0.002


def test_history_is_the_error_of_the_table_and_never_rises():
    rng = np.random.default_rng(0)
    statistics = [marginals(MIXED, depth=1), prefixes(MIXED, [[1, 3]], [[4.0, 0.5]], within=[2])]
    answers = [rng.random(sum(one.sizes)) / 10 for one in statistics]
    found = genetic_search(statistics, answers, MIXED, 60, generator=rng)
    assert (np.diff(found.history) <= 0).all()
    error = sum(
        np.square(one.counts(found.table) / 60 - answer).sum() for one, answer in zip(statistics, answers, strict=True)
    )
    assert found.history[-1] == pytest.approx(error, rel=1e-9)
    assert found.n_generations == 100 * (len(found.history) - 1)
    assert sum(found.operators.values()) == pytest.approx(1)


def test_too_few_generations_warn_and_return():
    pairs = marginals([2, 2])
    with pytest.warns(ConvergenceWarning, match="the error still fell") as caught:
        found = genetic_search([pairs], [[0.5, 0.0, 0.1, 0.4]], [2, 2], 100, max_generations=20)
    assert caught[0].filename == __file__
    assert (found.converged, found.n_generations) == (False, 20)


def test_stops_where_a_block_gains_too_little():
    X, pairs = binary_table(400), marginals([2] * 5)
    found = genetic_search([pairs], [pairs.counts(X) / 400 + 0.01], [2] * 5, 100, tol=0.05)
    gained = -np.diff(found.history) / np.array(found.history[:-1])
    assert found.converged
    assert gained[-1] <= 0.05
    assert (gained[1:-1] > 0.05).all()


def test_values_stay_in_their_domain():
    rng = np.random.default_rng(0)
    pairs = marginals(MIXED, depth=1)
    table = genetic_search([pairs], [rng.random(sum(pairs.sizes))], MIXED, 40, generator=rng).table
    for j, column in enumerate(MIXED):
        low, high = column if isinstance(column, tuple) else (0, column - 1)
        assert low <= table[:, j].min()
        assert table[:, j].max() <= high
    assert (table[:, [0, 2]] == table[:, [0, 2]].round()).all()


@pytest.mark.parametrize(
    "statistic",
    [
        halfspaces(MIXED, [[1.0, 0.0], [0.7, -0.7], [0.0, 1.0]], [0.5, 0.1, 0.3], within=[0]),
        prefixes(MIXED, [[1, 3], [1, 3]], [[3.0, 0.0], [7.0, 0.6]], within=[0, 2]),
        RowSums(lambda X: np.stack([X[:, 1] / 10, X[:, 1] * X[:, 3] / 10], 1), (1, 1), (1.0, 2.0)),
    ],
    ids=["halfspaces", "prefixes", "moments"],
)
def test_fits_what_has_no_gradient(statistic):
    rng = np.random.default_rng(3)
    X = random_rows(MIXED, 300, rng)
    X[:, 1] = 10 * (X[:, 1] / 10) ** 2
    target = statistic.counts(X) / 300
    found = genetic_search([statistic], [target], MIXED, 150, generator=np.random.default_rng(0))
    assert np.abs(statistic.counts(found.table) / 150 - target).max() < 0.01


def test_operators_edit_what_they_say():
    rng = np.random.default_rng(0)
    X = random_rows(MIXED, 50, rng)
    for name, propose in proposals_of(MIXED, OPERATORS, 20).items():
        for _ in range(12):
            rows, added = propose(X, rng)
            differ = (added != X[rows]).sum((1, 2))
            assert rows.shape[0] == added.shape[0] == 20
            assert (differ <= {"swap": 2, "crossover of two": 2}.get(name, 1)).all()
            if name.startswith("crossover"):
                assert (added[..., [1, 3]] == X[rows][..., [1, 3]]).all()
            if name == "continuous":
                assert (added[..., [0, 2]] == X[rows][..., [0, 2]]).all()
            if name == "swap":
                np.testing.assert_array_equal(np.sort(added, 1), np.sort(X[rows], 1))


def test_columns_with_more_values_are_mutated_oftener():
    domain, rng = [2, 64, 4], np.random.default_rng(0)
    X, propose = random_rows(domain, 400, rng), proposals_of(domain, ["mutate"], 300)["mutate"]
    seen = np.zeros(3)
    for _ in range(90):
        rows, added = propose(X, rng)
        seen += (added != X[rows]).any((0, 1))
    np.testing.assert_array_equal(seen, [10, 60, 20])


def test_swap_keeps_one_way_marginals_through_a_search():
    X, pairs = binary_table(200), marginals([2] * 5)
    start = np.random.default_rng(1).permuted(X, axis=0)
    found = genetic_search([pairs], [pairs.counts(X) / 200], [2] * 5, 200, operators=["swap"], start=start)
    np.testing.assert_array_equal(found.table.sum(0), start.sum(0))
    assert found.history[-1] < 0.02 * found.history[0]


def test_pure_forms():
    X = np.arange(12.0).reshape(4, 3)
    before = X.copy()
    np.testing.assert_array_equal(mutate(X, np.array([1, 1]), 0, np.array([7.0, 8.0]))[:, 0], [[7, 4, 5], [8, 4, 5]])
    np.testing.assert_array_equal(swap(X, np.array([[0, 3], [2, 2]]), 1)[0], [[0, 10, 2], [9, 1, 11]])
    np.testing.assert_array_equal(swap(X, np.array([[2, 2]]), 1)[0], X[[2, 2]])
    found = crossover(X, np.array([0]), np.array([3]), np.array([[0, 2]]))
    np.testing.assert_array_equal(found[0], [[9, 1, 11]])
    np.testing.assert_array_equal(X, before)


def test_continuous_values_lie_between_neighbouring_quantiles():
    values = np.linspace(2.0, 3.0, 32)
    draws = np.stack([(np.arange(33) + 0.5) / 33, np.full(33, 0.25)])
    edges = np.concatenate([[0.0], values, [10.0]])
    np.testing.assert_allclose(between_quantiles(values, 0.0, 10.0, draws), 0.75 * edges[:-1] + 0.25 * edges[1:])


def test_weights_follow_the_formula_and_come_back():
    choice = ExponentialWeights(2)
    np.testing.assert_allclose(choice.probabilities(), [0.5, 0.5])
    choice.reward(0)
    w = np.exp(0.1 / 0.5) / (np.exp(0.1 / 0.5) + 1)
    p = 0.95 * w + 0.025
    np.testing.assert_allclose(choice.probabilities(), [p, 1 - p])
    choice.reward(0)
    again = w * np.exp(0.1 / p) / (w * np.exp(0.1 / p) + 1 - w)
    np.testing.assert_allclose(choice.probabilities()[0], 0.95 * again + 0.025)
    for _ in range(50_000):
        choice.reward(0)
    assert choice.probabilities()[1] == pytest.approx(0.025)
    for _ in range(50_000):
        choice.reward(1)
    assert choice.probabilities()[1] > 0.5


def test_without_noise_the_estimator_copies_the_marginals():
    X = binary_table(1000)
    model = PrivateGSD([2] * 5, epsilon=1e5, delta=1e-6, random_state=0).fit(X)
    pairs = marginals([2] * 5)
    assert model.synthetic_.shape == X.shape
    assert np.abs(pairs.counts(model.synthetic_) - pairs.counts(X)).mean() / 1000 < 0.01
    assert model.errors_[0].max() < 0.02


def test_budget_adds_up_and_noise_has_its_scale():
    rng = np.random.default_rng(0)
    X = random_rows(MIXED, 200, rng)
    model = PrivateGSD(MIXED, 1.0, 1e-6, n_synthetic=20, max_generations=1, num_intervals=8, random_state=0)
    with pytest.warns(ConvergenceWarning):
        model.fit(X)
    rho = rho_from_epsilon_delta(1.0, 1e-6)
    assert model.rho_ == rho
    assert sum(part.sum() for part in model.budget_.values()) == pytest.approx(rho, rel=1e-12)
    # Two real columns and six pairs; five of the pairs have a real column and three levels.
    np.testing.assert_allclose(model.budget_["quantiles"], [rho / 8] * 2)
    np.testing.assert_allclose(model.budget_["statistics"], [rho * 6 / 8 / 16] * 16)
    sums = RowSums(lambda X: np.zeros((len(X), 40_000)), (20_000, 20_000), (1.0, 2.0))
    quick = {"n_synthetic": 2, "population": 1, "max_generations": 1, "random_state": 0}
    with pytest.warns(ConvergenceWarning):
        given = PrivateGSD(MIXED, 1.0, 1e-6, statistics=sums, **quick).fit(X)
    assert len(given.budget_["quantiles"]) == 0
    for noise, sensitivity in zip(np.split(200 * given.answers_[0], 2), (1.0, 2.0), strict=True):
        assert noise.std() == pytest.approx(sensitivity / np.sqrt(2 * rho / 2), rel=0.03)


def test_same_seed_same_table_and_kinds_of_input():
    X = binary_table(100)
    model = PrivateGSD([2] * 5, 5.0, 1e-6, n_synthetic=60, random_state=3)
    first = model.fit(X)
    table = first.synthetic_
    for given in (X.astype(np.float32), X.tolist(), torch.from_numpy(X).int()):
        np.testing.assert_array_equal(clone(model).fit(given).synthetic_, table)
    np.testing.assert_array_equal(model.sample(), table)
    few, many = model.sample(10, random_state=0), model.sample(1000, random_state=0)
    assert few.shape == (10, 5)
    assert {tuple(row) for row in many} == {tuple(row) for row in table}


def test_the_private_table_is_seen_through_its_noisy_answers_only():
    """With the same answers, the search makes the same table whatever the table was."""
    pairs, answers = marginals([2] * 5), np.full(40, 0.25)
    same = [genetic_search([pairs], [answers], [2] * 5, 50).table for _ in range(2)]
    np.testing.assert_array_equal(*same)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: genetic_search([], [], [2], 5), "answers must be one vector for each of the 0"),
        (lambda: genetic_search([marginals([2], 1)], [[0.5]], [2], 5), r"answers must be of shape \(2,\)"),
        (lambda: genetic_search([marginals([2], 1)], [[0.5, np.nan]], [2], 5), "answers must be finite"),
        (lambda: genetic_search([marginals([2], 1)], [[0.5, 0.5]], [2], 0), "n_rows must be at least 1"),
        (lambda: genetic_search([marginals([2], 1)], [[0.5, 0.5]], [2], 5, population=0), "population must be"),
        (lambda: genetic_search([marginals([2], 1)], [[0.5, 0.5]], [2], 5, max_generations=0), "max_generations must"),
        (lambda: genetic_search([marginals([2], 1)], [[0.5, 0.5]], [2], 5, tol=1.0), "tol must be in"),
        (
            lambda: genetic_search([marginals([2], 1)], [[0.5, 0.5]], [2], 5, start=[[0], [1]]),
            "start must be of n_rows = 5",
        ),
        (
            lambda: genetic_search([marginals([2], 1)], [[0.5, 0.5]], [2], 1, start=[[2]]),
            r"start\[:, 0\] must be codes",
        ),
        (
            lambda: genetic_search([marginals([2], 1)], [[0.5, 0.5]], [2], 5, operators=["cross"]),
            "operators must be some",
        ),
        (
            lambda: genetic_search([marginals([2], 1)], [[0.5, 0.5]], [2], 5, operators=["continuous"]),
            "operators must be some that suit",
        ),
        (lambda: PrivateGSD([2, 2]).fit([[0, 2]]), r"X\[:, 1\] must be codes below 2"),
        (lambda: PrivateGSD([2, 2], epsilon=0).fit([[0, 1]]), "epsilon must be positive"),
        (lambda: PrivateGSD([2, 2], delta=1).fit([[0, 1]]), "delta must be in"),
        (lambda: PrivateGSD([2, 2], k=3).fit([[0, 1]]), "k must be in"),
        (lambda: PrivateGSD([2, 2], statistics=[]).fit([[0, 1]]), "statistics must be one or more"),
        (lambda: PrivateGSD([2, (1.0, 0.0)]).fit([[0, 1]]), r"domain\[1\] must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sample_needs_a_fit_and_a_number():
    with pytest.raises(NotFittedError):
        PrivateGSD([2]).sample()
    model = PrivateGSD([2, 2], 1.0, 1e-3, random_state=0).fit([[0, 1]] * 5)
    with pytest.raises(ValueError, match="n must be at least 1"):
        model.sample(0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("population", 0), ("tol", 1.0), ("operators", []), ("max_generations", 0), ("num_intervals", 1), ("k", 5)],
)
def test_a_refused_fit_measures_nothing(name, value):
    """A measurement costs privacy, so that what can be refused must be before the first."""
    measured = []

    class Watched(np.random.Generator):
        def standard_normal(self, *args, **kwargs):
            measured.append(args)
            return super().standard_normal(*args, **kwargs)

    model = PrivateGSD([3, (0.0, 1.0)], random_state=Watched(np.random.PCG64(0)), **{name: value})
    with pytest.raises(ValueError, match=name):
        model.fit([[0, 0.5], [2, 0.25]])
    assert not measured
    assert not hasattr(model, "n_features_in_")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"columns": [[0, 0]]}, ValueError, r"columns\[0\] must be different columns"),
        ({"columns": [[1], []]}, ValueError, r"columns\[1\] must be different columns"),
        ({"columns": []}, ValueError, "columns must be one choice"),
        ({"edges": {0: [0.5]}}, ValueError, "edges must be of real columns of the domain, got those of columns .0"),
        ({"edges": {7: [0.5]}}, ValueError, "edges must be of real columns of the domain, got those of columns .7"),
    ],
)
def test_columns_and_edges_that_would_be_ignored_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        marginals([2, (0.0, 1.0)], **change)


def test_columns_are_named_by_integers() -> None:
    domain = [2, (0.0, 1.0)]
    with pytest.raises(TypeError, match="^columns must be integers"):
        prefixes(domain, [[1.0]], [[0.5]])
    for within in ([0.0], [False]):
        with pytest.raises(TypeError, match="^within must be integers"):
            prefixes(domain, [[1]], [[0.5]], within=within)  # type: ignore[arg-type]


def test_a_table_without_error_has_converged():
    pairs = marginals([2, 2])
    start = np.array([[0, 0]] * 5 + [[1, 1]] * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = genetic_search([pairs], [[0.5, 0.0, 0.0, 0.5]], [2, 2], 10, start=start, max_generations=3)
    assert found.history[-1] == 0
    assert found.converged
