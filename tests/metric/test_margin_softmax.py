"""Margin softmax: closed forms, parity with pytorch-metric-learning in value and gradient, the ends of the range."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.metric import CosineClassifier, MarginSoftmaxLoss, arcface_margin, cosface_margin


def batch(seed: int, samples: int = 12, dim: int = 6, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = 3 * torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    return embeddings, weight, torch.randint(classes, (samples,), generator=generator)


def with_weight(loss: MarginSoftmaxLoss, weight: Tensor) -> MarginSoftmaxLoss:
    loss = loss.to(weight.dtype)
    loss.classifier.weight.data = weight.clone()
    return loss


def gradients(loss: MarginSoftmaxLoss, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels)
    return value.detach(), *torch.autograd.grad(value, (leaf, loss.classifier.weight))


class TestParity:
    @settings(max_examples=15, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        margin=st.floats(0.01, 1.5),
        scale=st.floats(1, 64),
        kind=st.sampled_from(["arcface", "cosface"]),
    )
    def test_value_and_gradients_equal_pytorch_metric_learning(self, seed, margin, scale, kind):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        embeddings, weight, labels = batch(seed)
        ours = with_weight(MarginSoftmaxLoss(6, 5, kind=kind, margin=margin, scale=scale), weight)
        value, by_embedding, by_weight = gradients(ours, embeddings, labels)
        if kind == "arcface":
            theirs = losses.ArcFaceLoss(5, 6, margin=math.degrees(margin), scale=scale)
        else:
            theirs = losses.CosFaceLoss(5, 6, margin=margin, scale=scale)
        theirs.W.data = weight.T.clone()
        leaf = embeddings.clone().requires_grad_()
        expected = theirs(leaf, labels)
        expected.backward()
        torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_embedding, leaf.grad, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_weight, theirs.W.grad.T, rtol=1e-6, atol=1e-6)

    def test_no_margin_is_cross_entropy_of_scaled_cosines(self):
        embeddings, weight, labels = batch(1)
        cosine = F.cosine_similarity(embeddings[:, None], weight, dim=2)
        expected = F.cross_entropy(20 * cosine, labels)
        for kind in ("softmax", "cosface", "arcface"):
            loss = with_weight(MarginSoftmaxLoss(6, 5, kind=kind, margin=0.0, scale=20), weight)
            torch.testing.assert_close(loss(embeddings, labels), expected)


class TestMargins:
    def test_only_the_label_moves(self):
        cosine = torch.linspace(-0.9, 0.9, 12, dtype=torch.float64).view(3, 4)
        labels = torch.tensor([3, 0, 2])
        own = torch.zeros(3, 4, dtype=torch.bool)
        own[torch.arange(3), labels] = True
        for margined in (cosface_margin(cosine, labels, 0.2), arcface_margin(cosine, labels, 0.2)):
            torch.testing.assert_close(margined[~own], cosine[~own], rtol=0, atol=0)
        torch.testing.assert_close(cosface_margin(cosine, labels, 0.2)[own], cosine[own] - 0.2)
        torch.testing.assert_close(arcface_margin(cosine, labels, 0.2)[own], (cosine[own].acos() + 0.2).cos())

    def test_narrow_labels_are_taken(self):
        cosine = torch.zeros(2, 3)
        for dtype in (torch.int32, torch.uint8):
            labels = torch.tensor([0, 2], dtype=dtype)
            torch.testing.assert_close(cosface_margin(cosine, labels, 0.5), cosface_margin(cosine, labels.long(), 0.5))

    def test_arcface_falls_all_the_way_round(self):
        theta = torch.linspace(0, math.pi, 200, dtype=torch.float64)
        margined = arcface_margin(theta.cos()[:, None], torch.zeros(200, dtype=torch.int64), 0.5)[:, 0]
        assert (margined.diff() < 0).all()
        beyond = theta > math.pi - 0.5
        torch.testing.assert_close(margined[beyond], theta[beyond].cos() - 0.5 * math.sin(0.5))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("cosine", [1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6])
    def test_ends_of_the_range_are_exact_and_have_a_gradient(self, cosine, dtype):
        leaf = torch.tensor([[cosine, 0.0]], dtype=dtype, requires_grad=True)
        value = arcface_margin(leaf, torch.tensor([0]), 0.5)[0, 0]
        value.backward()
        expected = math.cos(0.5) if cosine > 0 else -1 - 0.5 * math.sin(0.5)
        assert value.item() == pytest.approx(expected, abs=3e-6)
        assert leaf.grad.isfinite().all()

    def test_near_the_class_weight_float32_keeps_the_value(self):
        cosine = torch.tensor([[1 - 6e-8], [1 - 1e-6], [0.999]])
        exact = arcface_margin(cosine.double(), torch.zeros(3, dtype=torch.int64), 0.5)
        torch.testing.assert_close(
            arcface_margin(cosine, torch.zeros(3, dtype=torch.int64), 0.5).double(), exact, rtol=0, atol=1e-6
        )


class TestLoss:
    def test_right_and_wrong_at_the_poles_of_two_classes(self):
        weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        loss = with_weight(MarginSoftmaxLoss(2, 2, kind="cosface", margin=0.35, scale=2.0), weight)
        x = torch.tensor([[5.0, 0.0]])
        # logits 2 (1 - 0.35) and -2 for the right label; 2 and 2 (-1 - 0.35) for the wrong one.
        assert loss(x, torch.tensor([0])).item() == pytest.approx(math.log1p(math.exp(-2 - 1.3)), rel=1e-5)
        assert loss(x, torch.tensor([1])).item() == pytest.approx(math.log1p(math.exp(2 + 2.7)), rel=1e-5)

    @pytest.mark.parametrize("kind", ["softmax", "cosface", "arcface"])
    def test_embeddings_on_their_weights_have_finite_gradients_at_scale_64(self, kind):
        loss = MarginSoftmaxLoss(4, 3, kind=kind)
        for sign in (1, -1):
            value, *both = gradients(loss, sign * loss.classifier.weight.detach(), torch.arange(3))
            assert value.isfinite()
            assert all(gradient.isfinite().all() for gradient in both)

    @pytest.mark.parametrize("kind", ["softmax", "cosface", "arcface"])
    def test_gradients_are_tangential(self, kind):
        embeddings, weight, labels = batch(4)
        loss = with_weight(MarginSoftmaxLoss(6, 5, kind=kind), weight)
        _, by_embedding, by_weight = gradients(loss, embeddings, labels)
        assert (by_embedding * embeddings).sum(1).abs().max() < 1e-12
        assert (by_weight * weight).sum(1).abs().max() < 1e-12

    def test_half_precision_is_computed_in_float32(self):
        embeddings, weight, labels = batch(5)
        for dtype in (torch.float16, torch.bfloat16):
            half = embeddings.to(dtype)
            loss = with_weight(MarginSoftmaxLoss(6, 5), weight.float())
            value = loss(half, labels)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, loss(half.float(), labels))
            torch.testing.assert_close(loss.to(dtype)(half, labels), value, rtol=2e-2, atol=2e-2)

    def test_logits_without_labels_have_no_margin(self):
        embeddings, weight, labels = batch(6)
        loss = with_weight(MarginSoftmaxLoss(6, 5, scale=10), weight)
        torch.testing.assert_close(loss.logits(embeddings), 10 * loss.classifier(embeddings))
        torch.testing.assert_close(F.cross_entropy(loss.logits(embeddings, labels), labels), loss(embeddings, labels))

    def test_defaults_are_the_papers(self):
        assert [MarginSoftmaxLoss(2, 2, kind=k).margin for k in ("softmax", "cosface", "arcface")] == [0, 0.35, 0.5]

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("kind", {"kind": "sphereface"}),
            ("margin", {"margin": -0.1}),
            ("margin", {"margin": 3.2}),
            ("margin", {"margin": math.nan}),
            ("margin", {"kind": "softmax", "margin": 0.1}),
            ("scale", {"scale": 0.0}),
            ("scale", {"scale": math.inf}),
            ("embedding_size", {"embedding_size": 0}),
            ("num_classes", {"num_classes": 0}),
        ],
    )
    def test_bad_constructor_arguments_are_named(self, name, options):
        with pytest.raises(ValueError, match=name):
            MarginSoftmaxLoss(**{"embedding_size": 4, "num_classes": 3, **options})

    def test_embeddings_of_another_width_are_refused(self):
        with pytest.raises(ValueError, match="embedding_size=4"):
            MarginSoftmaxLoss(4, 3)(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))

    def test_the_class_weights_are_parameters(self):
        assert [p.shape for p in MarginSoftmaxLoss(4, 3).parameters()] == [(3, 4)]
        assert [p.shape for p in CosineClassifier(4, 3).parameters()] == [(3, 4)]


@pytest.mark.parametrize("margin", [cosface_margin, arcface_margin])
@pytest.mark.parametrize("labels", [torch.tensor([0]), torch.zeros(0, dtype=torch.int64), torch.zeros(3, 1).long()])
def test_a_margin_wants_a_label_for_each_row(margin, labels) -> None:
    """Fewer labels left the other rows without a margin, and without a word."""
    with pytest.raises(ValueError, match="labels must"):
        margin(torch.zeros(3, 2), labels, 0.3)
    with pytest.raises(TypeError, match="labels must"):
        margin(torch.zeros(3, 2), torch.zeros(3), 0.3)


@pytest.mark.parametrize("margin", [cosface_margin, arcface_margin])
def test_labels_that_are_booleans_are_refused(margin) -> None:
    with pytest.raises(TypeError, match="torch.bool"):
        margin(torch.zeros(2, 2), torch.tensor([True, False]), 0.1)
