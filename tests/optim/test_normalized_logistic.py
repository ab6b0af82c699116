"""Normalised logistic gradient descent: the paper's own table, its limits and its bounds."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import check_estimator

from trimtab.optim import (
    BatchPerceptron,
    LogisticGD,
    NormalizedBatchPerceptron,
    NormalizedLogisticGD,
    batch_perceptron_step,
    logistic_step,
    normalized_logistic_loss,
    normalized_logistic_step,
)

ESTIMATORS = [LogisticGD, NormalizedLogisticGD, BatchPerceptron, NormalizedBatchPerceptron]


def worst_case(n):
    """Theorem 5.1: one sample that all others outvote."""
    return np.array([[0.5, -1.0]] + (n - 1) * [[-0.5, -1.0]]), np.array([1] + (n - 1) * [0])


def separable(n=60, d=5, margin=0.05, seed=0):
    """Generic data with a margin through the origin, as tensors with labels -1 and 1."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n, d, generator=generator, dtype=torch.float64)
    u = torch.nn.functional.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
    X = X[(X @ u).abs() > margin][:n]
    return X, torch.sign(X @ u)


def max_margin(Z):
    """The largest margin of a unit vector: the norm of the point of the samples' hull that is nearest to the origin."""
    weights, _ = nnls(np.vstack([Z.T, np.ones(len(Z))]), np.append(np.zeros(Z.shape[1]), 1.0))
    return np.linalg.norm(weights @ Z) / weights.sum()


def test_iterations_of_the_papers_table():
    """Table 1, first block: the data set of Theorem 5.1 with 1,000 samples."""
    X, y = worst_case(1000)
    for gamma, iterations in {100.0: 2, 10.0: 2, 1.0: 16, 0.1: 157}.items():
        assert NormalizedLogisticGD(gamma=gamma).fit(X, y).n_iter_ == iterations
    assert LogisticGD(gamma=100.0).fit(X, y).n_iter_ == 308


def test_loss_of_the_first_steps_rises_with_the_step_and_then_vanishes():
    """Theorem 4.1: two samples for which the loss tells the opposite of the truth."""
    X, y = [[1.0, -1.0], [-1.0, -4.0]], [1, 0]
    peaks = []
    for gamma in (10.0, 100.0, 1000.0):
        fitted = LogisticGD(gamma=gamma).fit(X, y)
        assert fitted.n_iter_ == 2
        np.testing.assert_allclose(fitted.coef_[0] / gamma, [1.0, 0.25], atol=2 / gamma)
        assert fitted.history_["loss"][1] == pytest.approx(
            0.5 * (np.logaddexp(0, gamma / 4) + np.logaddexp(0, -7 * gamma / 2))
        )
        peaks.append(fitted.history_["loss"].max())
    assert peaks[2] > 9 * peaks[1] > 80 * peaks[0]


@pytest.mark.parametrize("seed", range(3))
def test_limit_of_large_steps_is_the_batch_perceptron(seed):
    X, y = separable(seed=seed)
    theta, limit, normalized = (torch.zeros(5, dtype=torch.float64) for _ in range(3))
    for t in range(50):
        share = theta / 1e8
        torch.testing.assert_close(share, limit, rtol=1e-6, atol=1e-9)
        wrong = y * (X @ limit) <= 0
        if t and not wrong.any():
            break
        # The algorithm box, with its first step of half a length.
        expected = limit + (0.5 if t == 0 else 1.0) / len(X) * (y[wrong, None] * X[wrong]).sum(0)
        limit = batch_perceptron_step(limit, X, y)
        torch.testing.assert_close(limit, expected)
        theta = logistic_step(theta, X, y, gamma=1e8)
        normalized = normalized_logistic_step(normalized, X, y, gamma=1e8)
    assert t > 1


@pytest.mark.parametrize("seed", range(3))
def test_limits_as_estimators(seed):
    X, y = separable(seed=seed)
    for large, limit in ((LogisticGD, BatchPerceptron), (NormalizedLogisticGD, NormalizedBatchPerceptron)):
        ours, theirs = large(gamma=1e8).fit(X.numpy(), y.numpy()), limit().fit(X.numpy(), y.numpy())
        assert ours.n_iter_ == theirs.n_iter_
        np.testing.assert_array_equal(ours.history_["mistakes"], theirs.history_["mistakes"])
        np.testing.assert_allclose(ours.coef_ / 1e8, theirs.coef_, rtol=1e-6)


def test_step_is_minus_the_gradient_of_the_mean_logistic_loss():
    X, y = separable()
    theta = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    torch.nn.functional.softplus(-y * (X @ theta)).mean().backward()
    with torch.no_grad():
        torch.testing.assert_close(logistic_step(theta, X, y, 0.7), theta - 0.7 * theta.grad)
        beta = 1 / torch.sigmoid(-y * (X @ theta)).mean()
        torch.testing.assert_close(normalized_logistic_step(theta, X, y, 0.7), theta - 0.7 * beta * theta.grad)


@given(seed=st.integers(0, 999), gamma=st.floats(1e-6, 1e6), scale=st.floats(0, 1e4))
@settings(max_examples=30, deadline=None)
def test_normalised_step_is_no_longer_than_gamma_times_the_largest_sample(seed, gamma, scale):
    X, y = separable(seed=seed)
    theta = scale * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step = normalized_logistic_step(theta, X, y, gamma) - theta
    rounding = 1e-12 * theta.norm()
    assert step.norm() <= gamma * X.norm(dim=1).max() * (1 + 1e-9) + rounding


def test_normalised_step_survives_weights_that_underflow():
    """All margins near 1,000 and 2,000: every weight is zero in float64, and the nearest sample alone moves it."""
    X, y = torch.tensor([[1.0, 0.0], [2.0, 3.0]], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    theta = torch.tensor([1000.0, 0.0], dtype=torch.float64)
    step = normalized_logistic_step(theta, X, y, gamma=1.0) - theta
    torch.testing.assert_close(step, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert torch.equal(logistic_step(theta, X, y, gamma=1.0), theta)


@pytest.mark.parametrize("estimator", [LogisticGD(gamma=3.0), NormalizedLogisticGD(gamma=0.3), BatchPerceptron()])
def test_duplicating_all_data_changes_nothing(estimator):
    X, y = (value.numpy() for value in separable())
    once, thrice = (estimator.fit(np.tile(X, (k, 1)), np.tile(y, k)).coef_ for k in (1, 3))
    np.testing.assert_allclose(once, thrice, rtol=1e-9)


def test_samples_that_are_right_by_far_slow_the_plain_step_and_not_the_normalised_one():
    generator = np.random.default_rng(0)
    hard = np.array([[0.3, -1.0], [0.25, -1.1]])
    counts = {}
    for easy in (20, 200):
        X = np.vstack([hard, [0.3, 1.0] + 0.05 * generator.standard_normal((easy, 2))])
        X[::2] *= -1
        y = np.arange(len(X)) % 2
        counts[easy] = [cls(gamma=10.0).fit(X, y).n_iter_ for cls in (LogisticGD, NormalizedLogisticGD)]
    assert counts[200][0] > 5 * counts[20][0]
    assert counts[200][1] <= counts[20][1] + 2


@pytest.mark.parametrize("gamma", [0.01, 0.1, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("seed", range(4))
def test_bounds_on_the_number_of_iterations(gamma, seed):
    """Theorems 6.1, 3.3 and 5.3, with the true margin."""
    X, y = separable(n=80, d=3, margin=0.02, seed=seed)
    Z = (X * y[:, None]).numpy()
    mu, R, n = max_margin(Z), np.linalg.norm(Z, axis=1).max(), len(Z)
    assert mu > 0.005
    X, y = X.numpy(), y.numpy()
    assert NormalizedLogisticGD(gamma, max_iter=10**6).fit(X, y).n_iter_ <= R**2 / mu**2 + 2 * math.log(2 * n - 1) / (
        gamma * mu**2
    )
    assert BatchPerceptron().fit(X, y).n_iter_ <= n * R**2 / mu**2
    assert NormalizedBatchPerceptron().fit(X, y).n_iter_ <= R**2 / mu**2


def test_margin_helper_agrees_with_a_known_margin():
    assert max_margin(np.array([[1.0, 3.0], [1.0, -2.0], [4.0, 0.0]])) == pytest.approx(1.0)


def test_sgd_on_the_loss_is_the_normalised_step():
    X, y = separable()
    model = torch.nn.Linear(5, 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    theta = torch.zeros(5, dtype=torch.float64)
    for _ in range(10):
        optimizer.zero_grad()
        normalized_logistic_loss(model(X).squeeze(1), (y + 1) / 2).backward()
        optimizer.step()
        theta = normalized_logistic_step(theta, X, y, gamma=0.4)
        torch.testing.assert_close(model.weight.detach()[0], theta)


def test_loss_is_negative_exactly_when_weighted_margins_are_right():
    targets = torch.tensor([1.0, 0.0, 1.0])
    assert normalized_logistic_loss(torch.tensor([5.0, -4.0, 6.0]), targets) < 0
    assert normalized_logistic_loss(torch.tensor([5.0, 4.0, 6.0]), targets) > 3.9
    assert normalized_logistic_loss(torch.tensor([1e4, 1e4, -1e4]), targets).isfinite()


# --- estimators ---


@pytest.mark.parametrize("cls", ESTIMATORS)
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_keeps_scikit_learns_conventions(cls, fit_intercept):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(cls(max_iter=30, fit_intercept=fit_intercept), on_skip=None)


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_stops_at_the_first_weights_without_mistakes(cls):
    X, y = load_iris(return_X_y=True)
    names = np.where(y == 0, "setosa", "other")
    fitted = cls().fit(X, names)
    mistakes, loss = fitted.history_["mistakes"], fitted.history_["loss"]
    assert len(mistakes) == len(loss) == fitted.n_iter_ + 1
    assert mistakes[0] == 150
    assert loss[0] == pytest.approx(math.log(2))
    assert mistakes[-1] == 0
    assert (mistakes[:-1] > 0).all()
    assert fitted.intercept_.tolist() == [0.0]
    assert (fitted.predict(X) == names).all()
    assert fitted.classes_.tolist() == ["other", "setosa"]
    assert ((fitted.decision_function(X) > 0) == (names == "setosa")).all()


def test_intercept_is_a_constant_feature():
    X, y = np.array([[1.0], [2.0], [4.0], [5.0]]), np.array([0, 0, 1, 1])
    with pytest.warns(ConvergenceWarning, match=r"stopped after 50 iterations with \d of 4 training samples"):
        NormalizedLogisticGD(max_iter=50).fit(X, y)
    shifted = NormalizedLogisticGD(fit_intercept=True).fit(X, y)
    plain = NormalizedLogisticGD().fit(np.hstack([X, np.ones((4, 1))]), y)
    assert shifted.coef_.shape == (1, 1)
    np.testing.assert_array_equal(np.append(shifted.coef_, shifted.intercept_), plain.coef_[0])
    assert shifted.score(X, y) == 1.0


@pytest.mark.parametrize("cls", ESTIMATORS)
def test_warns_in_the_callers_name_where_classes_cannot_be_separated(cls):
    with pytest.warns(ConvergenceWarning, match=f"{cls.__name__} stopped after 20 iterations") as caught:
        fitted = cls(max_iter=20).fit([[1.0], [-1.0], [2.0], [-2.0]], [0, 0, 1, 1])
    assert caught[0].filename == __file__
    assert fitted.n_iter_ == 20
    assert np.isfinite(fitted.coef_).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 0, 0], "y must hold two classes, got 1 class"), ([0, 1, 2], "Only binary classification is supported")],
)
def test_labels_of_other_than_two_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        NormalizedLogisticGD().fit([[1.0], [2.0], [3.0]], labels)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X, y: LogisticGD(gamma=0.0).fit(X, y), "gamma must be positive and finite, got 0.0"),
        (lambda X, y: NormalizedLogisticGD(gamma=math.inf).fit(X, y), "gamma must be positive and finite"),
        (lambda X, y: BatchPerceptron(max_iter=0).fit(X, y), "max_iter must be at least 1"),
        (lambda X, y: NormalizedLogisticGD().fit([[math.nan]] * 4, [0, 1, 0, 1]), "NaN"),
        (lambda X, y: logistic_step(torch.zeros(4), X, y, 1.0), r"theta must have shape \(5,\)"),
        (lambda X, y: normalized_logistic_step(torch.zeros(5), X, y[:-1], 1.0), r"y must have shape \(60,\)"),
        (lambda X, y: normalized_logistic_step(torch.zeros(5), X, y, -1.0), "gamma must be positive and finite"),
        (lambda X, y: batch_perceptron_step(torch.zeros(5), X[0], y), "X must have shape"),
        (lambda X, y: normalized_logistic_loss(X, y), "logits must have shape"),
        (lambda X, y: normalized_logistic_loss(y[:0], y[:0]), "logits must have shape"),
        (lambda X, y: normalized_logistic_loss(y, y[:-1]), r"targets must have shape \(60,\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*separable())


@pytest.mark.parametrize("y", [[0.0, 1.0], [1.0, 0.5], [1.0, math.nan], [2.0, -1.0]])
def test_labels_of_another_code_are_refused(y) -> None:
    theta, X, labels = torch.zeros(2), torch.eye(2), torch.tensor(y)
    for step in (logistic_step, normalized_logistic_step):
        with pytest.raises(ValueError, match="y must be -1 or 1"):
            step(theta, X, labels, 1.0)
    with pytest.raises(ValueError, match="y must be -1 or 1"):
        batch_perceptron_step(theta, X, labels)


@pytest.mark.parametrize("targets", [[-1.0, 1.0], [1.0, 0.5], [1.0, math.nan]])
def test_targets_of_another_code_are_refused(targets) -> None:
    with pytest.raises(ValueError, match="targets must be 0 or 1"):
        normalized_logistic_loss(torch.zeros(2), torch.tensor(targets))
