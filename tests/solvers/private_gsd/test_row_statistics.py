"""Marginals, prefixes, halfspaces and sums of one's own: counts, sensitivities, and edits of rows."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.solvers.private_gsd.domain import read_domain, read_table
from trimtab.solvers.private_gsd.row_statistics import CellCounts, RowSums, halfspaces, marginals, prefixes

DOMAIN = [3, (0.0, 10.0), 2, (-1.0, 1.0)]


def rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(3, size=n), rng.uniform(0, 10, n), rng.integers(2, size=n), rng.uniform(-1, 1, n)], 1)


def statistics():
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((4, 2))
    through_the_middle = directions.sum(1) / 2
    return {
        "marginals": marginals(DOMAIN),
        "three-way": marginals(DOMAIN, 3, edges={1: [2.0, 5.0], 3: [0.0]}, depth=2),
        "prefixes": prefixes(DOMAIN, [[1, 3], [3, 1], [1, 1]], [[4.0, 0.5], [0.0, 8.0], [2.0, 9.0]], within=[2, 0]),
        "halfspaces": halfspaces(DOMAIN, directions, through_the_middle, within=[0]),
        "halfspaces of all": halfspaces(DOMAIN, directions, through_the_middle),
        "moments": RowSums(lambda X: np.concatenate([X, X[:, :1] * X[:, 1:2]], 1), (4, 1), (15.0, 20.0)),
    }


@pytest.fixture(params=statistics())
def statistic(request):
    return statistics()[request.param]


def test_marginals_count_combinations():
    X = rows(200)
    edges, found = {1: [2.0, 5.0, 7.0], 3: [0.0]}, marginals(DOMAIN, 2, edges={1: [2.0, 5.0, 7.0], 3: [0.0]}, depth=1)
    codes = [np.searchsorted(edges[j], X[:, j], "right") if j in edges else X[:, j] for j in range(4)]
    wanted = []
    for (a, m), (b, n) in itertools.combinations(zip(codes, (3, 4, 2, 2), strict=True), 2):
        wanted += [np.sum((a == i) & (b == j)) for i in range(m) for j in range(n)]
    np.testing.assert_array_equal(found.counts(X), wanted)


def test_coarser_levels_are_sums_of_finer_ones():
    X = rows(300)
    found = marginals([(0.0, 10.0)], 1, edges={0: [1.0, 3.0, 4.0, 6.0, 9.0]}, depth=3)
    fine, middle, coarse = np.split(found.counts(X[:, 1:2]), np.cumsum(found.sizes)[:-1])
    assert found.sizes == (6, 4, 3)
    np.testing.assert_array_equal(middle, [fine[0], fine[1] + fine[2], fine[3] + fine[4], fine[5]])
    np.testing.assert_array_equal(coarse, [fine[0], fine[1:5].sum(), fine[5]])


def test_a_value_on_an_edge_lies_above_it():
    found = marginals([(0.0, 1.0)], 1, edges={0: [0.5]}, depth=1)
    np.testing.assert_array_equal(found.counts(np.array([[0.0], [0.5], [1.0]])), [1, 2])


def test_prefixes_count_rows_below_all_their_thresholds():
    X = rows(200)
    found = prefixes(DOMAIN, [[1, 3], [3, 1]], [[4.0, 0.5], [0.0, 8.0]], within=[2, 0])
    below = [(X[:, 1] <= 4) & (X[:, 3] <= 0.5), (X[:, 3] <= 0) & (X[:, 1] <= 8)]
    wanted = [np.sum(mask & (X[:, j] == v)) for j, size in ((2, 2), (0, 3)) for mask in below for v in range(size)]
    assert found.sizes == (2, 2, 3, 3)
    np.testing.assert_array_equal(found.counts(X), wanted)


def test_halfspaces_are_those_of_the_scaled_columns():
    X, normal = rows(200), np.array([[1.0, -2.0], [0.5, 0.5]])
    found = halfspaces(DOMAIN, normal, [-0.5, 0.6])
    z = np.stack([X[:, 1] / 10, (X[:, 3] + 1) / 2], 1)
    np.testing.assert_array_equal(found.counts(X), [np.sum(z @ normal[0] > -0.5), np.sum(z @ normal[1] > 0.6)])
    assert found.sensitivities == (1.0, 1.0)


def test_no_replaced_row_exceeds_the_sensitivity(statistic):
    """And for cells it is reached, so that no noise is wasted."""
    a, b = rows(500, 2), rows(500, 3)
    splits = np.cumsum(statistic.sizes)[:-1]
    most = np.zeros(len(statistic.sizes))
    for i in range(500):
        moved = statistic.counts(a[i : i + 1]) - statistic.counts(b[i : i + 1])
        most = np.maximum(most, [np.linalg.norm(part) for part in np.split(moved, splits)])
    assert (most <= np.array(statistic.sensitivities) + 1e-12).all()
    if isinstance(statistic, CellCounts):
        np.testing.assert_allclose(most, statistic.sensitivities)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_gains_are_those_of_counting_again(seed, edited):
    rng = np.random.default_rng(seed)
    for statistic in statistics().values():
        X = rows(12, seed)
        target = statistic.counts(rows(12, seed + 1)) + rng.normal(size=sum(statistic.sizes))
        tracker = statistic.track(X, target)
        at = np.stack([rng.permutation(12)[:edited] for _ in range(6)])
        added = rows(6 * edited, seed + 2).reshape(6, edited, 4)
        # Some stay what they were, and some become alike, as in a swap or a crossover.
        added[0, 0], added[1, :], added[2, -1] = X[at[0, 0]], added[1, :1], X[at[2, 0]]
        gains = tracker.gains(X[at], added)
        before = tracker.squared_error()
        assert before == pytest.approx(np.square(statistic.counts(X) - target).sum())
        for edit in range(6):
            edited_table = X.copy()
            edited_table[at[edit]] = added[edit]
            after = np.square(statistic.counts(edited_table) - target).sum()
            assert gains[edit] == pytest.approx(after - before, abs=1e-8)


def test_nothing_drifts_over_many_edits(statistic):
    rng, X = np.random.default_rng(0), rows(50)
    target = statistic.counts(rows(50, 1)) + 0.1
    tracker = statistic.track(X, target)
    total = tracker.squared_error()
    for step in range(300):
        at, added = rng.permutation(50)[:2], rows(2, step)
        total += float(tracker.gains(X[at][None], added[None])[0])
        tracker.accept(X[at], added)
        X[at] = added
    wanted = np.square(statistic.counts(X) - target).sum()
    assert tracker.squared_error() == pytest.approx(wanted, rel=1e-12 if isinstance(statistic, CellCounts) else 1e-9)
    assert total == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: marginals([]), "domain must be of at least one column"),
        (lambda: marginals([2, 0]), r"domain\[1\] must be at least 1, got 0"),
        (lambda: marginals([2, (1.0, 1.0)]), r"domain\[1\] must be bounds low < high, got 1 and 1"),
        (lambda: marginals([2, 2], 3), r"k must be in \[1, 2\], got 3"),
        (lambda: marginals([2, 2], depth=0), "depth must be at least 1"),
        (lambda: marginals([2, (0.0, 1.0)], edges={1: [0.5, 0.5]}), r"edges\[1\] must be increasing"),
        (lambda: marginals([2, (0.0, 1.0)], edges={1: [0.0]}), r"edges\[1\] must be increasing and strictly"),
        (lambda: prefixes(DOMAIN, [[0]], [[1.0]]), "columns must be real columns"),
        (lambda: prefixes(DOMAIN, [[1]], [[1.0, 2.0]]), "thresholds must be of shape"),
        (lambda: halfspaces(DOMAIN, [[1.0]], [0.0]), r"directions must be of shape \(queries, 2\)"),
        (lambda: halfspaces(DOMAIN, [[1.0, 0.0]], [0.0, 1.0]), r"offsets must be of shape \(1,\)"),
        (lambda: halfspaces(DOMAIN, [[1.0, 0.0]], [0.0], within=[1]), "within must be categorical columns"),
        (lambda: read_table([[3, 0, 0, 0]], DOMAIN), r"X\[:, 0\] must be codes below 3, got 3"),
        (lambda: read_table([[0.5, 0, 0, 0]], DOMAIN), r"X\[:, 0\] must be codes"),
        (lambda: read_table([[0, 11, 0, 0]], DOMAIN), r"X\[:, 1\] must be between 0.0 and 10.0, got 11"),
        (lambda: read_table([[0, np.nan, 0, 0]], DOMAIN), r"X\[:, 1\] must be between"),
        (lambda: read_table([[0, 0, 0]], DOMAIN), "X must be a table of 4 columns"),
        (lambda: read_table(np.zeros((0, 4)), DOMAIN), "at least one row"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "domain", [json.loads("[3, [0.0, 1.0]]"), [np.int64(3), (np.float32(0), 1)], [3, np.array([0, 1])]]
)
def test_domains_may_come_from_json_or_numpy(domain):
    assert read_domain(domain) == (3, (0.0, 1.0))
    table = np.array([[0, 0.2], [2, 0.9], [2, 0.1]])
    np.testing.assert_array_equal(
        marginals(domain, np.int64(2), depth=np.int32(1)).counts(table),
        marginals([3, (0.0, 1.0)], depth=1).counts(table),
    )
    assert prefixes(domain, [[1]], [[0.5]], within=[np.int64(0)]).counts(table).tolist() == [1, 0, 1]


@pytest.mark.parametrize("entry", [True, 2.5, "3", None, (0.0, math.nan), (0.0, 1.0, 2.0)])
def test_what_is_no_column_is_named(entry):
    with pytest.raises((TypeError, ValueError), match=r"domain\[1\](\[1\])? must be"):
        marginals([2, entry])
