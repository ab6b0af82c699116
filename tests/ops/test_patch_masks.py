"""Random masks of patches: shares, blocks, what noise decides, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimtab.ops.patch_masks import hide_patches, patch_grid, random_patch_mask, spread_patches


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_share_and_blocks() -> None:
    mask = random_patch_mask((500, 12, 20), 4, 0.7, generator=seeded())
    assert mask.shape == (500, 1, 12, 20)
    blocks = mask.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert ((blocks.all(-1)) | (~blocks).all(-1)).all()
    patches = blocks[..., 0].float()
    assert abs(patches.mean() - 0.7) < 3 * (0.7 * 0.3 / patches.numel()) ** 0.5
    assert patches.sum((1, 2, 3)).unique().numel() > 3  # each patch by itself


def test_exact_share() -> None:
    mask = random_patch_mask((50, 8, 8), 2, 0.3, exact=True, generator=seeded())
    assert (mask[:, 0, ::2, ::2].sum((1, 2)) == round(0.3 * 16)).all()
    assert mask[0].ne(mask[1]).any()


@pytest.mark.parametrize("exact", [False, True])
def test_ends(exact: bool) -> None:
    assert not random_patch_mask((3, 8, 8), 2, 0.0, exact=exact, generator=seeded()).any()
    assert random_patch_mask((3, 8, 8), 2, 1.0, exact=exact, generator=seeded()).all()
    assert random_patch_mask((0, 8, 8), 2, 0.5, exact=exact, generator=seeded()).shape == (0, 1, 8, 8)


def test_a_larger_share_hides_more_of_the_same() -> None:
    noise = torch.rand(4, 5, 5, generator=seeded())
    for exact in (False, True):
        little, much = (hide_patches(noise, ratio, exact=exact) for ratio in (0.3, 0.6))
        assert (much | ~little).all()
        assert much.sum() > little.sum()


def test_uneven_sides_are_rounded() -> None:
    """As nearest interpolation of the grid, with round(side / patch) patches."""
    assert patch_grid(28, 10, 8) == (4, 1)
    noise = torch.rand(2, 4, 3, generator=seeded())
    expected = F.interpolate(noise[:, None], (30, 23), mode="nearest")
    assert torch.equal(spread_patches(noise, 30, 23), expected)


def test_the_generator_decides() -> None:
    before = torch.get_rng_state()
    one, same, other = (random_patch_mask((4, 8, 8), 2, 0.5, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_refused() -> None:
    for match, call in {
        "patch must be at most": lambda: random_patch_mask((2, 8, 8), 9, 0.5),
        "ratio must be in": lambda: random_patch_mask((2, 8, 8), 2, 1.5),
        "noise must be of shape": lambda: hide_patches(torch.rand(3), 0.5),
        "patches must be of shape": lambda: spread_patches(torch.rand(3, 2), 4, 4),
        "height and width must be at least": lambda: spread_patches(torch.rand(3, 2, 2), 1, 4),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="noise must be floating point"):
        hide_patches(torch.ones(2, 3, dtype=torch.int64), 0.5)
