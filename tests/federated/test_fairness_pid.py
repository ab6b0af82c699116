import math

import numpy as np
import pytest
from scipy.optimize import minimize

from trimtab.federated import accuracy_frontier, disparities, disparities_from_table


def parts(found):
    return [found.global_, found.local, found.unique, found.redundant, found.masked]


def random_table(rng, shape=(2, 2, 2), zeros=0):
    table = rng.dirichlet(np.ones(math.prod(shape)) * 0.7).reshape(shape)
    table.flat[rng.permutation(table.size)[:zeros]] = 0
    return table / table.sum()


def information(p):
    """Of the first two variables of a table given the third, term by term."""
    total = 0.0
    for z, y, s in np.ndindex(p.shape):
        if p[z, y, s] > 0:
            total += p[z, y, s] * math.log2(p[z, y, s] * p[:, :, s].sum() / (p[z, :, s].sum() * p[:, y, s].sum()))
    return total


def test_unique_when_the_prediction_is_the_attribute_and_clients_know_nothing() -> None:
    table = np.zeros((2, 2, 2))
    table[0, 0] = table[1, 1] = 0.25
    np.testing.assert_allclose(parts(disparities_from_table(table)), [1, 1, 1, 0, 0], atol=1e-7)


def test_redundant_when_the_client_is_the_attribute_too() -> None:
    table = np.zeros((2, 2, 2))
    table[0, 0, 0] = table[1, 1, 1] = 0.5
    np.testing.assert_allclose(parts(disparities_from_table(table)), [1, 0, 0, 1, 0], atol=1e-7)


def test_masked_when_only_both_together_tell() -> None:
    table = np.zeros((2, 2, 2))
    for z, s in np.ndindex(2, 2):
        table[z, z ^ s, s] = 0.25
    np.testing.assert_allclose(parts(disparities_from_table(table)), [0, 1, 0, 0, 1], atol=1e-7)


def test_nothing_when_the_prediction_does_not_look() -> None:
    rng = np.random.default_rng(0)
    table = random_table(rng, (2, 1, 3)) * np.array([0.3, 0.7])[:, None]
    np.testing.assert_allclose(parts(disparities_from_table(table)), np.zeros(5), atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_unique_is_the_least_information_of_any_coupling(seed) -> None:
    # Given z, the coupling of two binary variables has one free number: a search over both is exact.
    table = random_table(np.random.default_rng(seed), zeros=seed % 3)

    def at(free):
        q = np.zeros((2, 2, 2))
        for z in range(2):
            p = table[z].sum()
            a, b = table[z, 1].sum(), table[z, :, 1].sum()
            low, high = max(0, a + b - p), min(a, b)
            both = low + free[z] * (high - low)
            q[z] = [[p - a - b + both, b - both], [a - both, both]]
        return information(np.maximum(q, 0))

    starts = [(i, j) for i in (0.1, 0.5, 0.9) for j in (0.1, 0.5, 0.9)]
    best = min(minimize(at, start, bounds=[(0, 1)] * 2, tol=1e-12).fun for start in starts)
    assert disparities_from_table(table).unique == pytest.approx(best, abs=2e-6)


@pytest.mark.parametrize("shape", [(2, 2, 5), (3, 4, 2), (2, 3, 3)])
def test_the_parts_add_up_and_none_is_negative(shape) -> None:
    rng = np.random.default_rng(1)
    for zeros in (0, 3):
        table = random_table(rng, shape, zeros)
        found = disparities_from_table(table)
        assert found.unique + found.redundant == pytest.approx(found.global_, abs=1e-12)
        assert found.unique + found.masked == pytest.approx(found.local, abs=1e-12)
        assert min(parts(found)) >= 0
        assert found.global_ == pytest.approx(information(table.sum(2)[:, :, None]), abs=1e-12)
        assert found.local == pytest.approx(information(table), abs=1e-12)


def test_names_and_order_of_values_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    table = random_table(rng, (3, 2, 4))
    plain, other = disparities_from_table(table), disparities_from_table(table[[2, 0, 1]][:, ::-1][:, :, [3, 1, 0, 2]])
    np.testing.assert_allclose(parts(plain), parts(other), atol=1e-7)


def test_where_clients_know_nothing_of_the_attribute_global_is_at_most_local() -> None:
    rng = np.random.default_rng(3)
    given = rng.dirichlet(np.ones(2), size=(2, 3))  # prediction given attribute and client
    clients = rng.dirichlet(np.ones(3))
    table = np.einsum("zsy,s->zys", given, clients) * np.array([0.4, 0.6])[:, None, None]
    found = disparities_from_table(table)
    assert found.global_ < found.local
    assert found.redundant == pytest.approx(0, abs=1e-7)


def test_samples_are_counted_with_their_weights_whatever_their_kind() -> None:
    rng = np.random.default_rng(4)
    z, y, s = rng.integers(2, size=(3, 500))
    y = np.where(rng.random(500) < 0.5, z, y)
    plain = disparities(z, y, s)
    table = np.zeros((2, 2, 2))
    np.add.at(table, (z, y, s), 1 / 500)
    np.testing.assert_allclose(parts(plain), parts(disparities_from_table(table)))
    named = disparities(np.array(["a", "b"])[z], y.astype(bool), s + 0.5)
    np.testing.assert_allclose(parts(named), parts(plain))
    twice = disparities(np.append(z, z[:50]), np.append(y, y[:50]), np.append(s, s[:50]))
    weighed = disparities(z, y, s, weights=np.where(np.arange(500) < 50, 2.0, 1.0))
    np.testing.assert_allclose(parts(weighed), parts(twice))


def test_parity_gaps() -> None:
    z = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    y = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    s = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    found = disparities(z, y, s)
    assert found.parity_global == pytest.approx(0.5)
    np.testing.assert_allclose(found.parity_local, [0.5, 0.5])
    assert math.isnan(disparities(z, y, (s == 0) & (z == 1)).parity_local[1])
    assert disparities(z, y + s, s).parity_global is None


def frontier_by_hand(table, eps_global, eps_local):
    """SLSQP over the probabilities of predicting 1, from many starts that are kept away from 0 and 1."""
    rng = np.random.default_rng(0)

    def joint(r):
        r = r.reshape(table.shape)
        return np.stack([((1 - r) * table).sum(2), (r * table).sum(2)], 1)

    def slack(r):
        q = joint(r)
        return np.array([eps_global - information(q.sum(2)[:, :, None]), eps_local - information(q)])

    def error(r):
        r = r.reshape(table.shape)
        return float((table[:, :, 0] * r[:, :, 0] + table[:, :, 1] * (1 - r[:, :, 1])).sum())

    best = math.inf
    for _ in range(4):
        start = np.full(8, 0.5) + 0.05 * rng.standard_normal(8)
        found = minimize(
            error, start, bounds=[(1e-9, 1 - 1e-9)] * 8, constraints={"type": "ineq", "fun": slack}, tol=1e-10
        )
        if slack(found.x).min() > -1e-6:
            best = min(best, found.fun)
    return 1 - best


@pytest.mark.parametrize("seed", range(3))
def test_frontier_agrees_with_another_solver(seed) -> None:
    table = random_table(np.random.default_rng(10 + seed))
    for eps_global, eps_local in ((0.02, 0.5), (0.5, 0.03), (0.05, 0.05)):
        point = accuracy_frontier(table, eps_global, eps_local)
        assert point.accuracy == pytest.approx(frontier_by_hand(table, eps_global, eps_local), abs=1e-4)
        assert point.global_ <= eps_global + 1e-9
        assert point.local <= eps_local + 1e-9


def test_frontier_grows_with_both_limits_and_ends_at_certainty() -> None:
    table = random_table(np.random.default_rng(20), zeros=2)
    levels = [0.0, 0.01, 0.1, 1.0]
    grid = np.array([[accuracy_frontier(table, g, e).accuracy for e in levels] for g in levels])
    assert (np.diff(grid, axis=0) > -1e-6).all()
    assert (np.diff(grid, axis=1) > -1e-6).all()
    assert grid[-1, -1] == pytest.approx(1, abs=1e-6)


def test_without_any_disparity_only_the_prior_is_left_where_the_label_is_the_attribute() -> None:
    table = np.zeros((2, 2, 2))
    table[0, :, 0], table[1, :, 1] = 0.35, 0.15
    point = accuracy_frontier(table, 0.0, 0.0)
    assert point.accuracy == pytest.approx(0.7, abs=1e-6)
    assert point.global_ == pytest.approx(0, abs=1e-9)
    assert np.isnan(point.prediction[0, :, 1]).all()  # there are no such people
    np.testing.assert_allclose(np.nansum(point.prediction, 3)[table > 0], 1)


def test_a_locally_fair_prediction_may_be_globally_unfair() -> None:
    # Each client has one group: inside of it anything is fair.
    table = np.zeros((2, 2, 2))
    table[0, 0] = 0.4, 0.1
    table[1, 1] = 0.1, 0.4
    assert accuracy_frontier(table, 1.0, 0.0).accuracy == pytest.approx(1, abs=1e-6)
    assert accuracy_frontier(table, 0.0, 1.0).accuracy < 0.75


@pytest.mark.parametrize(
    "table, message",
    [
        (np.ones((2, 2)) / 4, "table must be three-dimensional"),
        (np.zeros((2, 0, 2)), "table must be three-dimensional"),
        (np.full((2, 2, 2), 0.1), "table must hold probabilities that sum to 1"),
        (np.array([[[1.5, -0.5]]]), "table must hold probabilities"),
        (np.full((2, 2, 2), np.nan), "table must hold probabilities"),
    ],
)
def test_what_is_no_distribution_is_refused(table, message) -> None:
    with pytest.raises(ValueError, match=message):
        disparities_from_table(table)
    with pytest.raises(ValueError, match=message):
        accuracy_frontier(table, 0.1, 0.1)


def test_bad_people_and_limits_are_refused() -> None:
    z = np.array([0, 1, 1])
    with pytest.raises(ValueError, match="predictions must be a value for each person"):
        disparities(z, z[:2], z)
    with pytest.raises(ValueError, match="clients must not be NaN"):
        disparities(z, z, np.array([0.0, 1.0, np.nan]))
    with pytest.raises(ValueError, match="weights must be one for each person"):
        disparities(z, z, z, weights=np.array([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="sensitive must be a value for each person"):
        disparities(z[:0], z[:0], z[:0])
    with pytest.raises(ValueError, match="eps_local must be"):
        accuracy_frontier(np.ones((2, 2, 2)) / 8, 0.1, -0.1)


def test_a_person_of_weight_0_is_nobody() -> None:
    sensitive, said, clients = [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 2, 0], [0, 1, 0, 1, 0, 2]
    weights = np.array([1.0, 2.0, 3.0, 1.0, 0.0, 0.0])
    whole = disparities(sensitive, said, clients, weights=weights)
    there = disparities(sensitive[:4], said[:4], clients[:4], weights=weights[:4])
    assert whole.parity_global == pytest.approx(there.parity_global)
    np.testing.assert_allclose(whole.parity_local, there.parity_local)
    for part in ("global_", "local", "unique", "redundant", "masked"):
        assert getattr(whole, part) == pytest.approx(getattr(there, part), abs=1e-8)
