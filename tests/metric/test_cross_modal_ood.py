"""Cross-modal alignment: identities of the loss and its gradient, the scores of known and unknown, the modality gap."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.metric import (
    CrossModalAlignmentLoss,
    auroc,
    cross_modal_alignment,
    mcm_score,
    mine_negative_labels,
    modality_gap,
    neglabel_log_odds,
    neglabel_score,
)


def pair(seed: int = 0, batch: int = 7, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    return images, texts


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a[:, None], b[None], dim=2)


def released(images: Tensor, texts: Tensor, scale: float, lam: float) -> Tensor:
    """The loss as the authors' description of their code has it: two cross-entropies and two mean energies."""
    logits = scale * cosines(images, texts)
    truth = torch.arange(len(images))
    parts = [F.cross_entropy(z, truth) - lam * z.logsumexp(1).mean() for z in (logits, logits.T)]
    return sum(parts) / 2


def normals(*degrees: float) -> Tensor:
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


class TestLoss:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.1, 100), st.floats(0, 1))
    def test_equals_cross_entropies_and_energies(self, seed, batch, scale, lam):
        images, texts = pair(seed, batch)
        value = cross_modal_alignment(images, texts, scale, lam=lam)
        torch.testing.assert_close(value, released(images, texts, scale, lam))

    def test_without_weight_it_is_clips_loss(self):
        images, texts = pair()
        logits = 20 * cosines(images, texts)
        truth = torch.arange(7)
        expected = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        torch.testing.assert_close(CrossModalAlignmentLoss(lam=0)(images, texts, 20.0), expected)

    def test_at_weight_one_only_attraction_is_left(self):
        images, texts = pair()
        value = CrossModalAlignmentLoss(lam=1)(images, texts, 20.0)
        torch.testing.assert_close(value, -20 * torch.cosine_similarity(images, texts).mean())

    def test_a_single_pair_has_its_energy_alone(self):
        value = CrossModalAlignmentLoss(lam=0.25)(normals(0), normals(60), 10.0)
        assert value.item() == pytest.approx(-0.25 * 10 * 0.5)

    @pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
    def test_gradient_in_the_logits(self, lam):
        # With orthonormal images the logits are the texts' own coordinates: moving text j along image i moves Z_ij.
        texts = F.normalize(pair(3, 4, 4)[1], dim=1).requires_grad_()
        cross_modal_alignment(torch.eye(4, dtype=torch.float64), texts, 8.0, lam=lam).backward()
        logits = 8 * texts.detach().T
        wanted = ((1 - lam) * (logits.softmax(1) + logits.softmax(0)) - 2 * torch.eye(4)) / (2 * 4)
        tangent = 8 * wanted.T
        tangent = tangent - (tangent * texts.detach()).sum(1, keepdim=True) * texts.detach()
        torch.testing.assert_close(texts.grad, tangent)

    def test_weight_takes_force_from_repulsion_only(self):
        # Two texts at 0 and 90 degrees; each image lies off its text, away from the other one.
        slopes = {}
        for lam in (0.0, 0.9):
            images = normals(-20, 110).requires_grad_()
            cross_modal_alignment(images, normals(0, 90), 10.0, lam=lam).backward()
            # Along the direction that turns the first image to its text, and to the other text beyond.
            slopes[lam] = (images.grad[0] * normals(70)[0]).sum().item()
        assert slopes[0.9] < slopes[0.0]
        assert slopes[0.9] < -1

    def test_sides_are_alike(self):
        images, texts = pair()
        labels = torch.tensor([0, 1, 0, 2, 1, 1, 3])
        there, back = (cross_modal_alignment(*sides, 9.0, labels, 0.1) for sides in ((images, texts), (texts, images)))
        torch.testing.assert_close(there, back)

    def test_rotation_and_length_do_not_matter(self):
        images, texts = pair()
        rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
        lengths = torch.rand(7, 1, dtype=torch.float64) + 0.1
        loss = CrossModalAlignmentLoss(0.2)
        torch.testing.assert_close(loss(lengths * images @ rotation, texts @ rotation), loss(images, texts))

    def test_training_narrows_the_gap_as_the_weight_grows(self):
        gaps = []
        for lam in (0.0, 0.05, 0.5):
            # A cone for each modality, on opposite sides.
            images, texts = pair(5, 12, 8)
            shift = 4 * F.one_hot(torch.tensor(0), 8)
            sides = [(images + shift).requires_grad_(), (texts - shift).requires_grad_()]
            optimizer = torch.optim.SGD(sides, lr=0.5)
            for _ in range(25):
                optimizer.zero_grad()
                cross_modal_alignment(*sides, 5.0, lam=lam).backward()
                optimizer.step()
            gaps.append(modality_gap(*(side.detach() for side in sides)).item())
        assert gaps[0] > gaps[1] > gaps[2]

    def test_a_trained_scale_gets_the_gradient(self):
        # Once pairs are perfect, only the energy is left: the loss falls by lam for each unit of scale.
        log_scale = torch.tensor(100.0).log().requires_grad_()
        cross_modal_alignment(torch.eye(4), torch.eye(4), log_scale.exp(), lam=0.1).backward()
        assert log_scale.grad.item() == pytest.approx(-0.1 * 100, rel=1e-5)


class TestLabels:
    def test_distinct_labels_change_nothing(self):
        images, texts = pair()
        torch.testing.assert_close(
            cross_modal_alignment(images, texts, 9.0, torch.arange(7) + 3, 0.1),
            cross_modal_alignment(images, texts, 9.0, lam=0.1),
        )

    def test_a_batch_of_one_class_has_no_negatives(self):
        images, texts = pair()
        value = cross_modal_alignment(images, texts, 9.0, torch.zeros(7, dtype=torch.int64), 0.1)
        assert value.item() == pytest.approx(-0.1 * 9 * torch.cosine_similarity(images, texts).mean().item())

    def test_equals_the_definition(self):
        images, texts = pair()
        labels, lam = [0, 1, 0, 2, 1, 1, 3], 0.3
        logits = 9 * cosines(images, texts)
        total = 0.0
        for i in range(7):
            allowed = [j for j in range(7) if j == i or labels[j] != labels[i]]
            for row in (logits[i], logits[:, i]):
                normaliser = math.log(sum(math.exp(row[j]) for j in allowed))
                total += (1 - lam) * normaliser - row[i].item()
        value = cross_modal_alignment(images, texts, 9.0, torch.tensor(labels), lam)
        assert value.item() == pytest.approx(total / 14)

    def test_gradient_agrees_with_finite_differences(self):
        labels = torch.tensor([0, 1, 0, 2, 1, 1, 3])
        sides = [side.requires_grad_() for side in pair()]
        assert torch.autograd.gradcheck(lambda u, v: cross_modal_alignment(u, v, 3.0, labels, 0.1), sides)

    def test_a_repeated_image_and_text_are_not_torn_apart(self):
        # Both members of a class are perfect, so nothing is left to gain; without labels each repels the other.
        images = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 2]]
        labels = torch.tensor([0, 0, 1, 2])
        aware, plain = (cross_modal_alignment(images, images, 50.0, given, 0.0) for given in (labels, None))
        assert aware.item() == pytest.approx(0, abs=1e-12)
        assert plain.item() == pytest.approx(math.log(2) / 2)


class TestScores:
    def test_mcm_is_the_largest_softmax(self):
        images, texts = pair()
        expected = (cosines(images, texts[:4]) / 0.3).exp()
        expected = (expected / expected.sum(1, keepdim=True)).max(1).values
        torch.testing.assert_close(mcm_score(images, texts[:4], 0.3), expected)

    def test_mcm_of_an_image_between_classes_is_chance(self):
        assert mcm_score(torch.ones(1, 4), torch.eye(4), 0.01).item() == pytest.approx(0.25)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 9), st.floats(0.3, 2))
    def test_neglabel_is_the_known_share_of_one_softmax(self, seed, classes, negatives, temperature):
        images, words = pair(seed, classes + negatives)
        known, other = words[:classes], words[classes:]
        score = neglabel_score(images, known, other, temperature)
        expected = (cosines(images, words) / temperature).softmax(1)[:, :classes].sum(1)
        torch.testing.assert_close(score, expected)
        assert ((score > 0) & (score < 1)).all()

    def test_neglabel_without_negatives_is_one(self):
        images, texts = pair()
        assert (neglabel_score(images, texts, texts[:0]) == 1).all()

    def test_log_odds_tell_apart_what_the_score_rounds_to_one(self):
        known, negatives = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        images = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
        assert (neglabel_score(images, known, negatives) == 1).all()
        odds = neglabel_log_odds(images, known, negatives)
        assert odds[0] > odds[1] > odds[2]
        assert auroc(odds, torch.tensor([True, False, False])) == 1

    def test_more_negatives_lower_the_score(self):
        images, words = pair(1, 9)
        scores = [neglabel_score(images, words[:3], words[3:end], 0.1) for end in (5, 9)]
        assert (scores[1] < scores[0]).all()


class TestMining:
    def test_chooses_the_least_like(self):
        # Classes at 0 and 40 degrees; nearest cosine of each word in the comments.
        words = normals(10, 90, 180, 60)  # cos 10, cos 50, cos 140, cos 20
        assert mine_negative_labels(words, normals(0, 40), 3, quantile=1.0).tolist() == [2, 1, 3]

    def test_quantile_passes_over_an_odd_class(self):
        classes = torch.cat([normals(*range(20)), normals(180)])
        words = normals(180, 100)
        assert mine_negative_labels(words, classes, 1, quantile=1.0).tolist() == [1]
        assert mine_negative_labels(words, classes, 1, quantile=0.9).tolist() == [0]


class TestGap:
    def test_known_distances(self):
        assert modality_gap(normals(0, 90), normals(0, 90)).item() == pytest.approx(0, abs=1e-12)
        assert modality_gap(normals(0), normals(60, 60)).item() == pytest.approx(1)
        # Means (1/2, 1/2) and its opposite.
        assert modality_gap(normals(0, 90), normals(180, 270)).item() == pytest.approx(math.sqrt(2))

    def test_lengths_do_not_matter(self):
        images, texts = pair()
        lengths = torch.rand(7, 1, dtype=torch.float64) + 0.1
        torch.testing.assert_close(modality_gap(lengths * images, texts), modality_gap(images, texts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_on_in_float32(dtype):
    images, texts = (side.to(dtype) for side in pair())
    for function in (
        cross_modal_alignment,
        mcm_score,
        modality_gap,
        lambda a, b: neglabel_score(a, b[:3], b[3:]),
    ):
        value = function(images, texts)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, function(images.float(), texts.float()))


class TestErrors:
    @pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan])
    def test_weight(self, lam):
        with pytest.raises(ValueError, match="lam"):
            CrossModalAlignmentLoss(lam)
        with pytest.raises(ValueError, match="lam"):
            cross_modal_alignment(*pair(), lam=lam)

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, torch.ones(7)])
    def test_scale(self, scale):
        with pytest.raises(ValueError, match="scale"):
            cross_modal_alignment(*pair(), scale)

    @pytest.mark.parametrize(
        ("name", "error", "call"),
        [
            ("image_embeddings", TypeError, lambda u, v: cross_modal_alignment(u.long(), v)),
            ("text_embeddings", TypeError, lambda u, v: cross_modal_alignment(u, v.long())),
            ("text_embeddings", ValueError, lambda u, v: cross_modal_alignment(u, v[:3])),
            ("text_embeddings", ValueError, lambda u, v: cross_modal_alignment(u, v[:, :3])),
            ("image_embeddings", ValueError, lambda u, v: cross_modal_alignment(u[0], v)),
            ("image_embeddings", ValueError, lambda u, v: cross_modal_alignment(u[:0], v[:0])),
            ("labels", ValueError, lambda u, v: cross_modal_alignment(u, v, labels=torch.arange(3))),
            ("labels", TypeError, lambda u, v: cross_modal_alignment(u, v, labels=torch.ones(7))),
            ("temperature", ValueError, lambda u, v: mcm_score(u, v, 0.0)),
            ("text_embeddings", ValueError, lambda u, v: mcm_score(u, v[:0])),
            ("temperature", ValueError, lambda u, v: neglabel_score(u, v, v, -1.0)),
            ("text_embeddings", ValueError, lambda u, v: neglabel_score(u, v[:0], v)),
            ("negative_embeddings", ValueError, lambda u, v: neglabel_score(u, v, v[:, :2])),
            ("candidate_embeddings", TypeError, lambda u, v: mine_negative_labels(u.long(), v, 2)),
            ("text_embeddings", ValueError, lambda u, v: mine_negative_labels(u, v[:0], 2)),
            ("num", ValueError, lambda u, v: mine_negative_labels(u, v, 8)),
            ("num", ValueError, lambda u, v: mine_negative_labels(u, v, 0)),
            ("quantile", ValueError, lambda u, v: mine_negative_labels(u, v, 2, 1.5)),
            ("image_embeddings", ValueError, lambda u, v: modality_gap(u[:0], v)),
            ("text_embeddings", ValueError, lambda u, v: modality_gap(u, v[:0])),
        ],
    )
    def test_arguments_are_named(self, name, error, call):
        with pytest.raises(error, match=name):
            call(*pair())
