"""The scenes and masks of the segmentation task, and its numbers."""

import pytest
import torch
from torch import nn

from trimtab.data import load
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks import segmentation
from trimtab.studies.tasks.segmentation import (
    GROUP,
    NUM_CLASSES,
    Batch,
    Segmenter,
    coarse,
)
from trimtab.studies.tools.masks import boundary, random_view
from trimtab.studies.tools.segmentation_losses import FocalLoss, MarginLabelSmoothing

DIGITS = load("digits")


def scenes(count=40, sparse=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return segmentation.compose(DIGITS.x_train, GROUP[DIGITS.y_train], count, 16, sparse, generator)


def test_a_mask_marks_what_was_pasted():
    x, y, amount = scenes()
    assert x.shape == (40, 1, 16, 16)
    assert y.max() < NUM_CLASSES
    assert ((y > 0) == (amount[:, 0] == 1)).all()
    assert x[:, 0][y > 0].min() > 0.2
    present = torch.tensor([[(mask == label).any() for label in range(1, NUM_CLASSES)] for mask in y])
    assert (present.float().mean(0) > 0.3).all()


def test_sparse_scenes_show_little_or_nothing():
    dense, sparse = scenes()[1] > 0, scenes(sparse=1.0)[1] > 0
    assert sparse.float().mean() < 0.2 * dense.float().mean()
    assert 0 < (~sparse.flatten(1).any(1)).sum() < len(sparse)


def test_coarse_masks_grow_shrink_and_shift():
    y = torch.zeros(60, 16, 16, dtype=torch.int64)
    y[:, 5:11, 5:11] = 2
    drawn = segmentation.coarse_masks(y, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0, 2}
    sizes = (drawn > 0).flatten(1).sum(1)
    assert set(sizes.tolist()) == {4, 16, 36, 64, 100}
    shifted = drawn[sizes == 36]
    assert len(shifted)
    assert (shifted != y[0]).flatten(1).any(1).all()


def test_ambiguous_masks_move_the_border_alone():
    _, y, amount = scenes(100)
    drawn = segmentation.ambiguous_masks(amount, y, torch.Generator().manual_seed(0))
    changed = drawn != y
    assert 0.01 < changed.float().mean() < 0.35
    thick = torch.zeros(50, 16, 16, dtype=torch.int64)
    thick[:, :, 8:] = 3
    drawn = segmentation.ambiguous_masks((thick > 0).float()[:, None], thick, torch.Generator().manual_seed(0))
    assert (drawn[:, :, :5] == 0).all()
    assert (drawn[:, :, 11:] == 3).all()
    widths = (drawn[:, 8] == 3).sum(1)
    assert widths.min() < 8 < widths.max()


def test_a_view_moves_image_and_mask_alike():
    y = torch.zeros(30, 16, 16, dtype=torch.int64)
    y[:, 3:9, 2:7] = 1
    x = y.float()[:, None]
    seen, mask = random_view(x, y, torch.Generator().manual_seed(0))
    assert ((seen[:, 0] > 0.5) == (mask == 1)).all()
    assert len({tuple(m.flatten().tolist()) for m in mask}) > 20


def test_overlaps_by_hand():
    truth = torch.tensor([[[0, 0], [1, 1]]])
    predicted = torch.tensor([[[0, 1], [1, 1]]])
    dice, miou = segmentation.overlaps(predicted, truth)
    assert dice == pytest.approx(2 * 2 / 5)  # class 1: two pixels in common, three and two in all
    assert miou == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_boundary_is_where_another_class_is_near():
    truth = torch.zeros(1, 9, 9, dtype=torch.int64)
    truth[0, :, 6:] = 2
    assert boundary(truth)[0, 0].tolist() == [False] * 4 + [True] * 4 + [False]


def test_the_objective_gets_batch_and_views_and_the_corrector_replaces_masks():
    seen: list[Batch] = []

    class Watch(nn.Module):
        def forward(self, net, batch):
            seen.append(batch)
            x, y = batch.view()
            assert x.shape == batch.x.shape
            assert not torch.equal(x, batch.x)
            return nn.functional.cross_entropy(net(x), y)

        def measure(self, masks):
            return {"weight_rank": float(masks.max())}

    def corrector(plan):
        def correct(epoch, labels, probs):
            assert probs().shape == (len(plan), NUM_CLASSES, *labels.shape[1:])
            return torch.full_like(labels, epoch)

        return correct

    entrant = Segmenter(objective=lambda plan: Watch(), corrector=corrector)
    result = coarse.run(Trial(seed=0), entrant)
    assert {label for batch in seen[-3:] for label in batch.y.unique().tolist()} == {1}
    assert sorted(torch.cat([batch.index for batch in seen[:3]]).tolist()) == list(range(24))
    assert result.metrics["weight_rank"] == 3, "the masks given at first, not the corrected ones"
    plain = coarse.run(Trial(seed=0), Segmenter())
    assert plain.metrics["labels_right"] > result.metrics["labels_right"]


def test_settings_are_judged_by_the_cross_entropy_of_held_out_images_alone():
    def loss(plan):
        return nn.CrossEntropyLoss(label_smoothing=plan.setting["mass"])

    tried = [coarse.run(Trial(setting={"mass": mass}, searching=True), Segmenter(loss=loss)) for mass in (0.0, 0.99)]
    assert all(not result.metrics for result in tried)
    assert tried[0].score != tried[1].score


def test_focal_loss_of_no_power_and_mbls_of_no_weight_are_cross_entropy():
    draws = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, NUM_CLASSES, 5, 5, generator=draws, dtype=torch.float64)
    masks = torch.randint(NUM_CLASSES, (2, 5, 5), generator=draws)
    expected = nn.functional.cross_entropy(logits, masks)
    torch.testing.assert_close(FocalLoss(0.0)(logits, masks), expected)
    torch.testing.assert_close(MarginLabelSmoothing(5.0, alpha=0.0)(logits, masks), expected)
    assert FocalLoss(2.0)(logits, masks) < expected
    gaps = logits.amax(1, keepdim=True) - logits
    by_hand = expected + 0.1 * (gaps - 2).clamp(min=0).mean()
    torch.testing.assert_close(MarginLabelSmoothing(2.0)(logits, masks), by_hand)
