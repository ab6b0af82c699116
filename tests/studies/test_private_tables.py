"""The contestants on private tables are what they claim to be, and nobody measures twice."""

import numpy as np
import pytest
import torch

from trimtab.solvers.private_gsd.row_statistics import marginals
from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.private_gsd.tables import (
    Conditions,
    PrivateTable,
    PrivateTables,
    _as_matrix,
    independent,
    relaxed_projection,
    tree,
)

DOMAIN = [2, (0.0, 1.0), 3, (-1.0, 1.0)]
PREFIXES = Conditions(np.array([[1.0, 1.0], [1.0, 1.0]]), np.array([[0.3, 0.8], [0.7, 0.4]]))
HALFSPACES = Conditions(np.array([[1.0, -0.5], [0.3, 0.7]]), np.array([0.2, 0.5]))


def mixed(n):
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(2, size=n), rng.random(n), rng.integers(3, size=n), rng.uniform(-1, 1, n)], 1)


def private(table, domain, statistic, conditions=None, rho=1e12):
    rng = np.random.default_rng(0)
    return PrivateTable(domain, statistic, conditions, rho, Trial(), rng, _table=table, _noise=rng)


@pytest.mark.parametrize("conditions", [PREFIXES, HALFSPACES], ids=["prefixes", "halfspaces"])
def test_relaxed_answers_of_whole_rows_are_the_true_ones(conditions):
    X, statistic = mixed(300), conditions.statistic(DOMAIN)
    z = torch.from_numpy(np.stack([X[:, 1], (X[:, 3] + 1) / 2], 1))
    shares = torch.from_numpy(np.concatenate([np.eye(2)[X[:, 0].astype(int)], np.eye(3)[X[:, 2].astype(int)]], 1))
    target, weight = _as_matrix(statistic.counts(X) / 300, [2, 3], conditions)
    relaxed = conditions.softly(z, 1e7).T @ shares / 300
    assert weight.all()
    torch.testing.assert_close(relaxed.float(), target)


def test_relaxed_marginals_of_whole_rows_are_the_true_ones():
    X, statistic = mixed(300)[:, [0, 2]], marginals([2, 3])
    shares = torch.from_numpy(np.concatenate([np.eye(2)[X[:, 0].astype(int)], np.eye(3)[X[:, 1].astype(int)]], 1))
    target, weight = _as_matrix(statistic.counts(X) / 300, [2, 3], None)
    assert weight.sum() == 6
    torch.testing.assert_close((weight * (shares.T @ shares / 300)).float(), target)


def test_the_budget_is_spent_once():
    table = private(mixed(50), DOMAIN, marginals(DOMAIN))
    table.measure(table.statistic)
    assert table.spent == table.rho
    with pytest.raises(ValueError, match="is spent"):
        table.measure(table.statistic)


def chain(n=4000):
    """Three columns, each a copy of the one before that fails at times, so that a tree is all there is."""
    rng = np.random.default_rng(1)
    columns = [rng.integers(3, size=n)]
    for _ in range(2):
        columns.append(np.where(rng.random(n) < 0.8, columns[-1], rng.integers(3, size=n)))
    return np.stack(columns, 1).astype(float)


def test_without_noise_a_tree_is_learnt_and_independent_columns_are_not():
    X, pairs = chain(), marginals([3, 3, 3])
    truth = pairs.counts(X) / len(X)
    errors = {}
    for name, synthesise in (("tree", tree()), ("independent", independent())):
        made = synthesise(private(X, [3, 3, 3], pairs))
        errors[name] = np.abs(pairs.counts(made) / len(made) - truth).max()
        ones = marginals([3, 3, 3], 1)
        np.testing.assert_allclose(ones.counts(made) / len(made), ones.counts(X) / len(X), atol=0.02)
    assert errors["tree"] < 0.02
    assert errors["independent"] > 0.1


def test_without_noise_relaxed_projection_comes_near(monkeypatch):
    monkeypatch.setattr(Trial, "pick", lambda self, smoke, laptop, paper: 200)
    X, pairs = chain(), marginals([3, 3, 3])
    made = relaxed_projection()(private(X, [3, 3, 3], pairs))
    assert np.abs(pairs.counts(made) / len(made) - pairs.counts(X) / len(X)).max() < 0.02


def test_unknown_variants_are_named():
    with pytest.raises(ValueError, match="queries must be one of"):
        PrivateTables(queries="means")
    with pytest.raises(ValueError, match="marginals of all pairs"):
        tree()(private(mixed(50), DOMAIN, PREFIXES.statistic(DOMAIN), PREFIXES))
