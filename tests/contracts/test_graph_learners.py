"""What every estimator of a causal graph keeps: scikit-learn's conventions, acyclic results, refusal of bad data.

A new one joins by one line in MEMBERS: an estimator that is quick to fit.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone

from trimtab.solvers import CoLiDE, TopoSwaps, graph_distance, is_dag

QUICK = {"warm_iter": 600, "max_iter": 1200, "lr": 2e-3}

MEMBERS: dict[str, Any] = {
    "CoLiDE-EV": CoLiDE("equal", **QUICK),  # type: ignore[arg-type]
    "CoLiDE-NV": CoLiDE("unequal", **QUICK),  # type: ignore[arg-type]
    "TopoSwaps": TopoSwaps(random_state=0),
    "TopoSwaps, lasso": TopoSwaps(lambda1=0.05, init=(1, 0, 3, 2)),
}

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

TRUTH = np.array([[0, 1.5, 0, -1], [0, 0, 1, 0], [0, 0, 0, 2], [0, 0, 0, 0]])


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Any:
    return clone(request.param)


@pytest.fixture
def X() -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=(1000, 4))
    return noise @ np.linalg.inv(np.eye(4) - TRUTH)


def test_finds_an_easy_graph(member: Any, X: np.ndarray) -> None:
    member.fit(X)
    assert graph_distance(member.weights_, TRUTH).shd == 0
    assert is_dag(member.weights_)
    np.testing.assert_array_equal(member.adjacency_, member.weights_ != 0)
    kept = member.weights_ != 0
    np.testing.assert_array_equal(member.weights_[kept], member.raw_weights_[kept])


def test_same_input_same_bits_and_input_untouched(member: Any, X: np.ndarray) -> None:
    before = X.copy()
    first, second = clone(member).fit(X).raw_weights_, clone(member).fit(X).raw_weights_
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(X, before)


def test_means_do_not_matter(member: Any, X: np.ndarray) -> None:
    shifted = clone(member).fit(X + np.array([10, -5, 0, 100])).raw_weights_
    np.testing.assert_allclose(shifted, clone(member).fit(X).raw_weights_, atol=1e-6)


def test_float32_tensors_and_lists_are_taken(member: Any, X: np.ndarray) -> None:
    expected = clone(member).fit(X).weights_
    for given in (X.astype(np.float32), torch.tensor(X), X.tolist()):
        found = clone(member).fit(given).weights_
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_data_must_be_finite(member: Any, X: np.ndarray, bad: float) -> None:
    X[3, 1] = bad
    with pytest.raises(ValueError, match="Input X contains"):
        member.fit(X)


def test_constant_columns_single_samples_and_single_variables_are_refused(member: Any, X: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"X must be without constant columns, got \[1\]"):
        member.fit(X * [1, 0, 1, 1])
    with pytest.raises(ValueError, match=r"1 sample"):
        member.fit(X[:1])
    with pytest.raises(ValueError, match=r"1 feature"):
        member.fit(X[:, :1])


def test_a_refused_fit_changes_nothing(member: Any, X: np.ndarray) -> None:
    member.fit(X)
    before = {name: copy.deepcopy(value) for name, value in vars(member).items()}
    for bad in (X * [1, 0, 1, 1], X[:, :1], X[:1], X[:, :3] * [1, np.nan, 1]):
        with pytest.raises(ValueError):
            member.fit(bad)
        assert vars(member).keys() == before.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(getattr(member, name), value)
    assert member.n_features_in_ == 4


def test_parameters_are_read_and_set(member: Any) -> None:
    assert member.set_params(threshold=0.7).get_params()["threshold"] == 0.7


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1e4 + 0.1, -1e9 - 0.1])
def test_a_column_is_constant_however_its_mean_is_rounded(member: Any, constant: float) -> None:
    X = np.random.default_rng(0).normal(size=(1000, 4))
    X[:, 1] = constant
    with pytest.raises(ValueError, match=r"^X must be without constant columns, got \[1\]"):
        member.fit(X)
