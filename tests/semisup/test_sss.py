from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimtab.semisup import (
    DiscriminativeFeatureEnhancement,
    PCSWPromptGenerator,
    SSSLoss,
    similar_and_apart,
    weak_to_strong_loss,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def enhancement(seed: int = 3) -> DiscriminativeFeatureEnhancement:
    made = DiscriminativeFeatureEnhancement(4).double()
    with torch.no_grad():
        made.mix.weight.copy_(drawn(4, 8, 1, 1, seed=seed))
        made.mix.bias.copy_(drawn(4, seed=seed))
    return made


def test_enhancement_starts_as_identity_and_learns() -> None:
    made = DiscriminativeFeatureEnhancement(4).double()
    first, second = drawn(2, 4, 3, 3), drawn(2, 4, 3, 3, seed=1)
    one, two = made(first, second)
    assert torch.equal(one, first)
    assert torch.equal(two, second)
    (one * drawn(2, 4, 3, 3, seed=2)).sum().backward()
    assert made.mix.weight.grad is not None
    assert made.mix.weight.grad.abs().sum() > 0


def test_equal_views_have_nothing_apart_and_opposite_ones_nothing_in_common() -> None:
    first = drawn(2, 4, 3, 3)
    shared, apart = similar_and_apart(first, first)
    torch.testing.assert_close(shared, first)
    assert (apart == 0).all()
    shared, apart = similar_and_apart(first, -first)
    torch.testing.assert_close(shared, torch.zeros_like(first), atol=1e-12, rtol=0)
    torch.testing.assert_close(apart, 2 * first)


def test_parts_are_weighed_by_the_cosine_of_each_place() -> None:
    first, second = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 3.0]).view(1, 2, 1, 1)
    shared, apart = similar_and_apart(first, second)
    assert shared.flatten().tolist() == [0.25, 0.75]
    assert apart.flatten().tolist() == [0.5, -1.5]


def test_views_change_places() -> None:
    made, first, second = enhancement(), drawn(2, 4, 3, 3), drawn(2, 4, 3, 3, seed=1)
    one, two = made(first, second)
    other, another = made(second, first)
    torch.testing.assert_close(one, another)
    torch.testing.assert_close(two, other)
    shared, apart = similar_and_apart(first, second)
    swapped = similar_and_apart(second, first)
    torch.testing.assert_close(shared, swapped[0])
    torch.testing.assert_close(apart, -swapped[1])


def test_unlabelled_loss_by_hand() -> None:
    weak, strong, other = (2 * drawn(2, 3, 4, 4, seed=s) for s in range(3))
    p = weak.softmax(1)
    counts = (p.amax(1) >= 0.8).double()
    assert 0 < counts.sum() < 32
    each = [(counts * F.cross_entropy(view, p.argmax(1), reduction="none")).mean() for view in (strong, other)]
    torch.testing.assert_close(weak_to_strong_loss(weak, (strong, other), 0.8), sum(each) / 2)
    logits, masks = drawn(2, 3, 4, 4, seed=7), torch.arange(32).view(2, 4, 4) % 3
    found = SSSLoss(0.8, weight=0.5)(logits, masks, weak, (strong, other))
    torch.testing.assert_close(found, F.cross_entropy(logits, masks) + sum(each) / 4)


def test_weak_views_are_constants_and_unsure_pixels_teach_nothing() -> None:
    weak, strong = drawn(2, 3, 4, 4).requires_grad_(), drawn(2, 3, 4, 4, seed=1).requires_grad_()
    weak_to_strong_loss(weak, (strong,), 0.6).backward()
    assert weak.grad is None
    assert strong.grad is not None
    unsure = weak.softmax(1).amax(1) < 0.6
    assert (strong.grad.movedim(1, -1)[unsure] == 0).all()
    assert (strong.grad.movedim(1, -1)[~unsure] != 0).all()


def disk(side: int = 40, centre: tuple[int, int] = (18, 22), radius: int = 6) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= radius**2).long()


def test_a_disk_has_its_box_and_a_point_at_its_middle() -> None:
    prompts = PCSWPromptGenerator(window=40, pad=0.0)(3 * disk())
    assert prompts.boxes.tolist() == [[16, 12, 29, 25]]
    assert prompts.points.tolist() == [[22, 18]]
    assert prompts.class_ids.tolist() == [3]
    padded = PCSWPromptGenerator(window=40, pad=0.1)(disk())
    assert padded.boxes.tolist() == [[15, 11, 30, 26]]


def test_boxes_end_at_the_image() -> None:
    prompts = PCSWPromptGenerator(window=40, pad=0.5, min_share=0.0)(disk(centre=(2, 37)))
    assert prompts.boxes.tolist() == [[27, 0, 40, 13]]


def test_confidence_moves_the_point() -> None:
    mask, sure = disk(), torch.full((40, 40), 1e-6)
    sure[18, 25] = 1.0
    prompts = PCSWPromptGenerator(window=40)(mask, sure)
    assert prompts.points.tolist() == [[25, 18]]


def test_specks_giants_and_what_lies_outside_of_the_body_are_left_out() -> None:
    mask = torch.zeros(40, 40, dtype=torch.int64)
    mask[5, 5] = 1
    assert len(PCSWPromptGenerator(window=40, min_area=0.002, min_share=0.0)(mask)) == 0
    assert len(PCSWPromptGenerator(window=40, min_area=0.0, min_share=0.0)(mask)) == 1
    assert len(PCSWPromptGenerator(window=40, max_area=0.05)(disk())) == 0
    assert len(PCSWPromptGenerator(window=40, body=0.2)(disk(centre=(4, 20)))) == 0
    empty = PCSWPromptGenerator()(torch.zeros(8, 8, dtype=torch.int64))
    assert empty.boxes.shape == (0, 4)
    assert empty.points.shape == (0, 2)


def test_a_class_has_as_many_components_as_its_anatomy() -> None:
    mask = torch.maximum(disk(centre=(10, 10), radius=6), disk(centre=(30, 30), radius=5))
    one = PCSWPromptGenerator(window=40)(mask)
    assert len(one) == 1
    assert one.points.tolist() == [[10, 10]]
    assert len(PCSWPromptGenerator(window=40, max_components=None)(mask)) == 2
    assert PCSWPromptGenerator(window=40)(mask + disk(centre=(30, 30), radius=5)).class_ids.tolist() == [1, 2]


def test_windows_propose_parts_and_overlapping_ones_become_one() -> None:
    mask = torch.zeros(40, 40, dtype=torch.int64)
    mask[18:22] = 1  # a bar across the image
    parts = PCSWPromptGenerator(window=20, stride=20, pad=0.0)(mask)
    # Windows that start at 0 and 20: each sees half of the bar's length, and half of its breadth.
    assert parts.boxes.tolist() == [[0, 18, 20, 20], [0, 20, 20, 22], [20, 18, 40, 20], [20, 20, 40, 22]]
    whole = PCSWPromptGenerator(window=20, stride=1, pad=0.0, merge=0.2)(mask)
    assert whole.boxes.tolist() == [[0, 18, 40, 22]]
    for box, point in zip(parts.boxes, parts.points, strict=True):
        assert box[0] <= point[0] < box[2]
        assert box[1] <= point[1] < box[3]
        assert mask[point[1], point[0]] == 1


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: DiscriminativeFeatureEnhancement(0), ValueError, "dim"),
        (lambda: enhancement()(drawn(2, 4, 3, 3), drawn(2, 4, 3, 2)), ValueError, "second"),
        (lambda: enhancement()(drawn(2, 3, 3, 3), drawn(2, 3, 3, 3)), ValueError, "first"),
        (lambda: similar_and_apart(drawn(2, 3).long(), drawn(2, 3)), TypeError, "first"),
        (lambda: SSSLoss(1.5), ValueError, "threshold"),
        (lambda: SSSLoss(weight=-1.0), ValueError, "weight"),
        (lambda: weak_to_strong_loss(drawn(2, 3, 4, 4), ()), ValueError, "strong"),
        (lambda: weak_to_strong_loss(drawn(2, 3, 4, 4), (drawn(2, 3, 4, 5),)), ValueError, "strong"),
        (lambda: weak_to_strong_loss(drawn(0, 3, 4, 4), (drawn(0, 3, 4, 4),)), ValueError, "weak"),
        (lambda: PCSWPromptGenerator(window=0), ValueError, "window"),
        (lambda: PCSWPromptGenerator(merge=0.0), ValueError, "merge"),
        (lambda: PCSWPromptGenerator(min_area=2.0), ValueError, "min_area"),
        (lambda: PCSWPromptGenerator()(drawn(4, 4)), TypeError, "mask"),
        (lambda: PCSWPromptGenerator()(torch.zeros(4, dtype=torch.int64)), ValueError, "mask"),
        (lambda: PCSWPromptGenerator()(disk(), torch.ones(3, 3)), ValueError, "confidence"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        call()


def test_masks_must_fit() -> None:
    logits = drawn(2, 3, 4, 4)
    with pytest.raises(TypeError, match="masks"):
        SSSLoss()(logits, torch.zeros(2, 4, 4), logits, (logits,))
    with pytest.raises(ValueError, match="masks"):
        SSSLoss()(logits, torch.zeros(2, 4, 5, dtype=torch.int64), logits, (logits,))
