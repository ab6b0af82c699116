"""Images made from known factors, so that it can be measured which part of a code tells of which factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIDE = 16


@dataclass(frozen=True)
class FactorImages:
    """Every combination of the factors, once.

    Attributes:
        x: grey images, values in [0, 1].
        factors: column, row, size, shape and brightness of what is shown, as indices.
    """

    x: Float[Tensor, "images 1 side side"]
    factors: Int[Tensor, "images 5"]


def shapes(places: int = 8, sizes: int = 4, brightnesses: int = 4) -> FactorImages:
    """A square, a disc or a cross of several sizes and brightnesses at each place of a grid, 16 x 16 pixels.

    Edges are smooth over about a pixel, so that places between pixels show.

    Example:
        >>> images = shapes(places=2, sizes=2, brightnesses=2)
        >>> images.x.shape, images.factors.shape
        (torch.Size([48, 1, 16, 16]), torch.Size([48, 5]))
    """
    counts = (places, places, sizes, 3, brightnesses)
    factors = torch.cartesian_prod(*(torch.arange(count) for count in counts))
    column, row, size, shape, brightness = factors.T[:, :, None, None].double()

    def spread(index: Tensor, count: int, low: float, high: float) -> Tensor:
        return low + (high - low) * index / (count - 1)

    axis = torch.arange(SIDE, dtype=torch.float64)
    dx = (axis - spread(column, places, 4.0, 11.0)).abs()
    dy = (axis[:, None] - spread(row, places, 4.0, 11.0)).abs()
    radius = spread(size, sizes, 1.5, 4.0)
    square = torch.maximum(dx, dy) - radius
    disc = (dx.square() + dy.square()).sqrt() - 1.1 * radius
    cross = torch.maximum(torch.minimum(dx, dy) - 0.35 * radius, torch.maximum(dx, dy) - 1.3 * radius)
    outside = torch.where(shape == 0, square, torch.where(shape == 1, disc, cross))
    inked = (0.5 - outside).clamp(0, 1) * spread(brightness, brightnesses, 0.4, 1.0)
    return FactorImages(inked[:, None].float(), factors)
