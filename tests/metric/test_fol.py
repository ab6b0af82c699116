"""Region losses: peaks, alignment and contrast by closed forms, and which side of each gets the gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.metric import (
    foreground_background_loss,
    region_mask,
    same_place_pairs,
    spatial_alignment_loss,
    suppress_peaks,
)


def weights(seed: int, batch: int = 3, patches: int = 40) -> Tensor:
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestPeaks:
    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 10_000), patches=st.integers(1, 90), peaks=st.integers(0, 5), quantile=st.floats(0, 0.99)
    )
    def test_replaces_the_largest_by_the_value_at_the_rank(self, seed, patches, peaks, quantile):
        given_weights = weights(seed, 2, patches)
        peaks = min(peaks, patches)
        before = given_weights.clone()
        found = suppress_peaks(given_weights, peaks, quantile)
        assert torch.equal(given_weights, before)  # nothing is edited in place
        for row, was in zip(found, before, strict=True):
            ordered = was.sort(descending=True)
            expected = was.clone()
            expected[ordered.indices[:peaks]] = ordered.values[int(quantile * patches)]
            assert torch.equal(row, expected)

    def test_all_but_three_values_stay(self):
        before = weights(0, 1, 529)
        assert (suppress_peaks(before) != before).sum() == 3

    def test_replaced_patches_pass_their_gradient_to_the_rank(self):
        row = torch.tensor([[5.0, 1.0, 9.0, 3.0]], requires_grad=True)
        (gradient,) = torch.autograd.grad(suppress_peaks(row, 2, 0.5).sum(), row)
        assert gradient.tolist() == [[0.0, 1.0, 0.0, 3.0]]


class TestAlignment:
    def reference(self, confidence: Tensor, importance: Tensor, temperature: float) -> float:
        c, m = ((suppress_peaks(w, 3) / temperature).softmax(1) for w in (confidence, importance))
        return ((m * (m / c).log()).sum() + (c * (c / m).log()).sum()).item() / len(c)

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 10_000), temperature=st.floats(0.05, 3))
    def test_is_the_symmetric_divergence(self, seed, temperature):
        confidence, importance = weights(seed), 2 * weights(seed + 1)
        found = spatial_alignment_loss(confidence, importance, temperature=temperature)
        assert found.item() == pytest.approx(self.reference(confidence, importance, temperature))
        assert found > 0
        other = spatial_alignment_loss(importance, confidence, temperature=temperature)
        torch.testing.assert_close(found, other)

    def test_equal_regions_are_aligned(self):
        assert spatial_alignment_loss(weights(0), weights(0)).item() == pytest.approx(0, abs=1e-12)
        # A softmax does not see a constant.
        assert spatial_alignment_loss(weights(0), weights(0) + 3).item() == pytest.approx(0, abs=1e-12)

    def test_each_side_learns_from_the_other_held_constant(self):
        confidence, importance = weights(1).requires_grad_(), weights(2).requires_grad_()
        found = torch.autograd.grad(
            spatial_alignment_loss(confidence, importance, num_peaks=0), (confidence, importance)
        )
        c, m = confidence.detach().softmax(1), importance.detach().softmax(1)
        # The gradient of KL(t || softmax(z)) in z is softmax(z) - t; without the detaching there would be more.
        torch.testing.assert_close(found, ((c - m) / 3, (m - c) / 3))

    def test_a_small_temperature_tells_more(self):
        flat, sharp = (spatial_alignment_loss(weights(3) / 64, weights(4), temperature=t) for t in (1.0, 0.01))
        assert sharp > 50 * flat

    def test_mask_is_the_sum_of_two_distributions(self):
        mask = region_mask(weights(5), weights(6), num_peaks=0, temperature=0.5)
        torch.testing.assert_close(mask, (weights(5) / 0.5).softmax(1) + (weights(6) / 0.5).softmax(1))


class TestContrast:
    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        local = torch.randn(4, 5, 3, 7, generator=generator, dtype=torch.float64)
        mask = torch.rand(4, 3, 7, generator=generator, dtype=torch.float64)
        return local[:2], mask[:2], local[2:], mask[2:]

    def test_equals_its_definition(self):
        local, mask, other, other_mask = self.batch()
        unit, other_unit = (x / x.norm(dim=1, keepdim=True) for x in (local, other))
        expected = 0.0
        for i in range(2):
            sides = []
            for features, m in ((unit[i], mask[i]), (other_unit[i], other_mask[i])):
                sides.append(((features * m).sum((1, 2)), (features * (1 - m)).sum((1, 2))))
            cosines = [(a @ b / (a.norm() * b.norm())).item() for a, b in zip(*sides, strict=True)]
            expected += (0.6 * (1 - cosines[0]) + 0.4 * (1 - cosines[1])) / 2
        assert foreground_background_loss(local, mask, other, other_mask, 0.6).item() == pytest.approx(expected)

    def test_identical_pairs_have_none_and_opposite_ones_two(self):
        local, mask, *_ = self.batch()
        assert foreground_background_loss(local, mask, local, mask).item() == pytest.approx(0, abs=1e-12)
        assert foreground_background_loss(local, mask, -local, mask).item() == pytest.approx(2)

    def test_masks_learn_and_features_do_not(self):
        local, mask, other, other_mask = (x.requires_grad_() for x in self.batch())
        value = foreground_background_loss(local, mask, other, other_mask)
        found = torch.autograd.grad(value, (mask, other_mask, local, other), allow_unused=True)
        assert found[2:] == (None, None)
        assert min(gradient.abs().max() for gradient in found[:2]) > 0
        better = [m - 0.01 * g for m, g in zip((mask, other_mask), found[:2], strict=True)]
        assert foreground_background_loss(local, better[0], other, better[1]) < value
        assert torch.autograd.gradcheck(lambda m: foreground_background_loss(local, m, other, other_mask), mask)

    def test_pays_to_look_at_what_the_images_share(self):
        # The left halves show the same, the right halves something else in each image.
        sides = torch.tensor([[0, 1], [0, 2]]).repeat_interleave(2, dim=1)
        images = torch.nn.functional.one_hot(sides).double().mT[:, :, None]  # (2 images, 3 channels, 1, 4)
        shared, other = (torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in (0.6, 0.3))
        mask = torch.stack([shared, shared, other, other])[None, None]
        value = foreground_background_loss(images[:1], mask, images[1:], mask, foreground_weight=1.0)
        assert value.item() == pytest.approx(1 - 0.36 / (0.36 + 0.09))
        value.backward()
        assert shared.grad < 0 < other.grad
        background = foreground_background_loss(images[:1], mask, images[1:], mask, foreground_weight=0.0)
        assert background.item() == pytest.approx(1 - 0.16 / (0.16 + 0.49))

    def test_a_coarse_mask_is_resized_to_a_finer_map_of_any_size(self):
        torch.manual_seed(0)
        local = torch.randn(1, 4, 9, 5)
        mask = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
        resized = torch.linspace(0, 1, 5).expand(1, 9, 5)
        other = torch.randn(1, 4, 9, 5)
        value = foreground_background_loss(local, mask, other, mask)
        assert value > 0.1
        torch.testing.assert_close(value, foreground_background_loss(local, resized, other, resized))


class TestPairs:
    def test_partners_share_the_place_and_lone_images_have_none(self):
        labels = torch.tensor([5, 1, 5, 2, 1, 5])
        generator = torch.Generator().manual_seed(0)
        drawn = torch.zeros(6, 6)
        for _ in range(400):
            images, partners = same_place_pairs(labels, generator=generator)
            assert images.tolist() == [0, 1, 2, 4, 5]
            drawn[images, partners] += 1
        same = (labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool)
        assert torch.equal(drawn > 0, same)
        assert (drawn[0][drawn[0] > 0] / 200 - 1).abs().max() < 0.2


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("weights", lambda: suppress_peaks(torch.ones(3))),
        ("num_peaks", lambda: suppress_peaks(torch.ones(1, 2), 3)),
        ("quantile", lambda: suppress_peaks(torch.ones(1, 5), 1, 1.0)),
        ("temperature", lambda: spatial_alignment_loss(weights(0), weights(0), temperature=0.0)),
        ("temperature", lambda: region_mask(weights(0), weights(0), temperature=math.inf)),
        ("importance", lambda: spatial_alignment_loss(weights(0), weights(0, patches=41))),
        ("foreground_weight", lambda: foreground_background_loss(*TestContrast().batch(), foreground_weight=1.2)),
        ("mask", lambda: foreground_background_loss(*(x[..., 0] for x in TestContrast().batch()))),
        (
            "other_local",
            lambda: foreground_background_loss(
                *(x[:n] for x, n in zip(TestContrast().batch(), (2, 2, 1, 1), strict=True))
            ),
        ),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()
