"""Robust self-supervised training: closed forms of the surrogate, limits, and what unlabelled data are worth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.domain import (
    RSSLinearClassifier,
    RSSLoss,
    excess_bound,
    ramp_surrogate,
    robust_surrogate,
    unlabelled_needed,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logistic(scores: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-y * scores)


class TestRamp:
    def test_is_the_best_move_of_a_zero_one_loss(self):
        margin = torch.linspace(-2, 4, 61, dtype=torch.float64)
        for gamma in (0.3, 1.0, 2.5):
            # Moving along the normal by s costs gamma |s| and leaves the margin at margin - s.
            moves = torch.linspace(0, 6, 6001, dtype=torch.float64)
            value = ((margin[:, None] - moves) <= 1e-9).double() - gamma * moves
            torch.testing.assert_close(ramp_surrogate(margin, gamma), value.amax(1).clamp_min(0), atol=4e-3, rtol=0)

    def test_limits(self):
        margin = drawn(50)
        torch.testing.assert_close(ramp_surrogate(margin, 1e9), (margin < 0).double())
        torch.testing.assert_close(ramp_surrogate(margin, 1e-9), torch.ones(50, dtype=torch.float64))

    def test_falls_with_gamma_and_is_never_below_the_loss(self):
        margin = drawn(50)
        values = [ramp_surrogate(margin, gamma) for gamma in (0.1, 0.5, 2.0, 10.0)]
        assert all((a >= b).all() for a, b in itertools.pairwise(values))
        assert (values[-1] >= (margin < 0).double()).all()

    def test_no_gradient_beyond_its_reach(self):
        margin = torch.tensor([0.5, 1.9, 2.1, -0.5], requires_grad=True)
        ramp_surrogate(margin, 0.5).sum().backward()
        torch.testing.assert_close(margin.grad, torch.tensor([-0.5, -0.5, 0.0, 0.0]))

    def test_refuses_gamma(self):
        for gamma in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match="gamma"):
                ramp_surrogate(torch.zeros(2), gamma)


class TestSurrogate:
    def test_equals_the_search_along_the_normal_for_linear_logistic(self):
        theta, x = drawn(4, seed=1), drawn(6, 4)
        y = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        found = robust_surrogate(logistic, lambda z: z @ theta, x, y, gamma=1.5, steps=300)
        moves = torch.linspace(0, 4, 40_001, dtype=torch.float64)
        margin = (y * (x @ theta))[:, None] - moves * theta.norm()
        torch.testing.assert_close(found, (F.softplus(-margin) - 1.5 * moves**2).amax(1), atol=1e-5, rtol=0)

    def test_no_less_than_the_loss_and_falling_with_gamma(self):
        theta, x, y = drawn(3, seed=1), drawn(8, 3), torch.ones(8, dtype=torch.float64)
        model = lambda z: z @ theta
        plain = logistic(model(x), y)
        values = [robust_surrogate(logistic, model, x, y, gamma) for gamma in (1.0, 2.0, 8.0)]
        assert (values[0] > values[1]).all()
        assert (values[1] > values[2]).all()
        assert (values[2] >= plain).all()
        torch.testing.assert_close(robust_surrogate(logistic, model, x, y, 1e8), plain, atol=1e-6, rtol=0)
        assert torch.equal(robust_surrogate(logistic, model, x, y, 1.0, steps=0), plain)

    def test_gradient_is_the_loss_at_the_worst_point(self):
        theta, x, y = drawn(3, seed=1).requires_grad_(), drawn(5, 3), torch.ones(5, dtype=torch.float64)
        robust_surrogate(logistic, lambda z: z @ theta, x, y, 2.0, steps=400).sum().backward()
        held = theta.detach()
        moved = x.clone()
        for _ in range(400):  # the fixed point of z = x + slope / (2 gamma)
            moved = x - (torch.sigmoid(-(moved @ held)))[:, None] * held / 4
        expected = -(torch.sigmoid(-(moved @ held))[:, None] * moved).sum(0)
        torch.testing.assert_close(theta.grad, expected)

    def test_one_sample_does_not_move_another_and_inputs_stay(self):
        theta, x, y = drawn(3, seed=1), drawn(5, 3), torch.ones(5, dtype=torch.float64)
        kept = x.clone()
        whole = robust_surrogate(logistic, lambda z: z @ theta, x, y, 2.0)
        torch.testing.assert_close(whole[2:3], robust_surrogate(logistic, lambda z: z @ theta, x[2:3], y[2:3], 2.0))
        assert torch.equal(x, kept)

    def test_refusals(self):
        x, y = drawn(5, 3), torch.ones(5, dtype=torch.float64)
        model = lambda z: z.sum(1)
        with pytest.raises(ValueError, match="gamma"):
            robust_surrogate(logistic, model, x, y, 0.0)
        with pytest.raises(ValueError, match="loss must"):
            robust_surrogate(lambda s, t: logistic(s, t).mean(), model, x, y, 1.0)
        with pytest.raises(TypeError, match="x must"):
            robust_surrogate(logistic, model, x.long(), y, 1.0)


class TestLoss:
    def model(self) -> nn.Linear:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Linear(3, 4).double()

    def test_without_weight_and_prices_it_is_cross_entropy(self):
        model, x, y = self.model(), drawn(6, 3), torch.arange(6) % 4
        found = RSSLoss(lam=0.0, gamma=None)(model, x, y, drawn(9, 3, seed=1))
        torch.testing.assert_close(found["total"], F.cross_entropy(model(x), y))
        assert found["unlabelled"] == 0

    def test_without_prices_it_is_self_training(self):
        model, x, y, other = self.model(), drawn(6, 3), torch.arange(6) % 4, drawn(9, 3, seed=1)
        found = RSSLoss(lam=0.7, gamma=None, gamma_unlabelled=None)(model, x, y, other)
        own = F.cross_entropy(model(other), model(other).argmax(1))
        torch.testing.assert_close(found["total"], F.cross_entropy(model(x), y) + 0.7 * own)

    def test_is_the_sum_of_robust_parts_under_own_labels(self):
        model, x, y, other = self.model(), drawn(6, 3), torch.arange(6) % 4, drawn(9, 3, seed=1)
        found = RSSLoss(lam=0.7, gamma=2.0, gamma_unlabelled=3.0)(model, x, y, other)
        each = nn.CrossEntropyLoss(reduction="none")
        parts = (
            robust_surrogate(each, model, x, y, 2.0).mean(),
            robust_surrogate(each, model, other, model(other).argmax(1), 3.0).mean(),
        )
        torch.testing.assert_close(found["labelled"], parts[0])
        torch.testing.assert_close(found["unlabelled"], parts[1])
        torch.testing.assert_close(found["total"], parts[0] + 0.7 * parts[1])

    def test_refusals(self):
        model, x = self.model(), drawn(6, 3)
        with pytest.raises(ValueError, match="targets"):
            RSSLoss()(model, x, torch.zeros(5, dtype=torch.int64), x)
        with pytest.raises(ValueError, match="targets"):
            RSSLoss()(model, x[:0], torch.zeros(0, dtype=torch.int64), x)
        for options in ({"lam": -1.0}, {"gamma": 0.0}, {"gamma_unlabelled": -2.0}):
            with pytest.raises(ValueError, match=next(iter(options))):
                RSSLoss(**options)


def gaussians(n: int, mean: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    y = rng.choice([-1, 1], size=n)
    return y[:, None] * mean + rng.normal(size=(n, len(mean))), y


class TestClassifier:
    def test_unlabelled_data_help_also_when_shifted(self):
        rng = np.random.default_rng(0)
        mean = np.full(50, 1.5 / np.sqrt(50))
        shift = rng.normal(size=50)
        X, y = gaussians(20, mean, rng)
        crowd, _ = gaussians(3000, mean + 0.5 * shift / np.linalg.norm(shift), rng)
        test, labels = gaussians(5000, mean, rng)
        alone = RSSLinearClassifier(center=False).fit(X, y).score(test, labels)
        both = RSSLinearClassifier(center=False).fit(X, y, crowd).score(test, labels)
        assert both > alone + 0.05
        assert both > 0.85

    def test_the_crowd_may_be_mirrored(self):
        rng = np.random.default_rng(1)
        mean = np.full(5, 0.8)
        X, y = gaussians(10, mean, rng)
        crowd, _ = gaussians(200, mean, rng)
        flips = rng.choice([-1, 1], size=(200, 1))
        one, other = (RSSLinearClassifier(center=False).fit(X, y, c).coef_ for c in (crowd, flips * crowd))
        np.testing.assert_allclose(one, other, atol=1e-9)

    def test_no_weight_is_no_crowd(self):
        rng = np.random.default_rng(2)
        X, y = gaussians(12, np.ones(4), rng)
        crowd = rng.normal(size=(30, 4))
        np.testing.assert_array_equal(
            RSSLinearClassifier(lam=0.0).fit(X, y, crowd).coef_, RSSLinearClassifier().fit(X, y).coef_
        )

    def test_normal_is_of_length_one_and_origin_does_not_matter(self):
        rng = np.random.default_rng(3)
        X, y = gaussians(20, np.ones(4), rng)
        crowd, _ = gaussians(100, np.ones(4), rng)
        one = RSSLinearClassifier().fit(X, y, crowd)
        assert np.linalg.norm(one.coef_) == pytest.approx(1.0)
        far = RSSLinearClassifier().fit(X + 1e3, y, crowd + 1e3)
        np.testing.assert_allclose(far.coef_, one.coef_, atol=1e-6)
        np.testing.assert_allclose(far.decision_function(X + 1e3), one.decision_function(X), atol=1e-6)

    def test_without_robustness_labels_count_by_the_logistic_loss(self):
        rng = np.random.default_rng(4)
        X, y = gaussians(40, np.ones(2), rng)
        found = RSSLinearClassifier(robust=False, center=False, n_iter=2000, lr=0.01).fit(X, y).coef_[0]
        angles = np.linspace(0, 2 * np.pi, 10_001)
        losses = np.logaddexp(0, -y[:, None] * (X @ np.stack([np.cos(angles), np.sin(angles)]))).mean(0)
        best = angles[losses.argmin()]
        np.testing.assert_allclose(found, [np.cos(best), np.sin(best)], atol=0.01)

    def test_refusals(self):
        X, y = [[0.0, 1.0], [1.0, 0.0]], [0, 1]
        with pytest.raises(ValueError, match="X_unlabelled"):
            RSSLinearClassifier().fit(X, y, [[0.0, 1.0, 2.0]])
        with pytest.raises(ValueError, match="contains"):
            RSSLinearClassifier().fit(X, y, [[0.0, np.nan]])
        for name in ("lam", "gamma", "gamma_unlabelled", "lr"):
            with pytest.raises(ValueError, match=name):
                RSSLinearClassifier(**{name: -1.0}).fit(X, y)


class TestTheory:
    numbers = {"alpha": 0.5, "mean_norm": 1.0, "sigma": 1.0}

    def test_closed_form(self):
        tail = 2 * math.log(20)
        expected = math.exp(-0.25) / math.sqrt(2 * math.sqrt(2 * math.pi))
        expected *= (2 * 2 * 50 * 0.5 / 20 + 4 * 50 / 20 * math.sqrt((100 + tail) / 2020)) ** 0.25
        assert excess_bound(50, 20, 1000, **self.numbers) == pytest.approx(expected + math.sqrt(tail / 20))

    def test_falls_with_samples_and_rises_with_the_shift(self):
        bound = lambda **change: excess_bound(**{"d": 50, "m": 20, "n": 1000, **self.numbers, **change})
        assert bound(n=10_000) < bound() < bound(alpha=1.0)
        assert bound(m=100) < bound() < bound(d=500)

    def test_without_a_shift_and_with_endless_crowds_the_dimension_is_gone(self):
        small, large = (excess_bound(d, 20, 10**15, alpha=0.0, mean_norm=1.0, sigma=1.0) for d in (5, 500))
        assert large - small < 0.03

    def test_needs(self):
        assert unlabelled_needed(200, 10) == (20.0, 0.5)
        with pytest.raises(ValueError, match="delta"):
            excess_bound(5, 5, 5, delta=1.0, **self.numbers)
        with pytest.raises(ValueError, match="alpha"):
            excess_bound(5, 5, 5, **{**self.numbers, "alpha": -1.0})
