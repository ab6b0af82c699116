"""Comp-sum losses: the family, its minimal risk, the consistency bound, and the smooth adversarial version."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.losses import (
    CompSumLoss,
    SmoothAdversarialCompSumLoss,
    comp_sum_loss,
    comp_sum_min_risk,
    h_consistency_bound,
    h_consistency_transform,
)

TAUS = [0.0, 0.5, 0.9, 1.0, 1.3, 1.5, 2.0, 2.5]


def batch(seed: int = 0, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(8, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (8,), generator=generator)


class TestCompSumLoss:
    @pytest.mark.parametrize(
        ("tau", "of_probability"),
        [
            (0.0, lambda p: 1 / p - 1),
            (0.5, lambda p: 2 * (p**-0.5 - 1)),
            (1.0, lambda p: -p.log()),
            (1.7, lambda p: (1 - p**0.7) / 0.7),
            (2.0, lambda p: 1 - p),
            (3.0, lambda p: (1 - p**2) / 2),
        ],
    )
    def test_members_in_terms_of_the_softmax_probability(self, tau, of_probability):
        logits, targets = batch()
        p = logits.softmax(1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(comp_sum_loss(logits, targets, tau, "none"), of_probability(p))

    @pytest.mark.parametrize("tau", [0.0, 0.4, 1.6])
    def test_is_the_function_of_the_sum_of_exponentials(self, tau):
        logits, targets = batch(1)
        u = (logits - logits.gather(1, targets[:, None])).exp().sum(1) - 1
        torch.testing.assert_close(comp_sum_loss(logits, targets, tau, "none"), ((1 + u) ** (1 - tau) - 1) / (1 - tau))

    def test_tau_one_is_cross_entropy(self):
        logits, targets = batch()
        for reduction in ("none", "mean", "sum"):
            torch.testing.assert_close(
                CompSumLoss(1.0, reduction)(logits, targets), F.cross_entropy(logits, targets, reduction=reduction)
            )

    @pytest.mark.parametrize("side", [-1e-5, 1e-5])
    def test_is_continuous_at_tau_one(self, side):
        logits, targets = batch()
        torch.testing.assert_close(
            comp_sum_loss(logits, targets, 1 + side), F.cross_entropy(logits, targets), rtol=0, atol=1e-4
        )

    def test_decreases_with_tau(self):
        logits, targets = batch()
        values = torch.stack([comp_sum_loss(logits, targets, tau, "none") for tau in TAUS])
        assert (values.diff(dim=0) < 0).all()

    @pytest.mark.parametrize("tau", TAUS)
    def test_reductions(self, tau):
        logits, targets = batch()
        each = CompSumLoss(tau, "none")(logits, targets)
        torch.testing.assert_close(CompSumLoss(tau)(logits, targets), each.mean())
        torch.testing.assert_close(CompSumLoss(tau, "sum")(logits, targets), each.sum())

    @pytest.mark.parametrize("tau", TAUS)
    @pytest.mark.parametrize("size", [80.0, 1e4])
    def test_confident_mistakes_keep_a_finite_gradient_of_the_right_sign(self, tau, size):
        logits = torch.tensor([[-size, size, 0.0]], requires_grad=True)
        value = comp_sum_loss(logits, torch.tensor([0]), tau)
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert gradient.isfinite().all()
        if tau <= 1:
            assert gradient[0, 0] < 0 < gradient[0, 1]
            assert (gradient.norm() ** 2).isfinite()

    def test_tangent_joins_without_a_step(self):
        score = torch.linspace(-40.01, -39.99, 21, dtype=torch.float64, requires_grad=True)
        logits = torch.stack([score, torch.zeros_like(score)], dim=1)
        value = comp_sum_loss(logits, torch.zeros(21, dtype=torch.int64), 0.0, "none")
        (slope,) = torch.autograd.grad(value.sum(), score)
        torch.testing.assert_close(value.detach(), (-score.detach()).exp(), rtol=1e-4, atol=0)
        torch.testing.assert_close(slope, -(-score.detach()).exp(), rtol=2e-2, atol=0)

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            ("tau", lambda: CompSumLoss(-0.1)),
            ("tau", lambda: CompSumLoss(math.nan)),
            ("reduction", lambda: CompSumLoss(1.0, "total")),
            ("tau", lambda: comp_sum_loss(*batch(), tau=-1.0)),
            ("reduction", lambda: comp_sum_loss(*batch(), reduction="total")),
        ],
    )
    def test_bad_arguments_are_named(self, name, make):
        with pytest.raises(ValueError, match=name):
            make()


class TestMinRisk:
    @pytest.mark.parametrize("tau", TAUS)
    def test_equals_the_minimum_over_a_grid_of_scores(self, tau):
        steps = 120
        i, j = torch.meshgrid(torch.arange(steps + 1), torch.arange(steps + 1), indexing="ij")
        i, j = i[i + j <= steps], j[i + j <= steps]
        p = torch.stack([i, j, steps - i - j], dim=1).double() / steps
        scores = p.clamp(min=1e-12).log()
        each = torch.stack([comp_sum_loss(scores, torch.full((len(p),), k), tau, "none") for k in range(3)], dim=1)
        for q in ([0.6, 0.3, 0.1], [0.34, 0.33, 0.33], [0.5, 0.5, 0.0], [0.9, 0.05, 0.05]):
            labels = torch.tensor(q, dtype=torch.float64)
            smallest, bound = (each @ labels).min(), comp_sum_min_risk(labels, tau)
            assert bound - 1e-9 <= smallest <= bound + 4e-3

    @pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
    def test_the_minimiser_is_a_power_of_the_labels(self, tau):
        q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
        scores = q.log() / (2 - tau)
        risk = sum(q[:, k] * comp_sum_loss(scores, torch.tensor([k]), tau, "none") for k in range(3))
        torch.testing.assert_close(risk, comp_sum_min_risk(q, tau))

    def test_certain_labels_cost_nothing(self):
        for tau in TAUS:
            assert comp_sum_min_risk(torch.tensor([1.0, 0.0, 0.0]), tau).item() == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize(
        ("name", "q", "tau"),
        [
            ("tau", torch.tensor([0.5, 0.5]), -1.0),
            ("probs", torch.tensor([0.5, 0.6]), 1.0),
            ("probs", torch.tensor([1.5, -0.5]), 1.0),
            ("probs", torch.tensor([math.nan, 0.5]), 1.0),
            ("probs", torch.tensor(1.0), 1.0),
        ],
    )
    def test_bad_arguments_are_named(self, name, q, tau):
        with pytest.raises(ValueError, match=name):
            comp_sum_min_risk(q, tau)


class TestConsistencyBound:
    def test_closed_forms(self):
        beta = torch.linspace(0, 1, 11, dtype=torch.float64)
        torch.testing.assert_close(h_consistency_transform(beta, 0.0, 7), 1 - (1 - beta**2).sqrt())
        torch.testing.assert_close(h_consistency_transform(beta, 2.0, 7), beta / 7)
        torch.testing.assert_close(h_consistency_transform(beta, 3.0, 7), beta / 98)
        inner = beta[1:-1]
        entropy = ((1 + inner) * (1 + inner).log() + (1 - inner) * (1 - inner).log()) / 2
        torch.testing.assert_close(h_consistency_transform(inner, 1.0, 7), entropy)

    @pytest.mark.parametrize("tau", [1.0, 2.0])
    def test_is_continuous_in_tau_from_below(self, tau):
        beta = torch.linspace(0, 0.99, 12, dtype=torch.float64)
        near = h_consistency_transform(beta, tau - 1e-5, 4)
        torch.testing.assert_close(near, h_consistency_transform(beta, tau, 4), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("tau", TAUS)
    def test_bound_inverts_the_transform(self, tau):
        beta = torch.linspace(0.01, 1, 25, dtype=torch.float64)
        torch.testing.assert_close(h_consistency_bound(h_consistency_transform(beta, tau, 6), tau, 6), beta)
        assert h_consistency_bound(1e9, tau, 6) == 1
        assert h_consistency_bound(0.0, tau, 6) < 1e-7

    @pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    def test_bound_lies_below_its_published_simplification(self, tau):
        t = torch.linspace(0, 0.05, 20, dtype=torch.float64)
        n = 5
        if tau < 1:
            upper = (2**tau * (2 - tau) * t).sqrt()
        elif tau < 2:
            upper = (2 * n ** (tau - 1) * t).sqrt()
        else:
            upper = (tau - 1) * n ** (tau - 1) * t
        assert (h_consistency_bound(t, tau, n) <= upper.clamp(max=1) + 1e-7).all()

    @staticmethod
    def ratio(q, tau, taken=1):
        """The transform at the zero-one excess of taking a label, over the least comp-sum excess of doing so.

        The probabilities `q` fall. The best scores that put the label taken on top are those of the distribution in
        which it shares evenly with the first ones, as many as would stand above it otherwise.
        """
        for count in range(1, taken + 1):
            level = float(q[:count].sum() + q[taken]) / (count + 1)
            if count == taken or level >= q[count]:
                break
        shared = q.clone()
        shared[:count] = shared[taken] = level
        excess = comp_sum_min_risk(shared, tau) - comp_sum_min_risk(q, tau)
        return (h_consistency_transform(q[0] - q[taken], tau, len(q)) / excess).item()

    @pytest.mark.parametrize(("classes", "reached"), [(3, 0.816), (10, 0.447), (100, 0.141)])
    def test_is_loose_between_one_and_two_by_what_the_docstring_says(self, classes, reached):
        for first in (0.55, 0.75, 0.95):
            q = torch.zeros(classes, dtype=torch.float64)
            q[0], q[1] = first, 1 - first
            assert self.ratio(q, 1.5) == pytest.approx(reached, abs=1e-3)
            assert self.ratio(q, 1.0) == pytest.approx(1.0)
        drawn = torch.tensor(np.random.default_rng(0).dirichlet([0.3] * classes, 300)).sort(descending=True).values
        ratios = [self.ratio(q, 1.5, taken) for q in drawn for taken in (1, classes - 1) if q[0] - q[taken] > 1e-2]
        assert max(ratios) <= reached + 1e-3

    def test_two_labels_are_not_the_worst_near_two(self):
        """Where three labels take part the transform comes nearer than (2 / n)^(tau - 1)."""
        q = torch.tensor([0.457, 0.386, 0.157], dtype=torch.float64)
        assert self.ratio(q, 1.8, taken=2) == pytest.approx(0.775, abs=1e-3)
        assert self.ratio(q, 1.8, taken=2) > (2 / 3) ** 0.8

    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 100_000),
        tau=st.floats(0, 3),
        classes=st.integers(2, 12),
        sharpness=st.floats(0.1, 4.0),
    )
    def test_holds_for_random_labels_and_scores(self, seed, tau, classes, sharpness):
        generator = torch.Generator().manual_seed(seed)
        q = (sharpness * torch.randn(64, classes, generator=generator, dtype=torch.float64)).softmax(1)
        scores = sharpness * torch.randn(64, classes, generator=generator, dtype=torch.float64)
        labels = torch.arange(classes).repeat(64)
        each = comp_sum_loss(scores.repeat_interleave(classes, 0), labels, tau, "none").view(64, classes)
        excess = (q * each).sum(1) - comp_sum_min_risk(q, tau)
        wrong = q.amax(1) - q.gather(1, scores.argmax(1, keepdim=True))[:, 0]
        assert (excess >= -1e-9).all()
        assert (h_consistency_transform(wrong, tau, classes) <= excess + 1e-9).all()

    @pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
    def test_is_reached_by_two_labels_and_equal_scores(self, tau):
        q = torch.tensor([0.8, 0.2, 0.0, 0.0], dtype=torch.float64)
        scores = torch.tensor([[0.0, 0.0, -70.0, -70.0]], dtype=torch.float64)
        risk = sum(q[k] * comp_sum_loss(scores, torch.tensor([k]), tau, "none") for k in range(2))
        excess = risk.item() - comp_sum_min_risk(q, tau).item()
        assert excess == pytest.approx(h_consistency_transform(0.6, tau, 4).item())

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("beta", lambda: h_consistency_transform(1.1, 1.0, 3)),
            ("beta", lambda: h_consistency_transform(math.nan, 1.0, 3)),
            ("tau", lambda: h_consistency_transform(0.5, -1.0, 3)),
            ("num_classes", lambda: h_consistency_transform(0.5, 1.0, 1)),
            ("excess", lambda: h_consistency_bound(-0.1, 1.0, 3)),
            ("num_classes", lambda: h_consistency_bound(0.1, 1.0, 1)),
        ],
    )
    def test_bad_arguments_are_named(self, name, call):
        with pytest.raises(ValueError, match=name):
            call()


class TestSmoothAdversarial:
    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(10, 6, generator=generator, dtype=torch.float64)
        return x, torch.randint(4, (10,), generator=generator)

    def test_without_a_ball_it_is_the_comp_sum_loss(self):
        model, (x, y) = self.model(), self.inputs()
        for tau in (0.5, 1.0, 1.7):
            loss = SmoothAdversarialCompSumLoss(tau, rho=2.0, eps=0.0)
            torch.testing.assert_close(loss(model, x, y), comp_sum_loss(model(x) / 2, y, tau))

    @pytest.mark.parametrize("norm", ["inf", "l2"])
    def test_linear_model_reaches_the_exact_maximum(self, norm):
        # For a linear model with one feature the margins move by |w_y - w_k| * eps.
        weight = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
        x, y = torch.zeros(3, 1, dtype=torch.float64), torch.tensor([0, 1, 2])
        loss = SmoothAdversarialCompSumLoss(nu=3.0, eps=0.2, norm=norm, reduction="none")
        drift = 0.2 * (weight[y] - weight.T).norm(dim=1)
        torch.testing.assert_close(loss(lambda x: x @ weight.T, x, y), math.log(3) + 3 * drift)

    def test_l2_maximum_of_a_linear_model_is_the_spectral_norm(self):
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        x, y = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1])
        loss = SmoothAdversarialCompSumLoss(eps=0.3, norm="l2", steps=200, step_size=0.05)
        expected = 0.3 * torch.linalg.matrix_norm(weight[1] - weight, ord=2)
        assert (loss(lambda x: x @ weight.T, x, y) - math.log(3)).item() == pytest.approx(expected.item(), rel=1e-3)

    def test_bounds_the_adversarial_margin_loss(self):
        """With nu = sqrt(n - 1) / rho it is above Phi_tau(sum_k ramp(D_k(x') / rho)) at every x' of the ball."""
        model, (x, y) = self.model(), self.inputs()
        model[2].weight.data *= 4
        eps, rho = 0.3, 0.7
        generator = torch.Generator().manual_seed(0)
        for tau in (0.0, 0.5, 1.0, 1.5):
            loss = SmoothAdversarialCompSumLoss(tau, rho, math.sqrt(3) / rho, eps, steps=40, reduction="none")
            value = loss(model, x, y)
            for _ in range(200):
                moved = x + eps * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)
                logits = model(moved)
                ramp = (1 - (logits.gather(1, y[:, None]) - logits) / rho).clamp(0, 1)
                u = ramp.sum(1) - 1  # the target's own ramp is 1
                margin_loss = (1 + u).log() if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
                assert (margin_loss <= value + 1e-9).all()

    def test_the_smooth_term_is_not_negative_and_grows_with_the_ball(self):
        model, (x, y) = self.model(), self.inputs()
        values = [SmoothAdversarialCompSumLoss(eps=eps)(model, x, y).item() for eps in (0.0, 0.05, 0.1, 0.2)]
        assert values == sorted(values)
        assert values[0] < values[1]

    def test_gradient_flows_through_both_passes(self):
        """The gradient is that of the formula at the attacked input, held fixed."""
        from trimtab.ops.attack import pgd

        model, (x, y) = self.model(), self.inputs()
        start = 0.05 * torch.ones_like(x)

        def drift(moved: Tensor) -> Tensor:
            rows = torch.arange(len(y))
            gap = [z[rows, y][:, None] - z for z in (model(moved), model(x))]
            return (gap[0] - gap[1]).norm(dim=1)

        attacked = pgd(drift, x, 0.1, steps=5, start=start)
        expected = torch.autograd.grad(
            F.cross_entropy(model(x), y) + 2 * drift(attacked).mean(), list(model.parameters())
        )
        loss = SmoothAdversarialCompSumLoss(nu=2.0, eps=0.1, steps=5)
        actual = torch.autograd.grad(loss(model, x, y, start=start), list(model.parameters()))
        torch.testing.assert_close(actual, expected)

    def test_constant_model_has_no_nan(self):
        model = self.model()
        nn.init.zeros_(model[2].weight)
        loss = SmoothAdversarialCompSumLoss(eps=0.1)
        loss(model, *self.inputs()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_attack_leaves_gradients_and_modes_alone(self):
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
        model[0].eval()
        x, y = self.inputs()
        loss = SmoothAdversarialCompSumLoss(eps=0.1, steps=7)
        loss(model, x, y)
        assert all(p.grad is None for p in model.parameters())
        assert [module.training for module in model] == [False, True, True]
        # The two passes that gradients flow through, and none of the attack's.
        assert model[1].num_batches_tracked == 2

    def test_bounds_hold_the_attack_within_the_image(self):
        seen = []

        def model(x: Tensor) -> Tensor:
            seen.append(x.detach())
            return torch.cat([x, -x], dim=1)

        loss = SmoothAdversarialCompSumLoss(eps=0.5, bounds=(0.0, 1.0))
        loss(model, torch.tensor([[0.1, 0.9]]), torch.tensor([0]))
        assert min(x.min() for x in seen) >= 0
        assert max(x.max() for x in seen) <= 1

    def test_generator_decides_the_start(self):
        model, (x, y) = self.model(), self.inputs()
        torch.manual_seed(0)
        state = torch.get_rng_state()
        values = [
            SmoothAdversarialCompSumLoss(eps=0.5, steps=1, generator=torch.Generator().manual_seed(5))(model, x, y)
            for _ in range(2)
        ]
        assert values[0] == values[1]
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("tau", {"tau": -1.0}),
            ("rho", {"rho": 0.0}),
            ("nu", {"nu": -1.0}),
            ("eps", {"eps": -0.1}),
            ("norm", {"norm": "l1"}),
            ("steps", {"steps": 0}),
            ("step_size", {"step_size": 0.0}),
            ("bounds", {"bounds": (1.0, 0.0)}),
            ("reduction", {"reduction": "total"}),
        ],
    )
    def test_bad_arguments_are_named(self, name, options):
        with pytest.raises(ValueError, match=name):
            SmoothAdversarialCompSumLoss(**options)
