"""Supervised dictionary learning: projections, bounds, limits with known answers, agreement of the two solvers."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad, nnls
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from trimtab.solvers import SupervisedDictionary
from trimtab.solvers.supervised_dictionary.block_descent import minimise_bound
from trimtab.solvers.supervised_dictionary.estimator import reconstruction_codes
from trimtab.solvers.supervised_dictionary.lifted_descent import FeatureLift, FilterLift, descend
from trimtab.solvers.supervised_dictionary.problem import Factors, Problem, regress, within

KINDS: list[dict[str, Any]] = [
    {"mode": mode, **solver}
    for mode, solver in product(
        ("filter", "feature"),
        (
            {"solver": "lpgd"},
            {"solver": "lpgd", "accelerated": False},
            {"solver": "bcd"},
            {"solver": "bcd", "nonnegative": True},
        ),
    )
]
NAMES = ["-".join(str(value) for value in kind.values()) for kind in KINDS]

unsettled = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(scope="module")
def tumours() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(X), y


@pytest.fixture(scope="module")
def three_classes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positive data, labels 2, 5 and 7, and two covariates."""
    rng = np.random.default_rng(0)
    X = rng.gamma(2, size=(120, 6))
    aux = rng.normal(size=(120, 2)) + np.array([3, -1])
    scores = np.stack([X[:, 0], X[:, 1] + aux[:, 0], X[:, 2]]) + rng.gumbel(size=(3, 120))
    return X, np.array([2, 5, 7])[scores.argmax(0)], aux


def problem_of(
    X: np.ndarray, y: np.ndarray, mode: Any = "filter", xi: float = 1.0, nu: float = 0.1, aux: np.ndarray | None = None
) -> Problem:
    Y = (y[:, None] == np.unique(y)[1:]).astype(float)
    Z = np.ones((len(X), 1)) if aux is None else np.column_stack([np.ones(len(X)), aux - aux.mean(0)])
    return Problem(X, X.mean(0), Y, Z, mode, xi, nu)


# The objective


@unsettled
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_history_is_the_objective_and_never_rises(
    kind: dict[str, Any], three_classes: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    X, y, aux = three_classes
    model = SupervisedDictionary(3, xi=0.5, nu=0.3, max_iter=40, random_state=0, **kind).fit(X, y, aux)
    W, H, beta = model.components_.T, model.codes_, model.coef_.T
    features, A = (X @ W, W @ beta) if kind["mode"] == "filter" else (H, H @ beta)
    logits = np.pad(features @ beta + aux @ model.aux_coef_.T + model.intercept_, ((0, 0), (1, 0)))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = log_loss(y, chances, normalize=False) + 0.5 * ((X - H @ W.T) ** 2).sum()
    expected += 0.15 * ((A**2).sum() + (model.aux_coef_**2).sum())
    np.testing.assert_allclose(model.history_[-1], expected, rtol=1e-9)
    assert np.diff(model.history_).max() <= 1e-9 * abs(expected)
    assert model.history_[-1] < model.history_[0]
    np.testing.assert_allclose(np.linalg.norm(model.components_, axis=1), 1)
    if kind.get("nonnegative"):
        assert model.components_.min() >= 0
        assert model.codes_.min() >= 0


def test_slope_is_the_derivative_and_curvature_bounds_the_second(
    three_classes: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    X, y, _ = three_classes
    for labels in (y, y > 2):
        problem = problem_of(X, labels)
        start = np.random.default_rng(1).normal(size=problem.Y.size)
        shape = problem.Y.shape
        error = check_grad(
            lambda v, p=problem, s=shape: p.misfit(v.reshape(s)),
            lambda v, p=problem, s=shape: p.slope(v.reshape(s)).ravel(),
            start,
        )
        assert error < 1e-4
        # Both classes of a pair equally probable is where a loss is most curved.
        steepest = np.zeros(shape)
        if shape[1] == 2:
            steepest[:, 1] = -40.0
        step = 1e-4
        change = problem.slope(steepest + step * np.eye(shape[1])[0]) - problem.slope(steepest)
        assert change[:, 0].max() / step <= problem.curvature + 1e-6
        if shape[1] == 1:
            np.testing.assert_allclose(change[:, 0] / step, problem.curvature, rtol=1e-4)


def test_extreme_logits_stay_finite() -> None:
    problem = problem_of(np.eye(4), np.array([0, 1, 2, 1]))
    logits = np.array([[1e4, -1e4], [-1e4, 1e4], [-1e4, -1e4], [1e4, 1e4]])
    assert np.isfinite(problem.misfit(logits))
    assert np.isfinite(problem.slope(logits)).all()


# The lifted problem


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, V = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


@pytest.mark.parametrize("dense", [True, False], ids=["lapack", "arpack"])
@pytest.mark.parametrize("shape", [(40, 9), (9, 40)])
@pytest.mark.parametrize("mode", ["filter", "feature"])
def test_projection_is_the_truncated_svd_of_the_joint_matrix(
    mode: Any, shape: tuple[int, int], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.solvers.supervised_dictionary.spectra._DENSE", 200 if dense else 0)
    rng = np.random.default_rng(0)
    X = rng.normal(size=shape) + 1
    problem = problem_of(X, np.arange(shape[0]) % 3, mode, xi=0.7)
    lift = (FilterLift if mode == "filter" else FeatureLift)(problem, 2)
    # In the filter form, gradients lie in the space of the samples.
    A = X.T @ rng.normal(size=(shape[0], 2)) if mode == "filter" else rng.normal(size=(shape[0], 2))
    A *= 5 / np.sqrt(lift.weight * (A**2).sum())
    found = lift.project(A)
    scaled, data = np.sqrt(lift.weight) * A, np.sqrt(2 * 0.7) * X
    joint = truncated(np.hstack([scaled, data.T if mode == "filter" else data]), 2)
    np.testing.assert_allclose(found.A, joint[:, :2] / np.sqrt(lift.weight), atol=1e-9)
    B = joint[:, 2:] / np.sqrt(2 * 0.7)
    B = B.T if mode == "filter" else B
    np.testing.assert_allclose(found.error, ((X - B) ** 2).sum(), rtol=1e-9)
    factors = lift.factors(found, np.zeros((1, 2)))
    np.testing.assert_allclose(factors.codes @ factors.components.T, B, atol=1e-9)
    left = factors.components if mode == "filter" else factors.codes
    np.testing.assert_allclose(left @ factors.coef, found.A, atol=1e-9)


def test_weights_bound_the_curvature(three_classes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    X, y, aux = three_classes
    for covariates, mode in product((None, aux), ("filter", "feature")):
        problem = problem_of(X, y > 2, mode, nu=0.3, aux=covariates)
        lift = (FilterLift if mode == "filter" else FeatureLift)(problem, 2)
        design = np.hstack([X - X.mean(0) if mode == "filter" else np.eye(len(X)), problem.Z])
        penalty = np.diag([0.3] * (design.shape[1] - problem.Z.shape[1]) + list(problem.penalty.diagonal()))
        hessian = 0.25 * design.T @ design + penalty
        size = design.shape[1] - problem.Z.shape[1]
        metric = np.zeros_like(hessian)
        metric[:size, :size] = lift.weight * np.eye(size)
        metric[size:, size:] = lift.shared * 0.25 * problem.Z.T @ problem.Z + problem.penalty
        smallest = np.linalg.eigvalsh(metric - hessian)[0]
        assert smallest >= -1e-8
        if covariates is None and mode == "filter":
            assert smallest <= 1e-8, "a smaller weight would do"


def test_large_xi_gives_the_truncated_svd(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours
    singular, right = np.linalg.svd(X, full_matrices=False)[1:]
    for mode in ("filter", "feature"):
        model = SupervisedDictionary(3, mode=mode, xi=1e6).fit(X, y)
        np.testing.assert_allclose(np.linalg.svd(model.components_ @ right[:3].T)[1], 1, atol=1e-5)
        error = ((X - model.inverse_transform(model.transform(X))) ** 2).sum()
        np.testing.assert_allclose(error, (singular[3:] ** 2).sum(), rtol=1e-5)


def test_xi_zero_is_logistic_regression(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours
    peer = LogisticRegression(C=0.1, tol=1e-10, max_iter=5000).fit(X, y)
    kinds = {2e-3: {"solver": "lpgd", "tol": 1e-12, "max_iter": 3000}, 1e-2: {"solver": "bcd", "tol": 1e-7}}
    for atol, kind in kinds.items():
        model = SupervisedDictionary(2, xi=0.0, nu=10.0, random_state=0, **kind).fit(X, y)
        np.testing.assert_allclose(model.coef_ @ model.components_, peer.coef_, atol=atol)
        np.testing.assert_allclose(model.intercept_, peer.intercept_, atol=atol)
        np.testing.assert_allclose(model.predict_proba(X), peer.predict_proba(X), atol=atol)


def test_full_rank_leaves_nothing_out(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours[0][:, :5], tumours[1]
    model = SupervisedDictionary(5, xi=1.0, nu=1.0, tol=1e-12).fit(X, y)
    peer = LogisticRegression(tol=1e-10).fit(X, y)
    np.testing.assert_allclose(model.coef_ @ model.components_, peer.coef_, atol=1e-4)
    np.testing.assert_allclose(model.inverse_transform(model.transform(X)), X, atol=1e-9)


@unsettled
@pytest.mark.parametrize(("mode", "xi"), [("filter", 0.03), ("feature", 0.03)])
def test_both_solvers_find_the_same_minimum(mode: Any, xi: float, tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours
    lifted = SupervisedDictionary(2, mode=mode, xi=xi, nu=1.0, tol=1e-7).fit(X, y)
    blocks = SupervisedDictionary(2, mode=mode, solver="bcd", xi=xi, nu=1.0, tol=1e-6, random_state=0).fit(X, y)
    np.testing.assert_allclose(lifted.history_[-1], blocks.history_[-1], rtol=2e-3)
    slow = SupervisedDictionary(2, mode=mode, xi=xi, nu=1.0, tol=1e-7, accelerated=False).fit(X, y)
    np.testing.assert_allclose(slow.history_[-1], lifted.history_[-1], rtol=1e-4)
    np.testing.assert_allclose(slow.decision_function(X), lifted.decision_function(X), rtol=0.05, atol=0.1)


def test_the_paper_s_iteration_converges_exponentially(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    """With a condition number of 1.5, each step leaves at most two thirds of the distance to where it ends."""
    X, y = tumours
    steepest = 0.25 * np.linalg.norm(X - X.mean(0), 2) ** 2
    problem = problem_of(X, y, xi=0.05, nu=2 * steepest)
    lift = FilterLift(problem, 2)
    zero = np.zeros((30, 1)), np.zeros((1, 1))
    ends = [
        descend(problem, lift, *zero, accelerated=False, max_iter=steps, tol=0.0).found.A for steps in (2, 4, 8, 60)
    ]
    distances = [np.linalg.norm(end - ends[-1]) for end in ends[:-1]]
    assert distances[1] <= (2 / 3) ** 2 * distances[0]
    assert distances[2] <= (2 / 3) ** 6 * distances[0]


@unsettled
def test_the_direction_of_least_variance_is_found() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(800, 20)) * np.array([10, 8] + [1] * 18)
    y = X[:, 7] + 0.1 * rng.normal(size=800) > 0
    train, test = slice(400), slice(400, None)
    unsupervised = make_pipeline(PCA(2), LogisticRegression()).fit(X[train], y[train])
    assert roc_auc_score(y[test], unsupervised.decision_function(X[test])) < 0.6
    xi = 400 / (X[train] ** 2).sum()
    for solver, weight in (("lpgd", 1.0), ("bcd", 0.1)):
        model = SupervisedDictionary(2, xi=weight * xi, solver=solver, random_state=0).fit(X[train], y[train])
        assert roc_auc_score(y[test], model.decision_function(X[test])) > 0.97
        # What the atoms span has that direction, and the one of most variance.
        basis = np.linalg.qr(model.components_.T)[0]
        assert np.linalg.norm(basis[[0, 7]], axis=1).min() > 0.9
    heavy = SupervisedDictionary(2, xi=100 * xi).fit(X[train], y[train])
    assert roc_auc_score(y[test], heavy.decision_function(X[test])) < 0.6


# Invariances


def test_swapping_the_classes_negates_the_coefficients(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours
    for mode in ("filter", "feature"):
        one = SupervisedDictionary(2, mode=mode, xi=0.1).fit(X, y)
        other = SupervisedDictionary(2, mode=mode, xi=0.1).fit(X, 1 - y)
        np.testing.assert_allclose(other.components_, one.components_, atol=1e-6)
        np.testing.assert_allclose(other.coef_, -one.coef_, atol=1e-6)
        np.testing.assert_allclose(other.intercept_, -one.intercept_, atol=1e-6)


@unsettled
def test_turning_the_data_turns_the_atoms(three_classes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    X, y, _ = three_classes
    turn = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))[0]
    for mode in ("filter", "feature"):
        plain = SupervisedDictionary(2, mode=mode, max_iter=30).fit(X, y)
        turned = SupervisedDictionary(2, mode=mode, max_iter=30).fit(X @ turn, y)
        np.testing.assert_allclose(
            turned.codes_ @ turned.components_, plain.codes_ @ plain.components_ @ turn, atol=1e-7
        )
        np.testing.assert_allclose(turned.predict_proba(X @ turn), plain.predict_proba(X), atol=1e-7)


@unsettled
def test_more_features_than_samples_are_the_same_problem() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(12, 10)), np.arange(12) % 2
    wide = np.hstack([X, np.zeros((12, 8))])
    for mode, solver in product(("filter", "feature"), ("lpgd", "bcd")):
        kind = {"mode": mode, "solver": solver, "max_iter": 30, "xi": 0.1, "random_state": 0}
        narrow = SupervisedDictionary(3, **kind).fit(X, y)
        padded = SupervisedDictionary(3, **kind).fit(wide, y)
        if solver == "lpgd":
            np.testing.assert_allclose(padded.history_, narrow.history_, rtol=1e-9)
            np.testing.assert_allclose(np.abs(padded.components_[:, :10]), np.abs(narrow.components_), atol=1e-6)
        np.testing.assert_allclose(padded.components_[:, 10:], 0, atol=0.2 if solver == "bcd" else 1e-9)


@unsettled
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_same_seed_same_bits(kind: dict[str, Any], three_classes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    X, y, aux = three_classes
    before = X.copy()
    one, two = (SupervisedDictionary(random_state=3, max_iter=5, **kind).fit(X, y, aux) for _ in range(2))
    np.testing.assert_array_equal(one.components_, two.components_)
    np.testing.assert_array_equal(one.predict_proba(X, aux), two.predict_proba(X, aux))
    np.testing.assert_array_equal(X, before)


# Covariates


def test_covariates_go_past_the_dictionary() -> None:
    rng = np.random.default_rng(0)
    X, aux = rng.normal(size=(2000, 6)) * [3, 1, 1, 1, 1, 1], rng.normal(size=(2000, 1)) * 2 + 5
    y = rng.random(2000) < 1 / (1 + np.exp(-(X[:, 0] + 1.5 * (aux[:, 0] - 5))))
    for mode, solver in product(("filter", "feature"), ("lpgd", "bcd")):
        model = SupervisedDictionary(2, mode=mode, solver=solver, xi=5.0, nu=1e-3, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(X, y, aux)
        np.testing.assert_allclose(model.aux_coef_, 1.5, rtol=0.15)
        assert model.components_.shape == (2, 6)
        assert (model.predict(X, aux) == y).mean() > 0.85


def test_no_covariates_equal_none_and_a_constant_changes_nothing(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours
    plain = SupervisedDictionary(2, xi=0.1, tol=1e-9, max_iter=5000).fit(X, y)
    constant = SupervisedDictionary(2, xi=0.1, tol=1e-9, max_iter=5000).fit(X, y, np.full((len(X), 1), 7.0))
    np.testing.assert_allclose(constant.aux_coef_, 0, atol=1e-12)
    np.testing.assert_allclose(constant.history_[-1], plain.history_[-1], rtol=1e-5)
    assert plain.aux_coef_.shape == (1, 0)


@unsettled
def test_units_of_unpenalised_covariates_do_not_matter(
    three_classes: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    X, y, aux = three_classes
    one = SupervisedDictionary(2, nu=0.0, xi=1.0, max_iter=50).fit(X, y, aux)
    other = SupervisedDictionary(2, nu=0.0, xi=1.0, max_iter=50).fit(X, y, aux * [10, 0.1] - 4)
    np.testing.assert_allclose(other.predict_proba(X, aux * [10, 0.1] - 4), one.predict_proba(X, aux), atol=1e-7)


# Blocks


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.booleans())
def test_minimise_bound_descends_to_the_minimum(seed: int, rank: int, nonnegative: bool) -> None:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(rank + 2, rank))
    gram, target = root.T @ root, rng.normal(size=(6, rank))

    def value(V: np.ndarray) -> float:
        return float((V * (V @ gram)).sum() / 2 - (V * target).sum())

    V = np.abs(rng.normal(size=(6, rank)))
    new = minimise_bound(V, V @ gram - target, gram, nonnegative)
    assert value(new) <= value(V) + 1e-9 * abs(value(V))
    if not nonnegative:
        np.testing.assert_allclose(new @ gram, target, atol=1e-6 * np.linalg.cond(gram))
    else:
        assert new.min() >= 0


def test_codes_of_new_data_are_least_squares() -> None:
    rng = np.random.default_rng(0)
    X, W = rng.normal(size=(20, 8)), np.abs(rng.normal(size=(8, 3)))
    np.testing.assert_allclose(reconstruction_codes(X, W), np.linalg.lstsq(W, X.T)[0].T, atol=1e-10)
    expected = np.stack([nnls(W, row)[0] for row in X])
    np.testing.assert_allclose(reconstruction_codes(X, W, nonnegative=True), expected, atol=1e-6)


def test_balls() -> None:
    centre, point = np.zeros((2, 2)), np.array([[3.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(within(1.0, centre, point), point / 5)
    np.testing.assert_array_equal(within(5.0, centre, point), point)


@unsettled
def test_a_small_radius_keeps_iterates_near(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours
    ends = [
        SupervisedDictionary(2, solver="bcd", radius=radius, max_iter=1, random_state=0).fit(X, y).codes_
        for radius in (1e-9, 1e-3, np.inf)
    ]
    assert np.linalg.norm(ends[1] - ends[0]) <= 2e-3 / np.log(2)
    assert np.linalg.norm(ends[2] - ends[0]) > 1


def test_regression_block_is_scikit_learn_s(three_classes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    X, y, _ = three_classes
    # With atoms that are the axes, the penalty is that of the coefficients.
    problem = problem_of(X, (y > 2).astype(int), nu=2.0)
    start = Factors(np.eye(6), X, np.zeros((6, 1)), np.zeros((1, 1)))
    found = regress(problem, start, steps=50, radius=np.inf)
    peer = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(X, y > 2)
    np.testing.assert_allclose(found.coef.T, peer.coef_, atol=1e-5)
    three = problem_of(X, y, nu=0.0)
    found = regress(three, Factors(np.eye(6), X, np.zeros((6, 2)), np.zeros((1, 2))), steps=50, radius=np.inf)
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=5000).fit(X, y)
    np.testing.assert_allclose(found.coef.T, peer.coef_[1:] - peer.coef_[:1], atol=1e-3)


# As an estimator


@unsettled
def test_ten_classes() -> None:
    X, y = load_digits(return_X_y=True)
    X = X / 16
    xi = len(X) / (X**2).sum()
    model = SupervisedDictionary(9, xi=0.1 * xi, max_iter=100).fit(X[::2], y[::2])
    assert model.score(X[1::2], y[1::2]) > 0.9
    chances = model.predict_proba(X[1::2])
    np.testing.assert_allclose(chances.sum(1), 1)
    np.testing.assert_array_equal(model.classes_[model.decision_function(X[1::2]).argmax(1)], model.predict(X[1::2]))
    np.testing.assert_allclose(np.log(chances[:, 1] / chances[:, 0]), model.decision_function(X[1::2])[:, 1], atol=1e-6)


def test_feature_form_predicts_from_codes(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours
    model = SupervisedDictionary(3, mode="feature", xi=0.1).fit(X, y)
    np.testing.assert_allclose(model.decision_function(X), model.transform(X) @ model.coef_[0] + model.intercept_)
    filters = SupervisedDictionary(3, xi=0.1).fit(X, y)
    np.testing.assert_allclose(
        filters.decision_function(X), X @ filters.components_.T @ filters.coef_[0] + filters.intercept_
    )
    np.testing.assert_allclose(filters.transform(X), filters.codes_, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tensors_and_both_precisions(dtype: type, tumours: tuple[np.ndarray, np.ndarray]) -> None:
    X, y = tumours[0].astype(dtype), tumours[1]
    expected = SupervisedDictionary(2, xi=0.1).fit(*tumours)
    for data, labels in ((X, y), (torch.tensor(X), torch.tensor(y))):
        model = SupervisedDictionary(2, xi=0.1).fit(data, labels)
        np.testing.assert_allclose(model.components_, expected.components_, atol=1e-3)
        assert model.transform(X).dtype == dtype
        assert model.inverse_transform(model.transform(X)).dtype == dtype
        np.testing.assert_array_equal(model.predict(data), expected.predict(tumours[0]))


def test_text_labels() -> None:
    X = np.random.default_rng(0).normal(size=(60, 3))
    y = np.where(X[:, 0] > 0, "up", "down")
    model = SupervisedDictionary(1, xi=0.01).fit(X, y)
    assert set(model.predict(X)) == {"up", "down"}
    assert list(model.get_feature_names_out()) == ["superviseddictionary0"]


@parametrize_with_checks(
    [
        SupervisedDictionary(),
        SupervisedDictionary(mode="feature"),
        SupervisedDictionary(solver="bcd", nonnegative=True, max_iter=20),
    ],
    expected_failed_checks=lambda estimator: (
        # The check gives it negative data, which it must refuse.
        {"check_decision_proba_consistency": "negative data"} if estimator.nonnegative else {}
    ),
)
@unsettled
def test_scikit_learn_s_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_numbers_may_be_numpys() -> None:
    X = np.random.default_rng(0).normal(size=(30, 4))
    y = (X[:, 3] > 0).astype(int)
    plain = SupervisedDictionary(2, xi=0.1, max_iter=300).fit(X, y)
    found = SupervisedDictionary(np.int64(2), xi=np.float32(0.1), max_iter=np.int64(300)).fit(X, y)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.components_, plain.components_, atol=1e-6)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no atoms": ({"n_components": 0}, "n_components must be at least 1"),
    "too many atoms": ({"n_components": 5}, r"n_components must be in \[1, 4\]"),
    "mode": ({"mode": "both"}, "mode must be one of 'filter', 'feature'"),
    "solver": ({"solver": "sgd"}, "solver must be one of 'lpgd', 'bcd'"),
    "negative xi": ({"xi": -1.0}, "xi must be at least 0"),
    "nan nu": ({"nu": float("nan")}, "nu must be at least 0"),
    "infinite tol": ({"tol": float("inf")}, "tol must be at least 0"),
    "feature form without reconstruction": ({"mode": "feature", "xi": 0.0}, "xi must be positive in the feature form"),
    "non-negative projection": ({"nonnegative": True}, 'nonnegative must be False with solver "lpgd"'),
    "no radius": ({"solver": "bcd", "radius": 0.0}, "radius must be positive"),
    "no iterations": ({"max_iter": 0}, "max_iter must be at least 1"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    X = np.random.default_rng(0).normal(size=(10, 4))
    with pytest.raises(ValueError, match=message):
        SupervisedDictionary(**arguments).fit(X, np.arange(10) % 2)


def test_bad_data_are_named() -> None:
    X, y = np.random.default_rng(0).normal(size=(10, 4)), np.arange(10) % 2
    with pytest.raises(ValueError, match="y must hold at least two classes"):
        SupervisedDictionary().fit(X, np.zeros(10))
    with pytest.raises(ValueError, match="Negative values"):
        SupervisedDictionary(solver="bcd", nonnegative=True).fit(X, y)
    with pytest.raises(ValueError, match="aux must have a row for each of the 10 samples, got 9"):
        SupervisedDictionary().fit(X, y, X[:9])
    with pytest.raises(ValueError, match="aux contains NaN"):
        SupervisedDictionary().fit(X, y, X * np.nan)
    model = SupervisedDictionary(max_iter=2000).fit(X, y, X[:, :2])
    with pytest.raises(ValueError, match="aux must have 2 columns, as at fit, got 0"):
        model.predict(X)
    with pytest.raises(ValueError, match="aux must have a row for each"):
        model.predict(X, X[:9, :2])
    with pytest.raises(ValueError, match="X must have 2 columns, one for each atom, got 4"):
        model.inverse_transform(X)


def test_too_few_iterations_warn(tumours: tuple[np.ndarray, np.ndarray]) -> None:
    for solver in ("lpgd", "bcd"):
        with pytest.warns(ConvergenceWarning, match="did not settle within 2 iterations") as caught:
            SupervisedDictionary(solver=solver, max_iter=2, xi=0.01, tol=0.0, random_state=0).fit(*tumours)
        assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
@unsettled
def test_constant_data_are_no_fault(kind: dict[str, Any]) -> None:
    X, y = np.ones((20, 3)), np.arange(20) % 2
    for data in (X, X - 1):
        model = SupervisedDictionary(2, max_iter=5, random_state=0, **kind).fit(data, y)
        np.testing.assert_allclose(model.predict_proba(data), 0.5, atol=1e-3)
