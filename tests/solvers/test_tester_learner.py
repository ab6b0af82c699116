"""The tester-learner for halfspaces: its gradient and bounds, what it accepts, and which test refuses what."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import special_ortho_group
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from trimtab.solvers import (
    HalfspaceTesterLearner,
    RejectedError,
    RejectionWarning,
    disagreement_bound,
    halfspace_iterates,
    moment_gaps,
    smoothed_error,
)
from trimtab.solvers.tester_learner.directions import orthogonal

W = np.array([0.6, 0.0, -0.48, 0.64, 0.0])


def noisy(X: np.ndarray, rate: float = 0.1, seed: int = 1) -> np.ndarray:
    """Labels of W's halfspace, flipped at random."""
    flips = np.random.default_rng(seed).random(len(X)) < rate
    return np.where((X @ W > 0) ^ flips, 1, -1)


def gaussian(n: int = 20_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, len(W)))


def fit(X: np.ndarray, y: np.ndarray | None = None, **options: Any) -> HalfspaceTesterLearner:
    return HalfspaceTesterLearner(**{"random_state": 0, **options}).fit(X, noisy(X) if y is None else y)


def failures(model: HalfspaceTesterLearner) -> set[str]:
    """Names of failed tests, without degree and width."""
    return {test.name.split(",")[0].split(" of ")[0] for test in model.report_.failed}


def angle(w: np.ndarray, other: np.ndarray = W) -> float:
    return math.acos(min(1.0, float(w @ other) / float(np.linalg.norm(w) * np.linalg.norm(other))))


class TestSmoothedError:
    def test_step_by_hand(self) -> None:
        """Linear in the middle third, the published cubic join, flat outside; each value by hand for sigma = 6."""
        for margin, expected in {0: 0.5, 1: 1 / 3, -1: 2 / 3, 0.5: 5 / 12, 3: 0.0, -3: 1.0, 9: 0.0, -9: 1.0}.items():
            value, _ = smoothed_error(np.ones(1), np.array([[float(margin)]]), np.ones(1), sigma=6.0)
            assert value == pytest.approx(expected, abs=1e-12), margin
        # Midway along the join, of length a third of sigma: (2/3 + 1)/2 + (1/3)/8, by Hermite's formula.
        value, _ = smoothed_error(np.ones(1), np.array([[-2.0]]), np.ones(1), sigma=6.0)
        assert value == pytest.approx(5 / 6 + 1 / 24)

    @given(seed=st.integers(0, 99), sigma=st.floats(0.2, 3), scale=st.floats(0.1, 10))
    @settings(max_examples=20, deadline=None)
    def test_gradient_is_that_of_the_value_along_the_sphere(self, seed: int, sigma: float, scale: float) -> None:
        rng = np.random.default_rng(seed)
        X, y, w = rng.normal(size=(30, 4)), rng.choice([-1.0, 1.0], 30), rng.normal(size=4)
        w /= np.linalg.norm(w)
        value, gradient = smoothed_error(scale * w, X, y, sigma)
        assert value == pytest.approx(smoothed_error(w, X, y, sigma)[0])
        assert gradient @ w == pytest.approx(0, abs=1e-12)
        for direction in np.eye(4):
            ahead, behind = (smoothed_error(w + h * direction, X, y, sigma)[0] for h in (1e-6, -1e-6))
            assert gradient @ direction == pytest.approx((ahead - behind) / 2e-6, abs=1e-5)

    def test_gradient_is_that_of_autograd(self) -> None:
        rng = np.random.default_rng(0)
        X, y, w = rng.normal(size=(50, 3)), rng.choice([-1.0, 1.0], 50), np.array([1.0, 2.0, -2.0]) / 3
        weights = torch.tensor(w, requires_grad=True)
        t = -torch.tensor(y) * (torch.tensor(X) @ (weights / weights.norm())) / 0.8
        # The join through (1/6, 2/3) with slope 1 and (1/2, 1) with slope 0, from its four conditions.
        conditions = np.array(
            [[x**3, x**2, x, 1] for x in (1 / 6, 1 / 2)] + [[3 * x**2, 2 * x, 1, 0] for x in (1 / 6, 1 / 2)]
        )
        cubic = np.linalg.solve(conditions, [2 / 3, 1, 1, 0])
        a = t.abs().clamp(max=0.5)
        joined = cubic[0] * a**3 + cubic[1] * a**2 + cubic[2] * a + cubic[3]
        upper = torch.where(a <= 1 / 6, a + 0.5, joined)
        expected = torch.where(t > 0, upper, 1 - upper).mean()
        expected.backward()
        value, gradient = smoothed_error(w, X, y, 0.8)
        assert value == pytest.approx(expected.item(), rel=1e-12)
        np.testing.assert_allclose(gradient, weights.grad.numpy(), atol=1e-12)

    @pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
    def test_no_stationary_point_beyond_the_angle_that_sigma_is_set_for(self, rate: float) -> None:
        """The structural lemma, under the Massart noise that hides the best halfspace from the gradient the most.

        Labels are right where they mislead, and wrong at the full rate where they help. The labels' means stand for
        them, as the gradient is linear in them.
        """
        X, epsilon = gaussian(400_000), 0.2
        sigma = epsilon * (1 - 2 * rate) / (1 - rate)
        v = np.array([0.8, 0.0, 0.36, -0.48, 0.0])
        for theta in (0.8 * epsilon, 2 * epsilon, 1.0):
            w = math.cos(theta) * W - math.sin(theta) * v
            towards = math.sin(theta) * W + math.cos(theta) * v
            truth = np.sign(X @ W)
            y = truth * np.where(truth == np.sign(X @ towards), 1 - 2 * rate, 1)
            pull = -smoothed_error(w, X, y, sigma)[1] @ towards
            assert pull > 0.1 * (1 - 2 * rate)
        # Far from the best, the gradient is above what counts as stationary: half of this.
        assert pull > (1 - 2 * rate) / math.sqrt(2 * math.pi) / math.sqrt(3)

    def test_opposite_labels_and_opposite_weights(self) -> None:
        X, y = gaussian(100), noisy(gaussian(100)).astype(float)
        value, gradient = smoothed_error(W, X, y, 0.5)
        for w, labels in ((W, -y), (-W, y)):
            other, opposite = smoothed_error(w, X, labels, 0.5)
            assert other == pytest.approx(1 - value)
            np.testing.assert_allclose(opposite, -gradient if w is W else gradient, atol=1e-12)

    def test_narrow_band_gives_the_plain_error(self) -> None:
        X = gaussian(1000)
        y = noisy(X).astype(float)
        assert smoothed_error(W, X, y, 1e-9)[0] == pytest.approx((np.sign(X @ W) != y).mean())


class TestDescent:
    def test_is_the_projected_recursion_on_given_batches(self) -> None:
        X = gaussian(200)
        y, rng = noisy(X).astype(float), np.random.default_rng(3)
        batches, w = rng.integers(200, size=(30, 20)), np.array([1.0, -2.0, 0.5, 0.0, 1.0])
        found = halfspace_iterates(X, y, 0.7, start=w, batches=batches, lr=0.4)
        w = w / np.linalg.norm(w)
        np.testing.assert_allclose(found[0], w)
        for t, rows in enumerate(batches, start=1):
            w = w - 0.4 / math.sqrt(t) * smoothed_error(w, X[rows], y[rows], 0.7)[1]
            w = w / np.linalg.norm(w)
            np.testing.assert_allclose(found[t], w, atol=1e-12)

    def test_opposite_labels_from_the_opposite_start_mirror(self) -> None:
        X = gaussian(200)
        y, batches = noisy(X).astype(float), np.random.default_rng(3).integers(200, size=(20, 50))
        one = halfspace_iterates(X, y, 0.5, start=W[::-1], batches=batches)
        np.testing.assert_allclose(halfspace_iterates(X, -y, 0.5, start=-W[::-1], batches=batches), -one, atol=1e-12)


class TestDisagreementBound:
    @given(seed=st.integers(0, 999), theta=st.floats(0.01, 1.4), width=st.floats(0.02, 2))
    @settings(max_examples=40, deadline=None)
    def test_holds_for_every_halfspace_within_the_angle_whatever_the_samples(
        self, seed: int, theta: float, width: float
    ) -> None:
        rng = np.random.default_rng(seed)
        X = rng.standard_t(3, size=(200, 3)) * rng.uniform(0.1, 2, 3) + rng.normal(size=3)
        w, other = np.linalg.qr(rng.normal(size=(3, 2)))[0].T
        bound = disagreement_bound(w, X, theta, width)
        for share in (0.3, 1.0):
            near = math.cos(share * theta) * w + math.sin(share * theta) * other
            assert ((X @ w > 0) != (X @ near > 0)).mean() <= bound + 1e-12

    def test_of_all_directions_the_widest_counts(self) -> None:
        """Samples spread along one direction orthogonal to w, at distance 1 from the boundary: Chebyshev's bound."""
        X = np.array([[1.0, 0, 3], [1, 0, -3], [1, 1, 0], [1, -1, 0]])
        assert disagreement_bound(np.array([1.0, 0, 0]), X, math.atan(0.1), width=0.5) == pytest.approx(0.01 * 4.5)

    def test_grows_with_the_angle_and_is_linear_for_a_gaussian(self) -> None:
        X = gaussian()
        bounds = [disagreement_bound(W, X, theta, 0.02) for theta in (0.05, 0.1, 0.2, 0.4)]
        assert bounds == sorted(bounds)
        for theta, bound in zip((0.05, 0.1, 0.2, 0.4), bounds, strict=True):
            assert 1 / math.pi < bound / theta < 2.2

    def test_more_slabs_than_are_kept(self) -> None:
        assert disagreement_bound(W, gaussian(500), 0.3, width=1e-7) <= 1


@given(seed=st.integers(0, 999), d=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_basis_of_the_complement(seed: int, d: int) -> None:
    w = np.random.default_rng(seed).normal(size=d)
    w /= np.linalg.norm(w)
    basis = orthogonal(w)
    assert basis.shape == (d, d - 1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(d - 1), atol=1e-12)
    np.testing.assert_allclose(basis.T @ w, 0, atol=1e-12)


class TestAccepts:
    @pytest.mark.parametrize("seed", range(6))
    def test_gaussian_samples_with_an_error_near_the_best(self, seed: int) -> None:
        X = gaussian(seed=seed)
        model = fit(X, noisy(X, seed=seed), random_state=seed)
        assert model.accepted_, str(model.report_)
        assert angle(model.coef_[0]) < 0.05
        assert 0.8 * angle(model.coef_[0]) / math.pi < 0.01
        assert model.error_ == pytest.approx(0.1, abs=0.015)

    def test_gaussian_samples_with_adversarial_labels(self) -> None:
        X = gaussian()
        tilt = np.array([0.8, 0.0, 0.36, -0.48, 0.0])
        truth = np.sign(X @ W)
        pull = truth * (X @ tilt)
        y = np.where(pull > np.quantile(pull, 0.95), -truth, truth)
        model = fit(X, y, noise="agnostic")
        assert model.accepted_, str(model.report_)
        assert (np.sign(X @ model.coef_[0]) != truth).mean() < 0.05
        assert len(model.candidates_) == 40  # ten for each sigma of 0.1, 0.2, 0.4 and 0.8
        assert model.sigma_ in (0.1, 0.2, 0.4, 0.8)

    def test_small_samples_at_a_large_epsilon(self) -> None:
        """False alarms stay below delta where bands hold a hundred samples, too."""
        rejected = sum(not fit(gaussian(4000, seed), epsilon=0.5, n_iter=150).accepted_ for seed in range(12))
        assert rejected <= 1

    def test_rotated_samples_rotate_the_answer(self) -> None:
        X = gaussian()
        rotation = special_ortho_group.rvs(len(W), random_state=0)
        y = noisy(X)
        model, turned = fit(X, y), fit(X @ rotation, y)
        assert model.accepted_
        assert turned.accepted_
        assert angle(turned.coef_[0] @ rotation.T, model.coef_[0]) < 0.05

    def test_negated_labels_negate_the_answer(self) -> None:
        X = gaussian()
        y = noisy(X)
        model, mirrored = fit(X, y), fit(X, -y)
        assert angle(mirrored.coef_[0], -model.coef_[0]) < 0.05
        assert mirrored.accepted_

    def test_descent_that_went_to_the_wrong_pole_is_turned_round(self) -> None:
        """A step too small to move leaves each candidate at its start; the sign is then chosen by the error."""
        X = gaussian(4000)
        for seed in range(6):
            model = fit(X, n_iter=1, n_candidates=1, lr=1e-9, random_state=seed, on_reject="ignore")
            assert model.error_ <= 0.5
            np.testing.assert_allclose(np.abs(model.coef_), np.abs(model.candidates_))
            assert model.score(X, noisy(X)) >= 0.45


class TestRejects:
    """Each law by the test that is there for it."""

    def test_moments_of_other_laws(self) -> None:
        rng = np.random.default_rng(0)
        X = gaussian()
        laws = {
            "moments of degree 1": X + 0.3,
            "moments of degree 2": X * 1.3,
            "moments of degree 3": rng.gamma(16, 0.25, X.shape) - 4,
            "moments of degree 4": rng.laplace(scale=math.sqrt(0.5), size=X.shape),
        }
        for name, samples in laws.items():
            assert fit(samples).report_.failed[0].name == name

    def test_uniform_clusters_and_correlated(self) -> None:
        rng, X = np.random.default_rng(0), gaussian()
        for samples in (
            rng.uniform(-math.sqrt(3), math.sqrt(3), X.shape),
            X + rng.choice([-1, 1], (len(X), 1)) * np.eye(5)[0],
            X @ np.linalg.cholesky(0.5 + 0.5 * np.eye(5)).T,
        ):
            assert not fit(samples).accepted_

    @staticmethod
    def slab(width: float = 0.1) -> np.ndarray:
        """Gaussian but along W, where three blurred nodes have all moments of a Gaussian up to degree 5."""
        X, drawn = gaussian(), np.random.default_rng(5).choice([-1, 0, 1], 20_000, p=[1 / 6, 2 / 3, 1 / 6])
        along = math.sqrt(3 * (1 - width**2)) * drawn + width * (X @ W)
        return X + np.outer(along - X @ W, W)

    def test_a_heavy_slab_that_moments_cannot_see(self) -> None:
        model = fit(self.slab())
        assert failures(model) == {"anti-concentration", "slab mass"}

    def test_an_empty_band_that_moments_cannot_see(self) -> None:
        X, rng = gaussian(), np.random.default_rng(5)
        # The 2-node rule's moments match up to degree 3 only, so 4 is not looked at.
        along = rng.choice([-1, 1], len(X)) * math.sqrt(0.96) + 0.2 * (X @ W)
        model = fit(X + np.outer(along - X @ W, W), degree=3)
        assert "anti-concentration" in failures(model)
        assert not any(test.name.startswith("moments") for test in model.report_.failed)

    def test_a_band_whose_conditional_moments_differ(self) -> None:
        """Near the boundary the samples are wider along it, and elsewhere so much narrower that the whole fits."""
        X = gaussian()
        near = np.abs(X @ W) < 0.12
        v = np.array([0.8, 0.0, 0.36, -0.48, 0.0])
        factor = np.where(near, 2.0, np.sqrt((1 - 4 * near.mean()) / (1 - near.mean())))
        model = fit(X + np.outer((factor - 1) * (X @ v), v), degree=2)
        assert any(test.name.startswith("sigma/2 band: moments of degree 2") for test in model.report_.failed)
        assert "slab spread" in failures(model)
        assert "moments" not in failures(model)
        assert "anti-concentration" not in failures(model)

    def test_a_descent_that_did_not_arrive(self) -> None:
        model = fit(gaussian(60_000), n_iter=1, lr=1e-6, n_candidates=2)
        assert failures(model) == {"stationarity"}

    def test_too_few_samples(self) -> None:
        model = fit(gaussian(2000))
        assert failures(model) == {"sample size"}
        assert model.report_.only_too_few
        assert not fit(np.random.default_rng(0).laplace(size=(2000, 5))).report_.only_too_few
        assert not fit(gaussian()).report_.only_too_few

    @pytest.mark.parametrize("noise", ["massart", "agnostic"])
    def test_too_few_samples_are_told_of_with_what_would_be_enough(self, noise: Any) -> None:
        options: dict[str, Any] = {"noise": noise, "n_iter": 20, "n_candidates": 2}
        X = gaussian(2000)
        report = fit(X, **options).report_
        with pytest.raises(RejectedError, match=r"too few samples to tell.*[\d,]+ samples are enough, or these with"):
            fit(X, **options).predict(X)
        assert "too few samples to tell" in str(report)
        assert 0.1 < report.least_epsilon < 1

        def suffices(n: int, epsilon: float) -> bool:
            return "sample size" not in failures(fit(gaussian(n), epsilon=epsilon, **options))

        assert suffices(report.enough_samples, 0.1)
        assert not suffices(report.enough_samples - 2, 0.1)
        assert suffices(2000, report.least_epsilon)
        assert not suffices(2000, report.least_epsilon - 0.02)
        hopeless = fit(gaussian(60), **options).report_
        assert hopeless.least_epsilon == math.inf
        assert "samples are enough" in hopeless.remedy
        assert "epsilon" not in hopeless.remedy


class TestThresholds:
    def test_sink_to_the_tolerance(self) -> None:
        few, many = (fit(gaussian(n), n_iter=5, n_candidates=3).report_ for n in (8_000, 128_000))
        thresholds = {test.name: test.threshold for test in few.tests}
        for test in many.tests:
            if test.name.startswith(("moments of degree 1", "anti-concentration")):
                assert 0.2 < (test.threshold - 0.1) / (thresholds[test.name] - 0.1) <= 0.26

    def test_grow_with_the_number_of_comparisons_and_with_confidence(self) -> None:
        X = gaussian(4000)

        def least(**options: Any) -> float:
            return fit(X, n_iter=50, **options).report_.tests[0].threshold

        assert least(n_candidates=1) < least(n_candidates=50)
        assert least(delta=0.2) < least(delta=0.001)
        assert least(tolerance=0.2) == pytest.approx(least(tolerance=0.1) + 0.1)

    def test_sigma_follows_the_noise_rate(self) -> None:
        """Fewer samples say less about noisier labels: sigma = epsilon (1 - 2 eta) / (1 - eta)."""
        X = gaussian(2000)
        assert fit(X, noise_rate=0.0, n_iter=5).sigma_ == pytest.approx(0.1)
        assert fit(X, noise_rate=0.25, n_iter=5).sigma_ == pytest.approx(0.1 * 0.5 / 0.75)


class TestOnReject:
    def test_raise_warn_and_ignore(self) -> None:
        X = np.random.default_rng(0).laplace(size=(3000, 5))
        y = noisy(X)
        model = fit(X, y, n_iter=50)
        assert not model.accepted_
        for ask in (model.predict, model.decision_function):
            with pytest.raises(RejectedError, match=r"moments of degree 2 \(1\.\d+ > "):
                ask(X)
        with pytest.warns(RejectionWarning, match="moments of degree 2"):
            warned = fit(X, y, n_iter=50, on_reject="warn")
        np.testing.assert_array_equal(warned.predict(X), fit(X, y, n_iter=50, on_reject="ignore").predict(X))

    def test_report_reads(self) -> None:
        X = np.random.default_rng(0).laplace(size=(3000, 5))
        report = fit(X, n_iter=50).report_
        lines = str(report).splitlines()
        assert len(lines) == 1 + len(report.tests)
        assert sum("FAILED" in line for line in lines) == len(report.failed) > 0
        assert all(test.passed == (test.statistic <= test.threshold) for test in report.tests)
        assert pickle.loads(pickle.dumps(report)) == report

    def test_a_nan_statistic_would_not_pass(self) -> None:
        from trimtab.solvers import CertificateTest

        assert not CertificateTest("any", math.nan, 1.0).passed


class TestConventions:
    @pytest.mark.parametrize("noise", ["massart", "agnostic"])
    def test_scikit_learns_checks_where_rejection_is_ignored(self, noise: Any) -> None:
        quick = HalfspaceTesterLearner(noise=noise, on_reject="ignore", n_iter=80, n_candidates=3, degree=2)
        check_estimator(quick, on_skip=None)

    def test_by_default_scikit_learns_checks_fail_by_rejection_alone(self) -> None:
        """Their data are few and not Gaussian, so refusing to predict is what is asked of it."""
        checks = check_estimator(HalfspaceTesterLearner(n_iter=20, n_candidates=2), on_skip=None, on_fail=None)
        failed = [check["exception"] for check in checks if check["status"] == "failed"]
        assert failed
        assert all(isinstance(error, RejectedError) for error in failed)

    @pytest.mark.parametrize("labels", [(0, 1), (-1, 1), ("no", "yes"), (False, True)])
    def test_any_two_labels(self, labels: tuple[Any, Any]) -> None:
        X = gaussian(3000)
        y = np.where(noisy(X) > 0, labels[1], labels[0])
        model = fit(X, y, n_iter=100, on_reject="ignore")
        np.testing.assert_array_equal(model.predict(X) == labels[1], X @ model.coef_[0] > 0)
        assert angle(model.coef_[0]) < 0.3

    def test_one_feature(self) -> None:
        x = np.random.default_rng(0).normal(size=(10_000, 1))
        model = fit(x, np.where(x[:, 0] > 0, -1, 1))
        assert model.accepted_
        np.testing.assert_array_equal(model.coef_, [[-1.0]])
        assert model.error_ == 0

    @pytest.mark.parametrize(
        "name, bad",
        [
            ("epsilon", 0.0),
            ("epsilon", 1.5),
            ("epsilon", math.nan),
            ("delta", 0.0),
            ("delta", 1.0),
            ("noise", "tsybakov"),
            ("noise_rate", 0.5),
            ("noise_rate", -0.1),
            ("degree", 1),
            ("tolerance", -0.1),
            ("tolerance", 0.6),
            ("lr", 0.0),
            ("n_iter", 0),
            ("batch_size", 0),
            ("n_candidates", 0),
            ("on_reject", "sulk"),
        ],
    )
    def test_arguments_out_of_range_are_named(self, name: str, bad: Any) -> None:
        X = gaussian(50)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            clone(HalfspaceTesterLearner()).set_params(**{name: bad}).fit(X, noisy(X))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_functions_look_at_their_values(self, bad: float) -> None:
        X, y, w = gaussian(10), np.ones(10), W.copy()
        X[3, 2] = w[1] = y[4] = bad
        good, batches = gaussian(10), np.zeros((2, 3), dtype=np.int64)
        for call in (
            lambda: smoothed_error(W, X, np.ones(10), 0.1),
            lambda: halfspace_iterates(X, np.ones(10), 0.1, start=W, batches=batches),
            lambda: disagreement_bound(W, X, 0.2, 0.1),
            lambda: moment_gaps(X, 2, 10.0),
        ):
            with pytest.raises(ValueError, match="^X must be finite"):
                call()
        with pytest.raises(ValueError, match="^w must be finite"):
            disagreement_bound(w, good, 0.2, 0.1)
        with pytest.raises(ValueError, match="^y must be finite"):
            smoothed_error(W, good, y, 0.1)
        with pytest.raises(ValueError, match="^log_term must be"):
            moment_gaps(good, 2, bad)

    def test_a_refused_fit_changes_nothing(self) -> None:
        X = gaussian(3000)
        model = fit(X, n_iter=50, on_reject="ignore")
        before = {name: copy.deepcopy(value) for name, value in vars(model).items()}
        for bad_X, bad_y in ((X[:, :2], np.ones(3000)), (X[:, :2] * np.nan, noisy(X)), (X[:, :2], np.arange(3000))):
            with pytest.raises(ValueError):
                model.fit(bad_X, bad_y)
            for name, value in before.items():
                np.testing.assert_array_equal(getattr(model, name), value)
        model.predict(X)

    def test_functions_name_what_is_wrong(self) -> None:
        X, y = gaussian(10), np.ones(10)
        batches = np.zeros((2, 3), dtype=np.int64)
        with pytest.raises(ValueError, match="w must be 5 weights, one for each column of X, got 4"):
            smoothed_error(W[:4], X, y, 0.1)
        with pytest.raises(ValueError, match="y must be labels -1 and 1"):
            smoothed_error(W, X, 2 * y, 0.1)
        with pytest.raises(ValueError, match="sigma must be"):
            smoothed_error(W, X, y, 0.0)
        with pytest.raises(ValueError, match="w must be finite and not zero"):
            smoothed_error(0 * W, X, y, 0.1)
        with pytest.raises(ValueError, match="lr must be"):
            halfspace_iterates(X, y, 0.1, start=W, batches=batches, lr=-1)
        with pytest.raises(ValueError, match="batches must be of shape"):
            halfspace_iterates(X, y, 0.1, start=W, batches=batches[:, :0])
        with pytest.raises(ValueError, match=r"batches must be in \[0, 10\), got 10"):
            halfspace_iterates(X, y, 0.1, start=W, batches=batches + 10)
        with pytest.raises(ValueError, match="y must be 10 labels, one for each row of X, got 3"):
            halfspace_iterates(X, y[:3], 0.1, start=W, batches=batches)
        with pytest.raises(ValueError, match="w must be 5 weights"):
            disagreement_bound(W[:2], X, 0.1, 0.1)
        with pytest.raises(ValueError, match="angle must be"):
            disagreement_bound(W, X, math.pi / 2, 0.1)
        with pytest.raises(ValueError, match="width must be"):
            disagreement_bound(W, X, 0.1, 0.0)
