"""What every classifier keeps: scikit-learn's conventions, the same result from the same seed.

A new one joins by one line in MEMBERS: an estimator that is quick to fit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator

import trimtab
from trimtab import faces
from trimtab.domain import RSSLinearClassifier
from trimtab.optim import BatchPerceptron, LogisticGD, NormalizedBatchPerceptron, NormalizedLogisticGD
from trimtab.solvers import HalfspaceTesterLearner, SupervisedDictionary

MEMBERS: dict[str, Any] = {
    "HalfspaceTesterLearner": HalfspaceTesterLearner(n_iter=300, on_reject="ignore", random_state=0),
    "HalfspaceTesterLearner, agnostic": HalfspaceTesterLearner(
        noise="agnostic", n_iter=300, n_candidates=3, on_reject="ignore", random_state=0
    ),
    "LogisticGD": LogisticGD(),
    "NormalizedLogisticGD": NormalizedLogisticGD(),
    "BatchPerceptron": BatchPerceptron(),
    "NormalizedBatchPerceptron": NormalizedBatchPerceptron(),
    "RSSLinearClassifier": RSSLinearClassifier(),
    "SupervisedDictionary": SupervisedDictionary(xi=0.1),
    "SupervisedDictionary, feature": SupervisedDictionary(3, mode="feature", xi=0.1),
    "SupervisedDictionary, blocks": SupervisedDictionary(solver="bcd", xi=0.1, random_state=0),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS)
def member(request: pytest.FixtureRequest) -> Any:
    return clone(request.param)


@pytest.fixture
def X() -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(600, 3))
    return drawn[np.abs(drawn @ [1, -1, 0.5]) > 0.2]


@pytest.fixture
def y(X: np.ndarray) -> np.ndarray:
    return np.where(X @ [1, -1, 0.5] > 0, 1, -1)


def test_learns_an_easy_problem(member: Any, X: np.ndarray, y: np.ndarray) -> None:
    assert member.fit(X, y).score(X, y) > 0.95
    assert member.n_features_in_ == 3


def test_same_input_same_bits_and_input_untouched(member: Any, X: np.ndarray, y: np.ndarray) -> None:
    kept = X.copy(), y.copy()
    first, second = (clone(member).fit(X, y).decision_function(X) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(X, kept[0])
    np.testing.assert_array_equal(y, kept[1])


def test_global_random_states_are_left_alone(member: Any, X: np.ndarray, y: np.ndarray) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    member.fit(X, y)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]  # noqa: NPY002


def test_float32_tensors_and_lists_are_taken(member: Any, X: np.ndarray, y: np.ndarray) -> None:
    expected = clone(member).fit(X, y).predict(X)
    given = [(X.astype(np.float32), y), (torch.tensor(X), torch.tensor(y)), (X.tolist(), y.tolist())]
    for samples, labels in given:
        assert (clone(member).fit(samples, labels).predict(samples) == expected).mean() > 0.99


@pytest.mark.parametrize("names", [("no", "yes"), (0, 1), (3, 7)])
def test_predictions_are_labels_of_the_training_data(
    member: Any, X: np.ndarray, y: np.ndarray, names: tuple[Any, Any]
) -> None:
    expected = clone(member).fit(X, y).predict(X)
    found = member.fit(X, np.where(y > 0, names[1], names[0])).predict(X)
    np.testing.assert_array_equal(found, np.where(expected > 0, names[1], names[0]))
    np.testing.assert_array_equal(member.classes_, names)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_data_must_be_finite(member: Any, X: np.ndarray, y: np.ndarray, bad: float) -> None:
    X[3, 1] = bad
    with pytest.raises(ValueError, match="Input X contains"):
        member.fit(X, y)


def test_labels_must_be_of_enough_classes_and_as_many_as_samples(member: Any, X: np.ndarray, y: np.ndarray) -> None:
    with pytest.raises(ValueError, match="1 class"):
        member.fit(X, np.ones_like(y))
    if not get_tags(member).classifier_tags.multi_class:
        with pytest.raises(ValueError, match="Only binary classification"):
            member.fit(X, np.arange(len(X)) % 3)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        member.fit(X, y[:-1])


def test_other_numbers_of_features_are_refused(member: Any, X: np.ndarray, y: np.ndarray) -> None:
    with pytest.raises(ValueError, match="2 features"):
        member.fit(X, y).predict(X[:, :2])


def test_parameters_are_read_and_set(member: Any) -> None:
    for name, value in member.get_params().items():
        assert getattr(member, name) == value
    assert clone(member).get_params() == member.get_params()


# What scikit-learn's checks cannot be asked of with default arguments, and why.
UNCHECKED = {
    "HalfspaceTesterLearner": "it refuses to predict for their data, which lack what its guarantee needs; with "
    "on_reject='ignore' they are asked of it in its own tests",
    "MongeMap": "it is fitted to two samples of points and they give it labels; made to map a sample to itself, they "
    "are asked of it in its own tests",
    "PrivateGSD": "it needs the domain of the columns, which may not be read from private data",
}

# Those that would go on to 10,000 iterations on classes that no plane parts.
SLOW = {"LogisticGD", "NormalizedLogisticGD", "BatchPerceptron", "NormalizedBatchPerceptron"}


def estimators() -> dict[str, type[BaseEstimator]]:
    """Every public estimator, by name."""
    found = {}
    for area in ("diffusion", "domain", "losses", "optim", "solvers"):
        package = getattr(trimtab, area)
        for name in faces._table(package.__name__):
            value = getattr(package, name)
            if isinstance(value, type) and issubclass(value, BaseEstimator):
                found[name] = value
    return found


@pytest.mark.parametrize("name", estimators())
def test_scikit_learns_checks_with_default_arguments(name: str) -> None:
    if name in UNCHECKED:
        pytest.skip(UNCHECKED[name])
    estimator = estimators()[name]()
    check_estimator(estimator.set_params(max_iter=30) if name in SLOW else estimator, on_skip=None)
