"""Random masks of square patches, as masked images and masked image models use them.

True is what is hidden. `hide_patches` draws the line between hidden and seen from noise that was drawn before, so that
it can be checked exactly; `spread_patches` stretches a grid of patches over the pixels; `random_patch_mask` is both.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from trimtab.ops.arguments import floating_tensor, in_range, integer


def patch_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of patches in an image: its sides over the patch's, rounded.

    Where a patch does not divide a side, patches are stretched or squeezed a little.

    Args:
        height, width: of the image.
        patch: side of a patch in pixels, no larger than the image's shorter side.

    Raises:
        ValueError: the patch is larger than the image, or a size is not positive.

    Example:
        >>> patch_grid(28, 30, 7)
        (4, 4)
    """
    height, width = integer("height", height), integer("width", width)
    patch = integer("patch", patch)
    if patch > min(height, width):
        raise ValueError(f"patch must be at most the image's side, {min(height, width)}, got {patch}")
    return round(height / patch), round(width / patch)


@torch.no_grad()
def hide_patches(
    noise: Float[Tensor, "batch *grid"], ratio: float, *, exact: bool = False
) -> Bool[Tensor, "batch *grid"]:
    """Which patches are hidden, decided by uniform noise.

    Args:
        noise: a number in [0, 1) for each patch of each sample; the smallest ones are hidden. Any scores do where
            `exact`, since only their order counts then.
        ratio: share that is hidden, in [0, 1].
        exact: hide that share of every sample's patches, rounded; otherwise each patch by itself with that probability.

    Returns:
        True where a patch is hidden.

    Raises:
        TypeError: `noise` is not floating point.
        ValueError: `ratio` is out of range, or `noise` has no grid.

    Example:
        >>> hide_patches(torch.tensor([[0.1, 0.9, 0.4, 0.3]]), 0.5)
        tensor([[ True, False,  True,  True]])
        >>> hide_patches(torch.tensor([[0.1, 0.9, 0.4, 0.3]]), 0.5, exact=True)
        tensor([[ True, False, False,  True]])
    """
    in_range("ratio", ratio, 0, 1)
    floating_tensor("noise", noise)
    if noise.ndim < 2:
        raise ValueError(f"noise must be of shape (batch, patches) or (batch, rows, columns), got {tuple(noise.shape)}")
    if not exact:
        return noise < ratio
    flat = noise.flatten(1)
    hidden = torch.zeros_like(flat, dtype=torch.bool)
    chosen = flat.argsort(dim=1, stable=True)[:, : round(ratio * flat.shape[1])]
    return hidden.scatter_(1, chosen, True).view(noise.shape)


def spread_patches(
    patches: Shaped[Tensor, "batch rows columns"], height: int, width: int
) -> Shaped[Tensor, "batch 1 height width"]:
    """A value for each pixel from one for each patch: the nearest patch's, as a channel.

    Args:
        patches: of any type.
        height, width: of the image, at least as large as the grid.

    Raises:
        TypeError: `patches` is no tensor, or a size no integer.
        ValueError: there is no grid of patches, or it is larger than the image.

    Example:
        >>> spread_patches(torch.tensor([[[1, 2]]]), 2, 4)
        tensor([[[[1, 1, 2, 2],
                  [1, 1, 2, 2]]]])
    """
    if not isinstance(patches, Tensor):
        raise TypeError(f"patches must be a tensor, got {type(patches).__name__}")
    if patches.ndim != 3 or 0 in patches.shape[1:]:
        raise ValueError(f"patches must be of shape (batch, rows, columns), got {tuple(patches.shape)}")
    rows, columns = patches.shape[1:]
    if integer("height", height) < rows or integer("width", width) < columns:
        raise ValueError(f"height and width must be at least {rows} and {columns}, got {height} and {width}")
    row = torch.arange(height, device=patches.device) * rows // height
    column = torch.arange(width, device=patches.device) * columns // width
    return patches.index_select(2, column).index_select(1, row)[:, None]  # whole rows are copied at once


def random_patch_mask(
    shape: tuple[int, int, int],
    patch: int,
    ratio: float,
    *,
    exact: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "batch 1 height width"]:
    """A mask of the pixels of a batch of images, constant in each patch: `x.masked_fill(mask, 0)`.

    Args:
        shape: (batch, height, width).
        patch: side of a patch in pixels.
        ratio: share of the patches that is hidden, in [0, 1].
        exact: hide that share of each image's patches, rounded; otherwise each patch with that probability.
        generator: decides what is drawn; the mask does not depend on `device` then.
        device: where the mask is wanted.

    Returns:
        True where a pixel is hidden.

    Raises:
        ValueError: a size is not positive, the patch is larger than the image, or `ratio` is out of range.

    Example:
        >>> mask = random_patch_mask((2, 4, 4), 2, 0.25, exact=True, generator=torch.Generator().manual_seed(0))
        >>> mask.flatten(1).sum(1)  # one patch of four pixels in each
        tensor([4, 4])
    """
    batch, height, width = shape
    integer("shape", batch, 0)
    in_range("ratio", ratio, 0, 1)
    rows, columns = patch_grid(height, width, patch)
    at = device if generator is None else generator.device
    noise = torch.rand(batch, rows, columns, generator=generator, device=at)
    return spread_patches(hide_patches(noise, ratio, exact=exact).to(device), height, width)
