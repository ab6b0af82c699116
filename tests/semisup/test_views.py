from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trimtab.semisup import Distortion, distort, distort_masks, draw_strong, draw_weak, strong_view, weak_view


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=seeded(9))


def nothing(count: int) -> Distortion:
    return draw_weak(images(count), shift=0.0)


def test_a_weak_view_shifts_by_whole_pixels_and_repeats_the_border() -> None:
    x = images(1)
    drawn = nothing(1)
    matrix = drawn.matrix.clone()
    matrix[0, 0, 2] = 2 * 2 / 8  # the view's pixel shows what was two pixels to its right
    view = distort(x, replace(drawn, matrix=matrix))
    torch.testing.assert_close(view[..., :6], x[..., 2:])
    torch.testing.assert_close(view[..., 6:], x[..., -1:].expand(-1, -1, -1, 2))


def test_every_image_has_a_shift_of_its_own_within_reach() -> None:
    x = images(200)
    shifts = draw_weak(x, shift=0.25, generator=seeded()).matrix[:, :, 2] * 4
    assert torch.equal(shifts, shifts.round())
    assert set(shifts.flatten().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = images(200)
    drawn = draw_weak(x, shift=0.0, flip=True, generator=seeded())
    mirrored = drawn.matrix[:, 0, 0] < 0
    assert 70 < int(mirrored.sum()) < 130
    view = distort(x, drawn)
    torch.testing.assert_close(view[mirrored], x[mirrored].flip(-1))
    torch.testing.assert_close(view[~mirrored], x[~mirrored])


def test_a_quarter_turn() -> None:
    x = images(1)
    drawn = nothing(1)
    turned = replace(drawn, matrix=torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]]))
    torch.testing.assert_close(distort(x, turned)[0, 0], x[0, 0].rot90())


def test_contrast_brightness_and_sharpness() -> None:
    x = images(2)
    drawn, mean = nothing(2), x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(distort(x, replace(drawn, contrast=torch.tensor([2.0, 2.0]))), 2 * x - mean)
    torch.testing.assert_close(distort(x, replace(drawn, brightness=torch.tensor([0.3, 0.3]))), x + 0.3)
    soft = distort(x, replace(drawn, sharpness=torch.tensor([-1.0, -1.0])))
    torch.testing.assert_close(soft[..., 1:-1, 1:-1], torch.nn.functional.avg_pool2d(x, 3, 1))


def test_the_cut_square_has_the_images_mean_and_nothing_else_changes() -> None:
    x = images(2)
    drawn = replace(nothing(2), cut=torch.tensor([[1, 2, 4, 7], [0, 0, 0, 0]]))
    view = distort(x, drawn)
    torch.testing.assert_close(view[1], x[1])
    torch.testing.assert_close(view[0, 0, 1:4, 2:7], x[0].mean().expand(3, 5))
    kept = torch.ones(8, 8, dtype=torch.bool)
    kept[1:4, 2:7] = False
    torch.testing.assert_close(view[0, 0][kept], x[0, 0][kept])


def test_without_distortions_a_strong_view_is_the_weak_one() -> None:
    x = images()
    strong = strong_view(x, count=0, cutout=0.0, generator=seeded(3))
    torch.testing.assert_close(strong, weak_view(x, generator=seeded(3)))
    torch.testing.assert_close(
        strong_view(x, strength=0.0, cutout=0.0, generator=seeded(3)), weak_view(x, generator=seeded(3))
    )


def test_as_many_distortions_as_asked_for_within_their_ranges() -> None:
    drawn = draw_strong(images(500), count=1, shift=0.0, cutout=0.0, generator=seeded())
    moved = (drawn.matrix - torch.eye(3)[:2]).abs().flatten(1).amax(1) > 1e-6
    changed = torch.stack([moved, drawn.contrast != 1, drawn.brightness != 0, drawn.sharpness != 0])
    assert changed.sum(0).max() == 1  # ten kinds, one of which does nothing
    assert 420 < int(changed.any(0).sum()) < 480
    assert (drawn.contrast - 1).abs().max() <= 0.9
    assert drawn.brightness.abs().max() <= 0.5
    assert drawn.sharpness.abs().max() <= 1


def test_without_moves_masks_stay_right() -> None:
    x = images(50)
    drawn = draw_strong(x, count=2, moves=False, flip=True, generator=seeded())
    torch.testing.assert_close(drawn.matrix, torch.eye(3)[:2].expand(50, 2, 3))
    masks = torch.randint(4, (50, 8, 8), generator=seeded(1))
    assert torch.equal(distort_masks(masks, drawn), masks)


def test_masks_move_with_their_pixels() -> None:
    masks = torch.randint(4, (30, 8, 8), generator=seeded(1))
    drawn = draw_weak(masks[:, None].float(), shift=0.25, flip=True, generator=seeded())
    torch.testing.assert_close(distort(masks[:, None].float(), drawn)[:, 0], distort_masks(masks, drawn).float())
    assert distort_masks(masks, drawn).dtype == masks.dtype


def test_the_generator_decides() -> None:
    x = images()
    state = torch.random.get_rng_state()
    one, same, other = (strong_view(x, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_double_precision_and_gradients_pass() -> None:
    x = images().double().requires_grad_()
    view = weak_view(x, generator=seeded())
    assert view.dtype == torch.float64
    view.sum().backward()
    assert x.grad is not None
    assert strong_view(images(1), generator=seeded()).isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: weak_view(torch.zeros(2, 8, 8)), ValueError, "x must be"),
        (lambda: weak_view(images()[:0]), ValueError, "at least one image"),
        (lambda: weak_view(torch.zeros(2, 1, 8, 8, dtype=torch.int64)), TypeError, "x must be"),
        (lambda: weak_view(images(), shift=1.0), ValueError, "shift"),
        (lambda: weak_view(images(), degrees=-1), ValueError, "degrees"),
        (lambda: strong_view(images(), count=11), ValueError, "count"),
        (lambda: strong_view(images(), count=5, moves=False), ValueError, "count"),
        (lambda: strong_view(images(), strength=-0.1), ValueError, "strength"),
        (lambda: strong_view(images(), cutout=1.5), ValueError, "cutout"),
        (lambda: distort(images(3), nothing(2)), ValueError, "x must be 2 images"),
        (lambda: distort_masks(torch.zeros(3, 8, 8).long(), nothing(2)), ValueError, "masks must be"),
        (lambda: distort_masks(torch.zeros(2, 8, 8), nothing(2)), TypeError, "masks must be"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, name) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=name):
        call()
