"""Random crops of images, resized to their size, through which gradients flow."""

from __future__ import annotations

from numbers import Integral

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def random_boxes(
    batch: int,
    scale: tuple[float, float] = (0.5, 0.9),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch 4"]:
    """Where to crop: for each image top, left, height and width, as shares of its side.

    Area and ratio of sides are drawn as in torchvision's `RandomResizedCrop`: the area uniformly, the ratio of width to
    height uniformly in its logarithm; a box that would not fit is cut to the image.

    Args:
        batch: number of images.
        scale: least and largest area.
        ratio: least and largest ratio of width to height.
        generator: source of the draws; torch's global one where it is None.

    Raises:
        ValueError: `batch` is negative, a range is not one of positive numbers, or of areas not within (0, 1].

    Example:
        >>> random_boxes(2, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        tensor([[0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """
    if isinstance(batch, bool) or not isinstance(batch, int | Integral) or batch < 0:
        raise ValueError(f"batch must be an integer of at least 0, got {batch!r}")
    if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in (scale, ratio)):
        raise ValueError(f"scale and ratio must be two numbers each, got {scale} and {ratio}")
    for name, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, float("inf"))):
        if not 0 < low <= high <= most:
            raise ValueError(f"{name} must be two numbers above 0 in order, got {(low, high)}")
    device = generator.device if generator is not None else None
    area, shape, top, left = torch.rand(4, batch, generator=generator, device=device)
    area = scale[0] + (scale[1] - scale[0]) * area
    log_low, log_high = torch.tensor(ratio).log()
    root = ((log_low + (log_high - log_low) * shape) / 2).exp()
    height, width = (area.sqrt() / root).clamp_max(1), (area.sqrt() * root).clamp_max(1)
    return torch.stack([top * (1 - height), left * (1 - width), height, width], 1)


def crop_resized(
    x: Float[Tensor, "batch channels height width"], boxes: Float[Tensor, "batch 4"]
) -> Float[Tensor, "batch channels height width"]:
    """What lies in each image's box, resized to the image's size by bilinear interpolation; gradients flow.

    Args:
        x: images.
        boxes: of each image top, left, height and width, as shares of its side.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: `x` is no batch of images, or there is not one box for each.

    Example:
        >>> x = torch.arange(16.0).view(1, 1, 4, 4)
        >>> crop_resized(x, torch.tensor([[0.0, 0.0, 0.5, 0.5]]))[0, 0, 0]
        tensor([0.0000, 0.2500, 0.7500, 1.2500])
    """
    if not all(isinstance(held, Tensor) and held.is_floating_point() for held in (x, boxes)):
        raise TypeError("x and boxes must be floating-point tensors, got others")
    if x.ndim != 4 or len(x) == 0 or boxes.shape != (len(x), 4):
        raise ValueError(
            "x and boxes must be (batch, channels, height, width), not empty, and (batch, 4), got "
            f"{tuple(x.shape)} and {tuple(boxes.shape)}"
        )
    top, left, height, width = boxes.to(x).unbind(1)
    none = torch.zeros_like(top)
    # affine_grid's coordinates run from -1 to 1 across the image.
    across = torch.stack([width, none, 2 * left + width - 1], 1)
    down = torch.stack([none, height, 2 * top + height - 1], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
