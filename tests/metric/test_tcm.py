"""Threshold-consistent margins: closed forms, parity with pytorch-metric-learning, and OPIS against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.metric import ThresholdConsistentMarginLoss, opis, pair_masks, utility_curves, utility_variance


def clustered(
    seed: int, samples: int = 24, dim: int = 6, classes: int = 4, spread: float = 0.8
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=generator)
    return centres[labels] + spread * torch.randn(samples, dim, generator=generator, dtype=torch.float64), labels


def on_circle(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angle.cos(), angle.sin()], dim=1)


class TestLoss:
    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        samples=st.integers(2, 20),
        spread=st.floats(0.0, 2.0),
        margins=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
        weights=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    )
    def test_equals_pytorch_metric_learning(self, seed, samples, spread, margins, weights):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        embeddings, labels = clustered(seed, samples, spread=spread)
        low, high = sorted(margins)
        theirs = losses.ThresholdConsistentMarginLoss(*weights, margin_plus=high, margin_minus=low)
        ours = ThresholdConsistentMarginLoss(high, low, *weights)
        assert ours(embeddings, labels).item() == pytest.approx(float(theirs(embeddings, labels)), abs=1e-6)

    def test_gradient_equals_pytorch_metric_learning(self):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        embeddings, labels = clustered(3)
        gradients = []
        for loss in (losses.ThresholdConsistentMarginLoss(), ThresholdConsistentMarginLoss()):
            leaf = embeddings.clone().requires_grad_()
            loss(leaf, labels).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)

    def test_only_violating_pairs_are_averaged(self):
        # Cosines: positive pair (0, 1) has cos 60 = 0.5; negatives (0, 2) cos 90 = 0 and (1, 2) cos 30.
        loss = ThresholdConsistentMarginLoss(weight_pos=2.0, weight_neg=3.0)
        value = loss(on_circle(0, 60, 90), torch.tensor([0, 0, 1]))
        expected = 2 * (0.9 - 0.5) + 3 * (math.cos(math.pi / 6) - 0.5)
        assert value.item() == pytest.approx(expected, abs=1e-12)

    def test_collapsed_embedding_pays_the_negative_margin(self):
        value = ThresholdConsistentMarginLoss()(torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2]))
        assert value.item() == pytest.approx(0.5, abs=1e-6)

    def test_orthogonal_classes_of_identical_members_pay_nothing(self):
        embeddings = torch.eye(3).repeat_interleave(2, 0).requires_grad_()
        value = ThresholdConsistentMarginLoss()(embeddings, torch.tensor([0, 0, 1, 1, 2, 2]))
        value.backward()
        assert value.item() == 0
        assert embeddings.grad.abs().max() == 0

    def test_a_sample_is_no_pair_of_itself(self):
        embeddings = torch.randn(1, 4, requires_grad=True)
        value = ThresholdConsistentMarginLoss(margin_pos=1.0)(embeddings, torch.tensor([7]))
        value.backward()
        assert value.item() == 0

    def test_easy_pairs_have_no_gradient(self):
        # The third and fourth sample form an easy positive pair, far from the others.
        embeddings = on_circle(0, 60, 180, 181).requires_grad_()
        ThresholdConsistentMarginLoss()(embeddings, torch.tensor([0, 0, 1, 1])).backward()
        assert embeddings.grad[:2].norm(dim=1).min() > 0.1
        assert embeddings.grad[2:].abs().max() == 0

    def test_gradient_pulls_positives_and_pushes_negatives(self):
        for labels, wanted in (([0, 0], 1), ([0, 1], -1)):
            embeddings = on_circle(0, 40).requires_grad_()
            ThresholdConsistentMarginLoss()(embeddings, torch.tensor(labels)).backward()
            stepped = embeddings.detach() - 0.1 * embeddings.grad
            cosine = torch.cosine_similarity(stepped[:1], stepped[1:]).item()
            assert math.copysign(1, cosine - math.cos(math.radians(40))) == wanted

    def test_scale_of_each_embedding_does_not_matter(self):
        embeddings, labels = clustered(5)
        scaled = embeddings * torch.rand(len(labels), 1, dtype=torch.float64).add(0.1)
        loss = ThresholdConsistentMarginLoss()
        torch.testing.assert_close(loss(embeddings, labels), loss(scaled, labels))

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("margin_pos", {"margin_pos": 1.2}),
            ("margin_neg", {"margin_neg": -1.2}),
            ("margin_neg", {"margin_pos": 0.3, "margin_neg": 0.5}),
            ("weight_pos", {"weight_pos": -1.0}),
            ("weight_neg", {"weight_neg": math.nan}),
        ],
    )
    def test_bad_constructor_arguments_are_named(self, name, options):
        with pytest.raises(ValueError, match=name):
            ThresholdConsistentMarginLoss(**options)

    @pytest.mark.parametrize(
        ("name", "error", "embeddings", "labels"),
        [
            ("embeddings", TypeError, torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)),
            ("labels", TypeError, torch.zeros(2, 3), torch.zeros(2)),
            ("embeddings", ValueError, torch.zeros(2), torch.zeros(2, dtype=torch.int64)),
            ("labels", ValueError, torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)),
            ("embeddings", ValueError, torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        ],
    )
    def test_bad_batches_are_named(self, name, error, embeddings, labels):
        with pytest.raises(error, match=name):
            ThresholdConsistentMarginLoss()(embeddings, labels)


def test_pair_masks_leave_out_the_diagonal():
    positive, negative = pair_masks(torch.tensor([2, 5, 2]))
    assert positive.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    assert negative.tolist() == [[False, True, False], [True, False, True], [False, True, False]]


class TestOpis:
    def reference(self, embeddings: Tensor, labels: Tensor, thresholds: Tensor) -> tuple[list, list]:
        """Sensitivity and specificity by looping over pairs, as they are defined."""
        points = embeddings / embeddings.norm(dim=1, keepdim=True)
        sensitivity, specificity = [], []
        for label in labels.unique():
            within = [
                (points[i] - points[j]).norm()
                for i in range(len(labels))
                for j in range(i)
                if labels[i] == labels[j] == label
            ]
            across = [
                (points[i] - points[j]).norm()
                for i in range(len(labels))
                for j in range(len(labels))
                if labels[i] == label != labels[j]
            ]
            sensitivity.append([sum(d <= t for d in within) / len(within) for t in thresholds])
            specificity.append([sum(d > t for d in across) / len(across) for t in thresholds])
        return sensitivity, specificity

    def test_curves_equal_the_definition(self):
        embeddings, labels = clustered(0, samples=20, classes=3)
        thresholds = torch.linspace(0.2, 1.8, 7, dtype=torch.float64)
        curves = utility_curves(embeddings, labels, thresholds)
        sensitivity, specificity = self.reference(embeddings, labels, thresholds)
        torch.testing.assert_close(curves.sensitivity, torch.tensor(sensitivity, dtype=torch.float64))
        torch.testing.assert_close(curves.specificity, torch.tensor(specificity, dtype=torch.float64))

    def test_thresholds_span_the_false_accept_rates(self):
        embeddings, labels = clustered(1, samples=60)
        thresholds = utility_curves(embeddings, labels, far=(0.05, 0.3), num_thresholds=11).thresholds
        points = embeddings / embeddings.norm(dim=1, keepdim=True)
        negative = torch.pdist(points)[torch.pdist(labels[:, None].double()) > 0]
        rates = [(negative <= t + 1e-12).double().mean().item() for t in (thresholds[0], thresholds[-1])]
        assert rates == pytest.approx([0.05, 0.3], abs=2 / len(negative))
        torch.testing.assert_close(thresholds.diff(), thresholds.diff()[:1].expand(10))

    def test_utility_is_the_harmonic_mean_and_zero_at_zero(self):
        # Class 0 has one pair at 60 degrees, class 1 one of antipodes.
        curves = utility_curves(on_circle(0, 60, 90, 270), torch.tensor([0, 0, 1, 1]), torch.tensor([0.1, 1.2]))
        # At distance 1.2 class 0's pair (1.0) is accepted, and of its four negatives one (30 degrees) is.
        assert curves.utility[0].tolist() == pytest.approx([0.0, 2 * 0.75 / 1.75])
        assert curves.utility[1].tolist() == [0.0, 0.0]

    def test_classes_of_the_same_geometry_are_consistent(self):
        # Three copies of one class, turned by 120 degrees.
        degrees = [turn + offset for turn in (0, 120, 240) for offset in (-20, 0, 15, 40)]
        labels = torch.arange(3).repeat_interleave(4)
        # Thresholds away from any distance, which rounding could put on either side.
        utility = utility_curves(on_circle(*degrees), labels, torch.linspace(0.21, 1.69, 9)).utility
        assert utility.std(dim=1).min() > 0.05
        assert utility_variance(utility) == pytest.approx(0, abs=1e-12)

    def test_one_loose_class_is_inconsistent(self):
        # Two tight classes with utility 1 and one whose members are as far apart as classes are, with utility 0.
        degrees = [-2, 0, 2, 118, 120, 122, 180, 240, 300]
        curves = utility_curves(on_circle(*degrees), torch.arange(3).repeat_interleave(3), torch.linspace(0.3, 0.9, 5))
        assert utility_variance(curves.utility) == pytest.approx(2 / 9)

    def test_collapsed_embedding_is_defined(self):
        assert opis(torch.ones(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])) == 0

    def test_scale_and_rotation_do_not_matter(self):
        embeddings, labels = clustered(2, samples=50)
        rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        assert opis(3 * embeddings @ rotation, labels) == pytest.approx(opis(embeddings, labels), abs=1e-4)

    def test_variance_of_constant_curves(self):
        curves = torch.tensor([[1.0] * 5, [0.0] * 5])
        assert utility_variance(curves) == pytest.approx(0.25)
        assert utility_variance(curves, worst=0.5) == pytest.approx(0.25)
        three = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.25, 0.25]])
        assert utility_variance(three) == pytest.approx((2 * 0.25**2 + 0.5**2) / 3)
        assert utility_variance(three, worst=0.1) == pytest.approx(0.5**2)

    def test_variance_integrates_by_trapezoids(self):
        # Deviation d / 2 on [0, 1]; its square integrates to 1/12.
        line = torch.linspace(0, 1, 1001, dtype=torch.float64)
        assert utility_variance(torch.stack([line, torch.zeros_like(line)])) == pytest.approx(1 / 12, abs=1e-6)

    def test_lone_samples_are_only_negatives(self):
        embeddings, labels = clustered(4, samples=30)
        labels[0] = 99
        curves = utility_curves(embeddings, labels)
        assert 99 not in curves.classes.tolist()
        assert len(curves.utility) == 4

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("far", lambda e, y: opis(e, y, far=(0.2, 0.1))),
            ("far", lambda e, y: opis(e, y, far=(0.0, 0.1))),
            ("num_thresholds", lambda e, y: opis(e, y, num_thresholds=1)),
            ("worst", lambda e, y: opis(e, y, worst=0.0)),
            ("labels", lambda e, y: opis(e, torch.zeros_like(y))),
            ("labels", lambda e, y: opis(e, torch.arange(len(y)))),
            ("embeddings", lambda e, y: opis(e * math.nan, y)),
            ("utility", lambda e, y: utility_variance(torch.zeros(3))),
        ],
    )
    def test_bad_arguments_are_named(self, name, call):
        embeddings, labels = clustered(0)
        with pytest.raises(ValueError, match=name):
            call(embeddings, labels)


def test_thresholds_out_of_order_are_refused() -> None:
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 2
    with pytest.raises(ValueError, match="thresholds must be in ascending order"):
        utility_curves(embeddings, labels, torch.tensor([1.5, 0.5]))
    assert utility_curves(embeddings, labels, torch.tensor([0.5, 0.5])).utility.isfinite().all()


def test_a_pair_at_the_margin_counts_in_the_mean() -> None:
    """Of six ordered pairs of a class two lie at a margin of 1 and four are off by 1; likewise for negative ones."""
    points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = ThresholdConsistentMarginLoss(margin_pos=1.0, margin_neg=0.0)
    torch.testing.assert_close(loss(points, torch.tensor([0, 0, 0])), torch.tensor(4 / 6))
    torch.testing.assert_close(loss(points, torch.tensor([0, 1, 2])), torch.tensor(2 / 6))
