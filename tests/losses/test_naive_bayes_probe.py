"""Naive Bayes with shared variances: its densities, its streams, its layer, and scikit-learn's conventions."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.datasets import load_iris
from sklearn.naive_bayes import GaussianNB
from sklearn.utils.estimator_checks import check_estimator

from trimtab.losses import NaiveBayesProbe


def samples(n: int = 90, d: int = 6, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes of unequal size and spread, all present."""
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), rng.choice(classes, n - classes, p=_shares(classes))])
    X = rng.normal(size=(n, d)) * rng.uniform(0.3, 3, size=(classes, d))[y] + rng.normal(size=(classes, d))[y]
    return X, y


def _shares(classes: int) -> np.ndarray:
    return np.arange(1, classes + 1) / np.arange(1, classes + 1).sum()


def test_it_is_bayes_rule_on_the_fitted_densities() -> None:
    X, y = samples()
    probe = NaiveBayesProbe().fit(X, y)
    pooled = sum((y == k).mean() * X[y == k].var(0) for k in range(3))
    log_joint = np.stack(
        [np.log((y == k).mean()) + norm.logpdf(X, X[y == k].mean(0), np.sqrt(pooled + 1e-9)).sum(1) for k in range(3)],
        axis=1,
    )
    expected = log_joint - np.logaddexp.reduce(log_joint, axis=1, keepdims=True)
    np.testing.assert_allclose(probe.predict_log_proba(X), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(probe.predict_proba(X), np.exp(expected), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(probe.predict(X), expected.argmax(1))
    assert probe.score(X, y) == (expected.argmax(1) == y).mean()


def test_variances_are_pooled_by_the_classes_shares() -> None:
    # Class 0: values 0, 2 (variance 1); class 1: four values with variance 4. Shared: (2 * 1 + 4 * 4) / 6.
    X = np.array([[0.0], [2.0], [3.0], [3.0], [7.0], [7.0]])
    probe = NaiveBayesProbe(var_smoothing=0.5).fit(X, [0, 0, 1, 1, 1, 1])
    assert probe.var_ == pytest.approx([3.0 + 0.5])
    assert probe.mean_.tolist() == [[1.0], [5.0]]
    assert probe.class_prior_ == pytest.approx([1 / 3, 2 / 3])


def test_two_classes_have_the_closed_form_boundary() -> None:
    X, y = samples(classes=2)
    probe = NaiveBayesProbe().fit(X, y)
    layer = probe.to_linear(torch.float64)
    weight = (layer.weight[1] - layer.weight[0]).detach().numpy()
    np.testing.assert_allclose(weight, (probe.mean_[1] - probe.mean_[0]) / probe.var_)
    # At the middle between the means only the priors speak.
    middle = torch.from_numpy(probe.mean_.mean(0))
    difference = (layer(middle)[1] - layer(middle)[0]).item()
    assert difference == pytest.approx(np.log((y == 1).sum() / (y == 0).sum()))


def test_scikit_learns_naive_bayes_with_the_pooled_variance_agrees() -> None:
    X, y = samples()
    peer = GaussianNB(var_smoothing=0).fit(X, y)
    pooled = peer.class_prior_ @ peer.var_
    assert not np.array_equal(peer.predict(X), NaiveBayesProbe().fit(X, y).predict(X))
    peer.var_ = np.tile(pooled + 1e-9, (3, 1))
    np.testing.assert_allclose(NaiveBayesProbe().fit(X, y).predict_log_proba(X), peer.predict_log_proba(X), rtol=1e-8)


def test_the_layer_is_the_classifier() -> None:
    X, y = samples()
    names = np.array(["pear", "apple", "fig"])[y]
    probe = NaiveBayesProbe().fit(X, names)
    layer = probe.to_linear(torch.float64)
    logits = layer(torch.from_numpy(X))
    np.testing.assert_allclose(logits.log_softmax(1).detach().numpy(), probe.predict_log_proba(X), atol=1e-10)
    np.testing.assert_array_equal(probe.classes_[logits.argmax(1).numpy()], probe.predict(X))
    assert probe.to_linear().weight.dtype == torch.get_default_dtype()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 40), min_size=1, max_size=6), st.booleans())
def test_any_stream_of_batches_equals_one_fit(seed: int, sizes: list[int], relative: bool) -> None:
    X, y = samples(n=sum(sizes) + 4, classes=4, seed=seed)
    order = np.random.default_rng(seed).permutation(len(X))
    X, y = 5.0 + X[order], y[order]
    whole = NaiveBayesProbe(1e-3, relative_smoothing=relative).fit(X, y)
    stream = NaiveBayesProbe(1e-3, relative_smoothing=relative)
    for part in np.split(np.arange(len(X)), np.cumsum(sizes)):
        stream.partial_fit(X[part], y[part], classes=range(4))
    for name in ("class_count_", "class_prior_", "mean_", "var_"):
        np.testing.assert_allclose(getattr(stream, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(stream.predict_log_proba(X), whole.predict_log_proba(X), rtol=1e-8, atol=1e-8)


def test_fit_forgets_and_partial_fit_does_not() -> None:
    X, y = samples()
    probe = NaiveBayesProbe().partial_fit(X[:40], y[:40], classes=[0, 1, 2]).fit(X[40:], y[40:])
    assert probe.class_count_.sum() == 50
    assert probe.partial_fit(X[:40], y[:40]).class_count_.sum() == 90


def test_relabelling_relabels_the_predictions() -> None:
    X, y = samples()
    new = np.array([2, 0, 1])
    plain, renamed = NaiveBayesProbe().fit(X, y), NaiveBayesProbe().fit(X, new[y])
    np.testing.assert_array_equal(renamed.predict(X), new[plain.predict(X)])
    np.testing.assert_allclose(renamed.predict_proba(X)[:, new], plain.predict_proba(X))


def test_a_large_offset_costs_no_accuracy() -> None:
    X, y = load_iris(return_X_y=True)
    X = X.astype(np.float32)
    shifted = (X + np.float32(1e6)).astype(np.float32)  # keeps sixteenths of the values
    coarse = shifted.astype(np.float64) - 1e6
    probe = NaiveBayesProbe().fit(coarse, y)
    np.testing.assert_allclose(
        NaiveBayesProbe().fit(shifted, y).predict_log_proba(shifted), probe.predict_log_proba(coarse), atol=1e-6
    )
    batches = NaiveBayesProbe()
    for part in np.array_split(np.random.default_rng(0).permutation(150), 7):
        batches.partial_fit(shifted[part], y[part], classes=[0, 1, 2])
    np.testing.assert_allclose(batches.var_, probe.var_, rtol=1e-6)


def test_one_sample_a_class_is_the_nearest_mean() -> None:
    X = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    probe = NaiveBayesProbe().fit(X, [0, 1, 2])
    assert probe.predict([[1.0, 0.5], [2.5, 1.0], [1.0, 2.5]]).tolist() == [0, 1, 2]
    assert probe.var_ == pytest.approx([1e-9, 1e-9])


def test_relative_smoothing_follows_the_features_scale() -> None:
    X, y = samples()
    X[:, 2] = (y == 1) * 0.5  # without variance in any class
    fits = [NaiveBayesProbe(1e-2, relative_smoothing=True).fit(scale * X, y) for scale in (1.0, 1e4)]
    np.testing.assert_allclose(fits[0].predict_log_proba(X), fits[1].predict_log_proba(1e4 * X), rtol=1e-8)
    assert fits[0].var_[2] == pytest.approx(1e-2 * X.var(0).max())
    constant = NaiveBayesProbe(relative_smoothing=True).fit(np.ones((4, 2)), [0, 0, 0, 1])
    assert constant.predict_proba(np.ones((1, 2)))[0] == pytest.approx([0.75, 0.25])


def test_tensors_are_taken_as_they_come() -> None:
    X, y = samples()
    expected = NaiveBayesProbe().fit(X, y)
    features = torch.from_numpy(X).requires_grad_()
    probe = NaiveBayesProbe().fit(features, torch.from_numpy(y))
    np.testing.assert_array_equal(probe.predict_log_proba(features), expected.predict_log_proba(X))
    assert probe.score(features, torch.from_numpy(y)) == expected.score(X, y)
    half = features.detach().bfloat16()
    np.testing.assert_array_equal(
        NaiveBayesProbe().fit(half, torch.from_numpy(y)).mean_, NaiveBayesProbe().fit(half.double().numpy(), y).mean_
    )


def test_a_class_not_seen_yet_is_never_predicted() -> None:
    X, y = samples(classes=2)
    probe = NaiveBayesProbe().partial_fit(X, y, classes=[0, 1, 7])
    assert probe.predict_proba(X)[:, 2].max() == 0
    np.testing.assert_allclose(probe.predict_proba(X)[:, :2], NaiveBayesProbe().fit(X, y).predict_proba(X))
    probe.partial_fit(X[:1] + 50, [7])
    assert probe.predict(X[:1] + 50) == [7]


def test_bad_input_is_refused_by_name_and_changes_nothing() -> None:
    X, y = samples()
    with pytest.raises(ValueError, match="classes must be passed"):
        NaiveBayesProbe().partial_fit(X, y)
    for smoothing in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="var_smoothing"):
            NaiveBayesProbe(smoothing).fit(X, y)
    probe = NaiveBayesProbe().partial_fit(X, y, classes=[0, 1, 2])
    before = probe.mean_.copy()
    with pytest.raises(ValueError, match="classes"):
        probe.partial_fit(X, y, classes=[0, 1])
    for label in (9, -1):
        with pytest.raises(ValueError, match="y must be among"):
            probe.partial_fit(X, np.where(y == 0, label, y))
    with pytest.raises(ValueError, match="features"):
        probe.partial_fit(X[:, :2], y)
    with pytest.raises(ValueError, match="NaN"):
        probe.partial_fit(X * np.nan, y)
    np.testing.assert_array_equal(probe.mean_, before)


@pytest.mark.parametrize("relative", [False, True])
def test_keeps_scikit_learns_conventions(relative: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_estimator(NaiveBayesProbe(relative_smoothing=relative), on_skip=None)


def test_score_takes_a_column_of_labels_and_refuses_another_number_of_them() -> None:
    X, y = samples()
    probe = NaiveBayesProbe().fit(X, y)
    assert probe.score(X, y[:, None]) == probe.score(X, y) == np.mean(probe.predict(X) == y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        probe.score(X, y[:1])


def test_a_refused_fit_leaves_the_columns_that_are_known() -> None:
    X, y = samples()
    probe = NaiveBayesProbe().fit(X, y)
    expected = probe.predict(X)
    with pytest.raises(ValueError, match="continuous"):
        probe.fit(X[:, :2], y + 0.5)
    assert (probe.predict(X) == expected).all()
    fresh = NaiveBayesProbe()
    with pytest.raises(ValueError, match="y must be among the classes"):
        fresh.partial_fit(X, y, classes=[0, 1])
    assert not hasattr(fresh, "n_features_in_")
