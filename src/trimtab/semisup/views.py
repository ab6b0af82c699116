"""Weak and strong views of a batch of small images, in plain torch.

What consistency training compares: a weak view is the image shifted by a few pixels and perhaps mirrored; a strong one
has besides a few distortions out of ten, of random strength, and a square cut out. Every image of the batch has its own
draw, and the whole batch is distorted at once: one resampling for all that moves pixels, one affine map for all that
changes values. What was drawn is an object of its own, so that it can be passed, checked, or used for a mask as well:

    drawn = draw_weak(x, generator=generator)
    x_weak, masks_weak = distort(x, drawn), distort_masks(masks, drawn)

The strong view is a lighter form of RandAugment with Cutout, as in FixMatch.

Reference: Ekin D. Cubuk, Barret Zoph, Jonathon Shlens and Quoc V. Le, "RandAugment: Practical Automated Data
Augmentation with a Reduced Search Space", NeurIPS 2020, arXiv 1909.13719; Terrance DeVries and Graham W. Taylor,
"Improved Regularization of Convolutional Neural Networks with Cutout", 2017, arXiv 1708.04552.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import floating_tensor, in_range, integer, non_negative

MOVES = ("rotate", "shear x", "shear y", "shift x", "shift y", "scale")
LIGHTS = ("contrast", "brightness", "sharpness")
KINDS = (*MOVES, *LIGHTS, "none")


@dataclass(frozen=True)
class Distortion:
    """What is done to each image of a batch.

    Attributes:
        matrix: from the places of the view to those of the image, both in [-1, 1], x before y.
        contrast: factor of the distance from the image's mean; like the rest, None leaves all images alone.
        brightness: added afterwards, in units of the values.
        sharpness: share of what a 3 by 3 mean takes away that is added (above 0) or left out (below).
        cut: top, left, bottom and right of the square that takes the image's mean; empty where bottom is top.
    """

    matrix: Float[Tensor, "batch 2 3"]
    contrast: Float[Tensor, " batch"] | None = None
    brightness: Float[Tensor, " batch"] | None = None
    sharpness: Float[Tensor, " batch"] | None = None
    cut: Int[Tensor, "batch 4"] | None = None


def weak_view(
    x: Float[Tensor, "batch channels height width"],
    *,
    shift: float = 0.125,
    degrees: float = 0.0,
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Every image shifted by whole pixels, perhaps mirrored and turned; arguments and errors are `draw_weak`'s.

    Example:
        >>> x = torch.zeros(2, 1, 4, 4)
        >>> weak_view(x, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 4, 4])
    """
    return distort(x, draw_weak(x, shift=shift, degrees=degrees, flip=flip, generator=generator))


def strong_view(
    x: Float[Tensor, "batch channels height width"],
    *,
    count: int = 2,
    strength: float = 1.0,
    moves: bool = True,
    cutout: float = 0.5,
    shift: float = 0.125,
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Every image with a few distortions of its own and a square cut out; arguments and errors are `draw_strong`'s.

    Example:
        >>> x = torch.rand(2, 1, 8, 8)
        >>> strong_view(x, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """
    drawn = draw_strong(
        x, count=count, strength=strength, moves=moves, cutout=cutout, shift=shift, flip=flip, generator=generator
    )
    return distort(x, drawn)


def draw_weak(
    x: Float[Tensor, "batch channels height width"],
    *,
    shift: float = 0.125,
    degrees: float = 0.0,
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> Distortion:
    """Draws a weak view for each image of a batch.

    Args:
        x: images, of which only the shape is used.
        shift: largest shift, as a share of the side, in [0, 1); whole pixels are drawn.
        degrees: largest turn, either way.
        flip: mirror half of the images left to right.
        generator: source of the draws, on the CPU.

    Raises:
        TypeError: if `x` is no floating-point tensor.
        ValueError: if `x` is not four-dimensional, or an option is out of range.

    Example:
        >>> drawn = draw_weak(torch.zeros(3, 1, 8, 8), shift=0.0)
        >>> drawn.matrix[0, :, 2]
        tensor([0., 0.])
    """
    _checked(x)
    in_range("shift", shift, 0, 1, "left")
    batch, _, height, width = x.shape
    angle = math.radians(non_negative("degrees", degrees)) * _between(batch, generator)
    mirror = 1 - 2 * (torch.rand(batch, generator=generator) < 0.5).float() if flip else torch.ones(batch)
    places = []
    for side in (width, height):
        reach = round(shift * side)
        places.append(2 / side * torch.randint(-reach, reach + 1, (batch,), generator=generator))
    cos, sin = angle.cos(), angle.sin()
    rows = [mirror * cos, -mirror * sin, places[0], sin, cos, places[1]]
    return Distortion(torch.stack(rows, 1).view(batch, 2, 3))


def draw_strong(
    x: Float[Tensor, "batch channels height width"],
    *,
    count: int = 2,
    strength: float = 1.0,
    moves: bool = True,
    cutout: float = 0.5,
    shift: float = 0.125,
    flip: bool = False,
    generator: torch.Generator | None = None,
) -> Distortion:
    """Draws a strong view for each image: a weak one, and `count` different distortions, each of random strength.

    At strength 1 they reach a turn of 30 degrees, a shear of 0.3, a shift of 0.3 of the side, a scale of 1.3, a
    contrast of 1 ± 0.9, a brightness of ± 0.5 and a sharpness of ± 1: RandAugment's ranges, for values in [0, 1].

    Args:
        x: images, of which only the shape is used.
        count: distortions of an image, of ten kinds, one of which does nothing; of four without `moves`.
        strength: factor of all ranges.
        moves: whether pixels may move; without, a mask stays right.
        cutout: largest side of the square that is cut out, as a share of the image's, in [0, 1].
        shift: largest shift of the weak view below, as a share of the side; without `moves` there is none.
        flip: mirror half of the images; without `moves` none.
        generator: source of the draws, on the CPU.

    Raises:
        TypeError: if `x` is no floating-point tensor.
        ValueError: if `x` is not four-dimensional, or an option is out of range.

    Example:
        >>> drawn = draw_strong(torch.zeros(3, 1, 8, 8), count=0, cutout=0.0, shift=0.0)
        >>> torch.equal(drawn.matrix, draw_weak(torch.zeros(3, 1, 8, 8), shift=0.0).matrix)
        True
    """
    kinds = KINDS if moves else (*LIGHTS, "none")
    integer("count", count, 0, len(kinds))
    non_negative("strength", strength)
    in_range("cutout", cutout, 0, 1)
    weak = draw_weak(x, shift=shift if moves else 0.0, flip=flip and moves, generator=generator)
    batch, _, height, width = x.shape
    # Which kinds an image has: those with the largest of as many random numbers.
    ranks = torch.rand(batch, len(kinds), generator=generator).argsort(1).argsort(1)
    amounts = strength * _between(batch, generator, len(kinds)) * (ranks < count)
    amount = dict(zip(kinds, amounts.T, strict=True))
    none, one = torch.zeros(batch), torch.ones(batch)
    matrix = weak.matrix
    if moves:
        angle, scale = math.pi / 6 * amount["rotate"], 1.3 ** amount["scale"]
        cos, sin = scale * angle.cos(), scale * angle.sin()
        turn = _matrices(cos, -sin, none, sin, cos, none)
        shear = _matrices(one, 0.3 * amount["shear x"], none, 0.3 * amount["shear y"], one, none)
        move = _matrices(one, none, 0.6 * amount["shift x"], none, one, 0.6 * amount["shift y"])
        below = torch.cat([matrix, torch.tensor([[[0.0, 0.0, 1.0]]]).expand(batch, 1, 3)], 1)
        matrix = (below @ move @ turn @ shear)[:, :2]
    size = cutout * torch.rand(batch, generator=generator)
    centre = torch.rand(batch, 2, generator=generator)
    side = torch.tensor([height, width])
    low = ((centre - size[:, None] / 2) * side).round().clamp_min(0)
    high = ((centre + size[:, None] / 2) * side).round()
    cut = torch.cat([low, torch.minimum(high, side)], 1).long()
    light = (1 + 0.9 * amount["contrast"], 0.5 * amount["brightness"], amount["sharpness"])
    return Distortion(matrix, *light, cut)


def distort(
    x: Float[Tensor, "batch channels height width"], drawn: Distortion
) -> Float[Tensor, "batch channels height width"]:
    """The view that was drawn. Outside of the image its border goes on.

    Raises:
        TypeError: if `x` is no floating-point tensor.
        ValueError: if `x` is not four-dimensional, or not of the batch that was drawn for.

    Example:
        >>> x = torch.rand(2, 1, 4, 4)
        >>> torch.allclose(distort(x, draw_weak(x, shift=0.0)), x, atol=1e-6)
        True
    """
    _checked(x, drawn)
    view = _resampled(x, drawn, "bilinear")
    mean = view.mean((1, 2, 3), keepdim=True)
    if drawn.sharpness is not None:
        soft = F.avg_pool2d(F.pad(view, (1, 1, 1, 1), mode="replicate"), 3, 1)
        view = torch.addcmul(view, _per_image(drawn.sharpness, x), view - soft)
    if drawn.contrast is not None:
        view = torch.addcmul(mean, _per_image(drawn.contrast, x), view - mean)
    if drawn.brightness is not None:
        view = view + _per_image(drawn.brightness, x)
    if drawn.cut is None:
        return view
    top, left, bottom, right = drawn.cut.to(x.device).T.unsqueeze(-1)
    rows, columns = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
    inside = ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None]
    return torch.where(inside[:, None], mean, view)


def distort_masks(masks: Int[Tensor, "batch height width"], drawn: Distortion) -> Int[Tensor, "batch height width"]:
    """The masks of images that were distorted: they move with the pixels, and keep their values.

    Raises:
        TypeError: if `masks` are no tensor of integers.
        ValueError: if they are not three-dimensional, or not of the batch that was drawn for.

    Example:
        >>> masks = torch.randint(3, (2, 4, 4))
        >>> torch.equal(distort_masks(masks, draw_weak(masks[:, None].float(), shift=0.0)), masks)
        True
    """
    if not isinstance(masks, Tensor) or masks.is_floating_point() or masks.is_complex():
        raise TypeError(f"masks must be a tensor of integers, got {getattr(masks, 'dtype', type(masks).__name__)}")
    if masks.ndim != 3 or len(masks) != len(drawn.matrix):
        wanted = f"(batch, height, width) of {len(drawn.matrix)} images"
        raise ValueError(f"masks must be {wanted}, got shape {tuple(masks.shape)}")
    return _resampled(masks[:, None].float(), drawn, "nearest")[:, 0].to(masks.dtype)


def _resampled(x: Tensor, drawn: Distortion, mode: str) -> Tensor:
    grid = F.affine_grid(drawn.matrix.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)


def _per_image(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.to(x).view(-1, 1, 1, 1)


def _matrices(*entries: Tensor) -> Tensor:
    """Maps of places, three by three, from the entries of their upper two rows."""
    upper = torch.stack(entries, 1).view(-1, 2, 3)
    return torch.cat([upper, upper.new_tensor([[[0.0, 0.0, 1.0]]]).expand(len(upper), 1, 3)], 1)


def _between(batch: int, generator: torch.Generator | None, *more: int) -> Tensor:
    """Uniform numbers in [-1, 1)."""
    return 2 * torch.rand(batch, *more, generator=generator) - 1


def _checked(x: Tensor, drawn: Distortion | None = None) -> None:
    floating_tensor("x", x)
    if x.ndim != 4 or x.numel() == 0:
        wanted = "(batch, channels, height, width) with at least one image"
        raise ValueError(f"x must be {wanted}, got shape {tuple(x.shape)}")
    if drawn is not None and len(x) != len(drawn.matrix):
        raise ValueError(f"x must be {len(drawn.matrix)} images, as drawn for, got {len(x)}")
