"""Canvases with up to four digits each, every pixel labelled: on black ground, or on textured and noisy ground."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

DIGITS = 6
NUM_CLASSES = 1 + DIGITS
"""0 for the ground, and digit d is class d + 1."""
RARE = (4, 5, 6)
"""The classes that are rare: digits 3 to 5."""


@dataclass(frozen=True)
class Scenes:
    """Images and the class of every pixel."""

    x: Float[Tensor, "n 1 side side"]
    y: Int[Tensor, "n side side"]


def compose(
    images: Float[Tensor, "m 1 h h"],
    digits: Int[Tensor, " m"],
    count: int,
    rarity: float,
    generator: torch.Generator,
) -> Scenes:
    """Two to four digits on black ground, one in each quarter of a canvas, a little off its centre.

    Args:
        images: of digits.
        digits: what they are.
        count: number of canvases.
        rarity: how much more often a digit of 0 to 2 is drawn than one of 3 to 5.
        generator: decides all draws.
    """
    size = images.shape[-1]
    cell = size + 2
    odds = torch.where(torch.arange(DIGITS) + 1 < RARE[0], rarity, 1.0)
    kinds = torch.multinomial(odds.expand(count, -1), 4, replacement=True, generator=generator)
    # Images stand by kind, so that one random number picks one of the kind.
    by_kind, totals = digits.argsort(stable=True), digits.bincount(minlength=DIGITS)
    first = (totals.cumsum(0) - totals)[kinds]
    place = (torch.rand(count, 4, generator=generator) * totals[kinds]).long().minimum(totals[kinds] - 1)
    picked = by_kind[(first + place).flatten()]
    order = torch.rand(count, 4, generator=generator).argsort(1)
    there = order < torch.randint(2, 5, (count, 1), generator=generator)
    top, left = torch.randint(cell - size + 1, (2, 4 * count, 1), generator=generator)
    pasted = torch.zeros(4 * count, cell, cell)
    inside = torch.arange(size)
    pasted[torch.arange(4 * count)[:, None, None], (top + inside)[:, :, None], (left + inside)[:, None]] = images[
        picked, 0
    ]
    pasted = pasted * there.flatten()[:, None, None]
    labels = (pasted > 0.25) * (kinds.flatten() + 1)[:, None, None]
    x, y = (
        part.view(count, 2, 2, cell, cell).transpose(2, 3).reshape(count, 2 * cell, -1) for part in (pasted, labels)
    )
    return Scenes(x[:, None], y)


def weathered(
    scenes: Scenes, generator: torch.Generator, *, texture: float = 0.25, noise: float = 0.05, contrast: float = 0.9
) -> Scenes:
    """The same canvases of another domain: a paler digit before a cloudy ground, and noise.

    Args:
        scenes: on black ground.
        generator: decides all draws.
        texture: brightness of the ground's lightest spots.
        noise: deviation of the noise.
        contrast: brightness of the digits.
    """
    count, _, side, _ = scenes.x.shape
    clouds = torch.rand(count, 1, side // 4, side // 4, generator=generator)
    ground = texture * F.interpolate(clouds, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)
    grain = noise * torch.randn(scenes.x.shape, generator=generator)
    return Scenes((torch.maximum(contrast * scenes.x, ground) + grain).clamp(0, 1), scenes.y)


def class_overlaps(
    predicted: Int[Tensor, "n h w"], truth: Int[Tensor, "n h w"], num_classes: int = NUM_CLASSES
) -> Float[Tensor, " classes"]:
    """Intersection over union of each class over all pixels; 0 for a class that is nowhere."""
    pairs = torch.bincount((num_classes * truth + predicted).flatten(), minlength=num_classes**2)
    table = pairs.view(num_classes, num_classes).double()
    both = table.diag()
    return both / (table.sum(0) + table.sum(1) - both).clamp(min=1)
