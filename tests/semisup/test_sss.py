from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimtab.semisup import (
    CoarseMaskHead,
    DiscriminativeFeatureEnhancement,
    PCSWPromptGenerator,
    SSSLoss,
    fuse_views,
    weak_to_strong_loss,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def enhancement(*dims: int, **options: int) -> DiscriminativeFeatureEnhancement:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return DiscriminativeFeatureEnhancement(dims, **options).double()


def test_equal_views_are_transformed_and_opposite_ones_leave_their_difference() -> None:
    weak = drawn(2, 4, 3, 3)
    torch.testing.assert_close(fuse_views(weak, weak, torch.sin), weak.sin())
    # A cosine of -1: the strong view has the larger share, and twice the difference is added.
    share = torch.sigmoid(torch.tensor(-1.0, dtype=torch.float64))
    wanted = share * weak.sin() + (1 - share) * (-weak).sin() - 4 * weak
    torch.testing.assert_close(fuse_views(weak, -weak, torch.sin), wanted)


def test_one_cosine_of_the_means_weighs_all_places() -> None:
    weak, strong = torch.zeros(1, 2, 1, 2).double(), torch.zeros(1, 2, 1, 2).double()
    weak[0, 0], strong[0, 1, 0, 0] = 2.0, 6.0  # means (2, 0) and (0, 3) are at a right angle
    found = fuse_views(weak, strong, lambda features: 10 * features)
    # Half of ten times either, and the whole of the difference, in each place.
    assert found[0, :, 0, 0].tolist() == [10 - 2, 30 + 6]
    assert found[0, :, 0, 1].tolist() == [10 - 2, 0]


def test_scales_keep_their_sizes_or_are_brought_to_one() -> None:
    weak, strong = ([drawn(2, 4, 6, 6, seed=s), drawn(2, 8, 3, 3, seed=s)] for s in (0, 1))
    assert [tuple(part.shape) for part in enhancement(4, 8)(weak, strong)] == [(2, 4, 6, 6), (2, 8, 3, 3)]
    made = enhancement(4, 8, out_dim=8, hidden=5)
    assert [tuple(part.shape) for part in made(weak, strong)] == [(2, 8, 6, 6), (2, 8, 3, 3)]
    assert isinstance(made.project[1], torch.nn.Identity)


def test_the_enhancement_by_hand() -> None:
    made, weak, strong = enhancement(4), drawn(2, 4, 5, 5), drawn(2, 4, 5, 5, seed=1)
    one, other = (made.align[0](part) for part in (weak, strong))
    alike = F.cosine_similarity(one.mean((2, 3)), other.mean((2, 3)))[:, None, None, None]
    layers = made.place[0].layers
    assert [type(layer).__name__ for layer in layers] == ["Linear", "LayerNorm", "ReLU"] * 3 + ["Linear"]
    assert [layer.out_features for layer in layers if hasattr(layer, "out_features")] == [8, 8, 4, 4]
    each = [layers(part.movedim(1, 3)).movedim(3, 1) for part in (one, other)]
    wanted = alike.sigmoid() * each[0] + (1 - alike.sigmoid()) * each[1] + (1 - alike) * (other - one)
    torch.testing.assert_close(made([weak], [strong])[0], wanted)


def test_both_views_and_all_weights_learn() -> None:
    made = enhancement(4, 8, out_dim=8)
    weak, strong = ([drawn(2, 4, 6, 6, seed=s), drawn(2, 8, 3, 3, seed=s)] for s in (0, 1))
    views = [part.requires_grad_() for part in (*weak, *strong)]
    sum((scale * drawn(*scale.shape, seed=9)).sum() for scale in made(weak, strong)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*made.parameters(), *views))


def test_half_precision_keeps_the_cosine_exact() -> None:
    made, weak, strong = enhancement(4).float(), drawn(2, 4, 5, 5).float(), drawn(2, 4, 5, 5, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = made([weak], [strong])[0]
    torch.testing.assert_close(half.float(), made([weak], [strong])[0], rtol=0.05, atol=0.05)


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


def ball(slices: int = 12, side: int = 20, at: tuple[int, int, int] = (6, 8, 11), radius: int = 4) -> torch.Tensor:
    depth, rows, columns = torch.meshgrid(torch.arange(slices), torch.arange(side), torch.arange(side), indexing="ij")
    return ((depth - at[0]) ** 2 + (rows - at[1]) ** 2 + (columns - at[2]) ** 2 <= radius**2).long()


def test_a_ball_is_prompted_in_its_largest_slice() -> None:
    prompts = PCSWPromptGenerator()(3 * ball())
    assert prompts.class_ids.tolist() == [3]
    assert prompts.continuity.tolist() == [1.0]
    # Windows of 5 slices at first; the first that sees the ball shows its slices 2 to 4, and the widest of these.
    assert prompts.slices.tolist() == [4]
    there = ball()[4].nonzero()
    (top, left), (bottom, right) = there.amin(0).tolist(), there.amax(0).tolist()
    assert prompts.boxes.tolist() == [[left, top, right + 1, bottom + 1]]
    assert prompts.points.tolist() == [[11.0, 8.0]]


def test_what_is_in_one_slice_alone_is_passed_over() -> None:
    masks = ball()
    masks[1, 0:16, 0:3] = 1  # a speck beside the ball, in a slice that the ball does not reach
    prompts = PCSWPromptGenerator()(masks)
    # Windows with that slice hold two components, of which the ball's has 55 and 68 %; the third one is without it.
    assert prompts.continuity.tolist() == [1.0]
    assert prompts.slices.tolist() == [6]
    assert prompts.boxes.tolist() == [[7, 4, 16, 13]]
    masks[1] = 0
    masks[1, ::2, ::2] = 1  # a hundred single pixels: by their number this would be the slice to prompt
    assert masks[1].sum() > ball().sum((1, 2)).max()
    assert PCSWPromptGenerator()(masks).slices.tolist() == [6]


def test_without_a_continuous_window_the_largest_slice_is_prompted_whole() -> None:
    masks = torch.zeros(6, 8, 8, dtype=torch.int64)
    masks[::2, 7, 7] = masks[::2, 0, 0] = masks[1::2, 4, 7] = masks[1::2, 1, 3] = 1  # single pixels, apart from all
    masks[3, 6, 2] = 1
    prompts = PCSWPromptGenerator()(masks)
    assert prompts.continuity.tolist() == [0.0]
    assert prompts.slices.tolist() == [3]
    there = masks[3].nonzero()
    (top, left), (bottom, right) = there.amin(0).tolist(), there.amax(0).tolist()
    assert prompts.boxes.tolist() == [[left, top, right + 1, bottom + 1]]
    assert prompts.points.tolist() == [[(left + right) / 2, (top + bottom) / 2]]


def test_corners_may_connect() -> None:
    masks = torch.zeros(4, 6, 6, dtype=torch.int64)
    for step in range(4):
        masks[step, step, step] = 1
    assert PCSWPromptGenerator()(masks).continuity.tolist() == [0.0]
    assert PCSWPromptGenerator(connectivity="corners")(masks).continuity.tolist() == [1.0]


def test_classes_have_prompts_of_their_own_and_single_slices_and_nothing_will_do() -> None:
    both = ball(at=(3, 5, 5), radius=3) + 2 * ball(at=(8, 14, 14), radius=3)
    assert PCSWPromptGenerator()(both).class_ids.tolist() == [1, 2]
    single = PCSWPromptGenerator()(ball()[6:7])
    assert single.slices.tolist() == [0]
    assert single.continuity.tolist() == [0.0]
    empty = PCSWPromptGenerator()(torch.zeros(3, 8, 8, dtype=torch.int64))
    assert len(empty) == 0
    assert (empty.boxes.shape, empty.points.shape) == ((0, 4), (0, 2))
    assert torch.equal(PCSWPromptGenerator()(both.numpy()).boxes, PCSWPromptGenerator()(both).boxes)


def test_coarse_masks_come_from_features() -> None:
    head = CoarseMaskHead(4, 3, hidden=5)
    logits = head(torch.rand(6, 4, 8, 8))
    assert logits.shape == (6, 3, 8, 8)
    PCSWPromptGenerator()(logits.argmax(1))


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: DiscriminativeFeatureEnhancement([]), ValueError, "dims"),
        (lambda: DiscriminativeFeatureEnhancement([0]), ValueError, "dims"),
        (lambda: DiscriminativeFeatureEnhancement([4], hidden=0), ValueError, "hidden"),
        (lambda: enhancement(4)([drawn(2, 4, 3, 3)], []), ValueError, "weak and strong"),
        (lambda: enhancement(4)([drawn(2, 4, 3, 3)], [drawn(2, 4, 3, 2)]), ValueError, "weak and strong"),
        (lambda: enhancement(4)([drawn(2, 3, 3, 3)], [drawn(2, 3, 3, 3)]), ValueError, "weak and strong"),
        (lambda: fuse_views(drawn(2, 3).long(), drawn(2, 3), torch.sin), TypeError, "weak"),
        (lambda: fuse_views(drawn(2, 3, 1, 1), drawn(2, 3, 1, 2), torch.sin), ValueError, "strong"),
        (lambda: CoarseMaskHead(4, 1), ValueError, "num_classes"),
        (lambda: SSSLoss(1.5), ValueError, "threshold"),
        (lambda: SSSLoss(weight=-1.0), ValueError, "weight"),
        (lambda: weak_to_strong_loss(drawn(2, 3, 4, 4), ()), ValueError, "strong"),
        (lambda: weak_to_strong_loss(drawn(2, 3, 4, 4), (drawn(2, 3, 4, 5),)), ValueError, "strong"),
        (lambda: weak_to_strong_loss(drawn(0, 3, 4, 4), (drawn(0, 3, 4, 4),)), ValueError, "weak"),
        (lambda: PCSWPromptGenerator(threshold=0.0), ValueError, "threshold"),
        (lambda: PCSWPromptGenerator(connectivity="edges"), ValueError, "connectivity"),  # type: ignore[arg-type]
        (lambda: PCSWPromptGenerator()(drawn(4, 4, 4)), TypeError, "masks"),
        (lambda: PCSWPromptGenerator()(torch.zeros(4, 4, dtype=torch.int64)), ValueError, "masks"),
        (lambda: PCSWPromptGenerator()(-ball()), ValueError, "masks"),
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
