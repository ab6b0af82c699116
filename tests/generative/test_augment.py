"""Differentiable augmentations: repeated exactly, the identity in the middle, and what each one does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.generative import DiffAugment
from trimtab.generative.augment import brighten, change_contrast, cut_out, saturate, translate

WHOLE = DiffAugment(("color", "light", "translation", "cutout"))


def images(count: int = 6, channels: int = 3, side: int = 16) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_same_parameters_give_the_same_images_and_the_generator_decides_them() -> None:
    x, generator = images(), torch.Generator().manual_seed(1)
    state = torch.random.get_rng_state()
    changed, params = WHOLE(x, generator=generator)
    assert torch.equal(torch.random.get_rng_state(), state)
    again, same = WHOLE(x, params)
    assert torch.equal(changed, again)
    assert same is params
    assert torch.equal(WHOLE(x, generator=torch.Generator().manual_seed(1))[0], changed)
    assert not torch.equal(WHOLE(x, generator=generator)[0], changed)
    assert {name: tuple(value.shape) for name, value in params.items()} == {
        name: (6, count) for name, count in WHOLE.counts.items()
    }


@pytest.mark.parametrize("side", [3, 8, 14, 15])
def test_parameters_fill_their_range_and_whole_pixels_are_equally_likely(side: int) -> None:
    x = torch.zeros(6000, 1, side, side)
    params = WHOLE.draw(x, torch.Generator().manual_seed(0))
    for value in params.values():
        assert bool(((value >= 0) & (value <= 1)).all())
        torch.testing.assert_close(value.mean(0), torch.full_like(value[0], 0.5), atol=0.03, rtol=0.0)
    most = int(side / 8 + 0.5)
    shifts = params["translation"] * 2 * most - most
    if most:
        torch.testing.assert_close(shifts, shifts.round(), atol=1e-4, rtol=0.0)
        counts = (shifts[:, 0].round() + most).long().bincount(minlength=2 * most + 1) / len(x)
        torch.testing.assert_close(counts, torch.full_like(counts, 1 / (2 * most + 1)), atol=0.03, rtol=0.0)
    else:
        assert torch.equal(params["translation"], torch.full((6000, 2), 0.5))


def test_in_the_middle_nothing_changes() -> None:
    x = images()
    half = torch.full((6,), 0.5, dtype=x.dtype)
    for change in (brighten, saturate, change_contrast):
        torch.testing.assert_close(change(x, half), x)
    assert torch.equal(translate(x, torch.stack([half, half], 1)), x)


def test_light_and_colour() -> None:
    x, amount = images(), torch.linspace(0, 1, 6, dtype=torch.float64)
    torch.testing.assert_close(brighten(x, amount).mean((1, 2, 3)) - x.mean((1, 2, 3)), amount - 0.5)
    contrast = change_contrast(x, amount)
    torch.testing.assert_close(contrast.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(contrast.std((1, 2, 3)), (amount + 0.5) * x.std((1, 2, 3)))
    grey = saturate(x, torch.zeros(6, dtype=x.dtype))
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))
    torch.testing.assert_close(saturate(x, torch.ones(6, dtype=x.dtype)) - grey, 2 * (x - grey))
    one_channel = images(channels=1)
    torch.testing.assert_close(saturate(one_channel, amount), one_channel)


def test_translation_is_a_shift_by_whole_pixels_with_zeros_coming_in() -> None:
    x = images(side=16)  # at most 2 pixels
    params = torch.tensor([[0.0, 0.5], [1.0, 0.5], [0.5, 0.25], [0.5, 1.0], [0.75, 0.0], [0.5, 0.5]], dtype=x.dtype)
    for image, changed, (down, right) in zip(x, translate(x, params), (4 * params - 2).long().tolist(), strict=True):
        expected = torch.zeros_like(image)
        for i in range(16):
            for j in range(16):
                if 0 <= i - down < 16 and 0 <= j - right < 16:
                    expected[:, i, j] = image[:, i - down, j - right]
        assert torch.equal(changed, expected)


def test_cutout_blanks_a_square_of_half_the_side_that_may_reach_over_the_edge() -> None:
    x = torch.ones(3, 2, 8, 8)
    cut = cut_out(x, torch.tensor([[0.5, 0.5], [0.0, 0.5], [1.0, 1.0]]))
    assert (cut == 0).sum((1, 2, 3)).tolist() == [2 * 16, 2 * 8, 2 * 4]
    assert not bool(cut[0, :, 2:6, 2:6].any())
    assert not bool(cut[1, :, :2, 2:6].any())
    assert not bool(cut[2, :, 6:, 6:].any())


def test_a_cutout_of_odd_size_is_centred_on_every_pixel_and_no_further() -> None:
    x = torch.ones(6, 1, 6, 6)
    cut = cut_out(x, torch.linspace(0, 1, 6)[:, None].expand(-1, 2))  # squares of side 3 around (0, 0), (1, 1), ...
    expected = torch.ones_like(x)
    for place in range(6):
        expected[place, 0, max(0, place - 1) : place + 2, max(0, place - 1) : place + 2] = 0
    assert torch.equal(cut, expected)


def test_gradients_reach_the_image_and_only_where_it_is_seen() -> None:
    augment = DiffAugment(("color", "translation", "cutout"))
    small = images(2, side=8).requires_grad_()
    own = augment.draw(small, torch.Generator().manual_seed(3))
    assert torch.autograd.gradcheck(lambda x: augment(x, own)[0], small)
    seen = torch.ones(1, 1, 8, 8, requires_grad=True)
    cut_out(seen, torch.tensor([[0.5, 0.5]])).sum().backward()
    assert (seen.grad == 0).sum() == 16


def test_an_image_does_not_depend_on_its_batch() -> None:
    x = images()
    changed, params = WHOLE(x, generator=torch.Generator().manual_seed(2))
    alone, _ = WHOLE(x[2:3], {name: value[2:3] for name, value in params.items()})
    torch.testing.assert_close(alone, changed[2:3])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="policy must be one of 'color'"):
        DiffAugment(("colour",))
    with pytest.raises(ValueError, match="policy must name each augmentation once"):
        DiffAugment(("cutout", "cutout"))
    augment, generator = DiffAugment(("cutout",)), torch.Generator().manual_seed(0)
    state = generator.get_state()
    with pytest.raises(ValueError, match="x must be of shape"):
        augment(torch.zeros(3, 8, 8), generator=generator)
    with pytest.raises(TypeError, match="x must be floating point"):
        augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), generator=generator)
    for params in ({}, {"cutout": torch.zeros(2, 2)}, {"cutout": torch.zeros(1, 2), "light": torch.zeros(1, 2)}):
        with pytest.raises(ValueError, match="params must be of"):
            augment(torch.zeros(1, 3, 8, 8), params)
    assert torch.equal(generator.get_state(), state)
