"""SFace: closed forms, the gradient with its strengths held constant, and where the pull and the push stop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.metric import SFaceLoss, inter_strength, intra_strength, sface_loss


def double_batch(seed: int, samples: int = 9, dim: int = 5, classes: int = 4) -> tuple[SFaceLoss, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loss = SFaceLoss(dim, classes, k=5.0).double()
    loss.classifier.weight.data = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    embeddings = torch.randn(samples, dim, generator=generator, dtype=torch.float64)
    return loss, embeddings, torch.randint(classes, (samples,), generator=generator)


class TestStrengths:
    def test_half_at_the_two_angles(self):
        assert intra_strength(torch.tensor(0.8)).item() == pytest.approx(0.5)
        assert inter_strength(torch.tensor(1.23)).item() == pytest.approx(0.5)
        assert intra_strength(torch.tensor(0.9), a=0.9).item() == pytest.approx(0.5)
        assert inter_strength(torch.tensor(1.4), b=1.4).item() == pytest.approx(0.5)

    def test_the_pull_grows_with_the_angle_and_the_push_fades(self):
        theta = torch.linspace(0.5, 1.5, 50, dtype=torch.float64)
        torch.testing.assert_close(intra_strength(theta), 1 / (1 + torch.exp(-80 * (theta - 0.8))))
        torch.testing.assert_close(inter_strength(theta), 1 / (1 + torch.exp(80 * (theta - 1.23))))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_the_ends_of_the_range_do_not_overflow(self, dtype):
        theta = torch.tensor([0.0, math.pi], dtype=dtype)
        assert intra_strength(theta).tolist() == pytest.approx([0, 1], abs=1e-6)
        assert inter_strength(theta).tolist() == pytest.approx([1, 0], abs=1e-6)


class TestLoss:
    def test_two_classes_in_the_plane(self):
        cosine = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        right, wrong = (sface_loss(cosine, torch.tensor([label])).item() for label in (0, 1))
        assert right == pytest.approx(-64 / (1 + math.exp(64)), rel=1e-9)  # the pull has faded: -64 sigma(-64)
        assert wrong == pytest.approx(64, rel=1e-9)  # the label is a right angle away; the push is from class 0

    def test_the_sum_is_over_classes_and_the_mean_over_samples(self):
        # Angles of 60 degrees: pull and push are both at full strength.
        cosine = torch.full((2, 3), 0.5, dtype=torch.float64)
        strengths = intra_strength(cosine.acos())[0, 0], inter_strength(cosine.acos())[0, 0]
        expected = 64 * (-0.5 * strengths[0] + 2 * 0.5 * strengths[1])
        torch.testing.assert_close(sface_loss(cosine, torch.tensor([0, 2])), expected.expand(2))
        loss, embeddings, labels = double_batch(0)
        values = sface_loss(loss.classifier(embeddings), labels, k=5.0)
        torch.testing.assert_close(loss(embeddings, labels), values.sum() / len(labels))

    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        k=st.floats(0, 100),
        a=st.floats(0.1, 3),
        b=st.floats(0.1, 3),
        scale=st.floats(0.5, 64),
    )
    def test_equals_its_formula_sample_by_sample(self, seed, k, a, b, scale):
        loss, embeddings, labels = double_batch(seed)
        weight = loss.classifier.weight.detach()
        expected = []
        for x, y in zip(embeddings, labels.tolist(), strict=True):
            total = 0.0
            for j, w in enumerate(weight):
                cos = float(x @ w / (x.norm() * w.norm()))
                theta = math.acos(cos)
                if j == y:
                    total -= scale / (1 + math.exp(-k * (theta - a))) * cos
                else:
                    total += scale / (1 + math.exp(k * (theta - b))) * cos
            expected.append(total)
        values = sface_loss(loss.classifier(embeddings), labels, scale=scale, k=k, a=a, b=b)
        assert values.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def test_gradient_holds_the_strengths_constant(self):
        loss, embeddings, labels = double_batch(1)
        cosine = loss.classifier(embeddings).detach().requires_grad_()
        sface_loss(cosine, labels, k=5.0).sum().backward()
        theta = cosine.detach().acos()
        own = torch.nn.functional.one_hot(labels, 4).bool()
        expected = torch.where(own, -64 / (1 + torch.exp(-5 * (theta - 0.8))), 64 / (1 + torch.exp(5 * (theta - 1.23))))
        torch.testing.assert_close(cosine.grad, expected)

    def test_gradients_are_tangential(self):
        loss, embeddings, labels = double_batch(2)
        leaf = embeddings.requires_grad_()
        by_embedding, by_weight = torch.autograd.grad(loss(leaf, labels), (leaf, loss.classifier.weight))
        assert (by_embedding * embeddings).sum(1).abs().max() < 1e-12
        assert (by_weight * loss.classifier.weight).sum(1).abs().max() < 1e-12

    def test_lengths_do_not_matter(self):
        loss, embeddings, labels = double_batch(3)
        value = loss(embeddings, labels)
        loss.classifier.weight.data *= torch.tensor([[0.1], [1], [10], [100]])
        torch.testing.assert_close(loss(7 * embeddings, labels), value)

    def test_a_slope_of_zero_is_the_linear_loss(self):
        loss, embeddings, labels = double_batch(4)
        cosine = loss.classifier(embeddings)
        own = cosine.gather(1, labels[:, None])[:, 0]
        torch.testing.assert_close(sface_loss(cosine, labels, k=0.0), 32 * (cosine.sum(1) - 2 * own))

    def test_the_pull_stops_at_its_angle(self):
        # A free embedding at 63 degrees from its class weight and beyond the push of the other.
        loss = SFaceLoss(2, 2).double()
        loss.classifier.weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
        x = torch.tensor([[math.cos(1.1), math.sin(1.1)]], dtype=torch.float64, requires_grad=True)
        for _ in range(100):
            (gradient,) = torch.autograd.grad(loss(x, torch.tensor([0])), x)
            x = (x - 5e-4 * gradient).detach().requires_grad_()
        assert math.atan2(x[0, 1].item(), x[0, 0].item()) == pytest.approx(0.76, abs=0.04)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_embeddings_on_their_weights_have_finite_gradients(self, sign):
        loss = SFaceLoss(4, 3)
        leaf = (sign * loss.classifier.weight.detach()).requires_grad_()
        value = loss(leaf, torch.arange(3))
        value.backward()
        assert value.isfinite()
        assert leaf.grad.isfinite().all()
        assert loss.classifier.weight.grad.isfinite().all()

    def test_half_precision_is_computed_in_float32(self):
        loss, embeddings, labels = double_batch(5)
        half = embeddings.half()
        torch.testing.assert_close(loss.float()(half, labels), loss(half.float(), labels))
        assert loss(half, labels).dtype == torch.float32

    def test_it_learns_classes(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(120) % 6
        centres = torch.randn(6, 20, generator=generator)
        x = centres[labels] + 0.5 * torch.randn(120, 20, generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, loss = torch.nn.Linear(20, 8), SFaceLoss(8, 6)
        optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], lr=0.02, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            loss(network(x), labels).backward()
            optimizer.step()
        assert (loss.logits(network(x)).argmax(1) == labels).float().mean() > 0.95

    def test_initial_class_weights(self):
        torch.manual_seed(0)
        assert SFaceLoss(512, 50).classifier.weight.std().item() == pytest.approx(2 * math.sqrt(2 / 50), rel=0.02)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("scale", {"scale": 0.0}),
            ("scale", {"scale": math.nan}),
            ("k", {"k": -1.0}),
            ("k", {"k": math.inf}),
            ("a", {"a": -0.1}),
            ("b", {"b": 3.2}),
            ("embedding_size", {"embedding_size": 0}),
        ],
    )
    def test_bad_constructor_arguments_are_named(self, name, options):
        with pytest.raises(ValueError, match=f"^{name}"):
            SFaceLoss(**{"embedding_size": 4, "num_classes": 3, **options})


def test_labels_that_are_booleans_are_refused() -> None:
    with pytest.raises(TypeError, match="torch.bool"):
        sface_loss(torch.zeros(2, 2), torch.tensor([True, False]))
