"""Pairs as pytorch-metric-learning's miners, memories and trainers hand them over."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.metric import (
    BinomialDevianceLoss,
    ECAMLLoss,
    EnergyConfusion,
    MagFaceLoss,
    MarginSoftmaxLoss,
    SFaceLoss,
    ThresholdConsistentMarginLoss,
    UNPGLoss,
    pair_masks,
)

LOSSES = [BinomialDevianceLoss, ThresholdConsistentMarginLoss]


def batch(samples: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 5, generator=generator, dtype=torch.float64), torch.arange(samples) % 3


@pytest.mark.parametrize("make", LOSSES)
def test_all_pairs_named_one_by_one_are_all_pairs(make) -> None:
    embeddings, labels = batch()
    positive, negative = pair_masks(labels)
    named = (*positive.nonzero().unbind(1), *negative.nonzero().unbind(1))
    torch.testing.assert_close(make()(embeddings, labels, named), make()(embeddings, labels))


@pytest.mark.parametrize("make", LOSSES)
def test_only_the_named_pairs_count(make) -> None:
    embeddings, labels = batch()
    anchor, positive, negative = torch.tensor([0]), torch.tensor([3]), torch.tensor([1])
    embeddings.requires_grad_()
    (gradient,) = torch.autograd.grad(make()(embeddings, labels, (anchor, positive, negative)), embeddings)
    touched = gradient.abs().sum(1) > 0
    assert touched[0]
    assert not touched[[2, 4, 5, 6, 7]].any()
    as_pairs = make()(embeddings, labels, (anchor, positive, anchor, negative))
    torch.testing.assert_close(make()(embeddings, labels, (anchor, positive, negative)), as_pairs)


@pytest.mark.parametrize("make", LOSSES)
def test_references_are_compared_with_instead_of_the_batch(make) -> None:
    (embeddings, labels), (others, of_others) = batch(), batch(6, 1)
    value = make()(embeddings, labels, ref_emb=others, ref_labels=of_others)
    both, classes = torch.cat([embeddings, others]), torch.cat([labels, of_others])
    positive, negative = pair_masks(classes)
    across = torch.zeros(14, 14, dtype=torch.bool)
    across[:8, 8:] = True
    named = (*(positive & across).nonzero().unbind(1), *(negative & across).nonzero().unbind(1))
    torch.testing.assert_close(value, make()(both, classes, named))


@pytest.mark.parametrize("make", LOSSES)
def test_half_a_reference_is_refused(make) -> None:
    embeddings, labels = batch()
    with pytest.raises(ValueError, match="ref_emb and ref_labels must be given together"):
        make()(embeddings, labels, ref_emb=embeddings)
    with pytest.raises(ValueError, match="indices_tuple must have"):
        make()(embeddings, labels, (labels,))


def with_confusion() -> ECAMLLoss:
    return ECAMLLoss(BinomialDevianceLoss(), weight=0.3)


def test_confusion_leaves_mined_pairs_and_references_to_the_base() -> None:
    (embeddings, labels), (others, of_others) = batch(), batch(6, 1)
    mined = tuple(torch.tensor([i]) for i in (0, 3, 1))
    for passed in ({"indices_tuple": mined}, {"ref_emb": others, "ref_labels": of_others}):
        expected = BinomialDevianceLoss()(embeddings, labels, **passed) + 0.3 * EnergyConfusion()(embeddings, labels)
        torch.testing.assert_close(with_confusion()(embeddings, labels, **passed), expected)
        torch.testing.assert_close(
            EnergyConfusion()(embeddings, labels, **passed), EnergyConfusion()(embeddings, labels)
        )
    peer = pytest.importorskip("pytorch_metric_learning.losses").TripletMarginLoss()
    expected = peer(embeddings, labels, mined) + 0.3 * EnergyConfusion()(embeddings, labels)
    torch.testing.assert_close(ECAMLLoss(peer, weight=0.3)(embeddings, labels, mined), expected)


def test_a_miner_a_memory_and_several_losses_of_pytorch_metric_learning_fit() -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, miners

    makers = [*LOSSES, with_confusion, EnergyConfusion, lambda: UNPGLoss(MarginSoftmaxLoss(5, 3))]

    class Memory(losses.CrossBatchMemory):
        """It takes only losses whose names it knows."""

        @staticmethod
        def supported_losses() -> list[str]:
            return [type(make()).__name__ for make in makers]

    embeddings, labels = batch()
    embeddings = embeddings.float()
    for make in makers:
        mined = miners.MultiSimilarityMiner()(embeddings, labels)
        assert make()(embeddings, labels, mined).isfinite()
        memory = Memory(make(), embedding_size=5, memory_size=16)
        for _ in range(2):
            assert memory(embeddings, labels).isfinite()
    head = UNPGLoss(MarginSoftmaxLoss(5, 3))
    both = losses.MultipleLosses([with_confusion(), head], miners=[miners.MultiSimilarityMiner(), None])
    mined = miners.MultiSimilarityMiner()(embeddings, labels)
    expected = with_confusion()(embeddings, labels, mined) + head(embeddings, labels)
    torch.testing.assert_close(both(embeddings, labels), expected)


HEADS = [
    lambda: MarginSoftmaxLoss(5, 3).double(),
    lambda: MarginSoftmaxLoss(5, 3, kind="cosface").double(),
    lambda: MagFaceLoss(5, 3, lengths=(0.5, 9.0)).double(),
    lambda: SFaceLoss(5, 3).double(),
]


@pytest.mark.parametrize("make", HEADS)
def test_a_miner_weighs_the_samples_of_a_head_by_how_often_they_occur(make) -> None:
    embeddings, labels = batch()
    head = make()
    mined = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 1, 0]), torch.tensor([4, 5, 3, 3])
    occurrences = torch.stack([sum((part == i).sum() for part in mined) for i in range(len(labels))])
    penalty = head.penalty if isinstance(head, MagFaceLoss) else lambda _: 0.0
    alone = torch.stack([head(embeddings[i : i + 1], labels[i : i + 1]) for i in range(len(labels))])
    alone = alone - torch.stack([torch.as_tensor(penalty(embeddings[i : i + 1])) for i in range(len(labels))])
    expected = (alone * occurrences / occurrences.max()).mean() + penalty(embeddings)
    torch.testing.assert_close(head(embeddings, labels, mined), expected)
    nobody = tuple(part[:0] for part in mined)
    torch.testing.assert_close(head(embeddings, labels, nobody), head(embeddings, labels))
    with pytest.raises(ValueError, match="ref_emb and ref_labels must be None"):
        head(embeddings, labels, None, embeddings, labels)


def test_a_mined_head_has_the_value_of_that_of_pytorch_metric_learning() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning import miners

    embeddings, labels = batch()
    ours, theirs = MarginSoftmaxLoss(5, 3, margin=0.5).double(), losses.ArcFaceLoss(3, 5, margin=math.degrees(0.5))
    theirs.W.data = ours.classifier.weight.detach().T.clone()
    for miner in (miners.BatchHardMiner(), miners.MultiSimilarityMiner(), miners.TripletMarginMiner(margin=0.3)):
        mined = miner(embeddings, labels)
        torch.testing.assert_close(ours(embeddings, labels, mined), theirs(embeddings, labels, mined))
    both = losses.MultipleLosses([ours, BinomialDevianceLoss()])
    expected = ours(embeddings, labels) + BinomialDevianceLoss()(embeddings, labels)
    torch.testing.assert_close(both(embeddings, labels), expected)
