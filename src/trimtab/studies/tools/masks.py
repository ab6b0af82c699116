"""Masks of pixels: a view that changes an image and its mask alike, and where two classes meet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def random_view(
    x: Float[Tensor, "n 1 h w"], y: Int[Tensor, "n h w"], generator: torch.Generator, reach: int = 4
) -> tuple[Tensor, Tensor]:
    """Every image mirrored or not, shifted by up to `reach` pixels, lit anew and with noise, and its mask likewise."""
    count, side = len(y), y.shape[-1]
    flip = torch.rand(count, generator=generator).to(x.device) < 0.5
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    y = torch.where(flip.view(-1, 1, 1), y.flip(-1), y)
    places = torch.arange(side, device=x.device)
    offsets = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator).to(x.device)
    rows, columns = (places + offsets).clamp(0, side - 1)
    image = torch.arange(count, device=x.device)[:, None, None]
    x, y = x[image, 0, rows[:, :, None], columns[:, None]][:, None], y[image, rows[:, :, None], columns[:, None]]
    light = (0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)).to(x)
    noise = 0.05 * torch.randn(x.shape, generator=generator)
    return x * light + noise.to(x), y


def boundary(truth: Int[Tensor, "n h w"], reach: int = 2) -> Tensor:
    """Which pixels have another class within `reach` pixels."""
    labels = truth.float()[:, None]
    highest = F.max_pool2d(labels, 2 * reach + 1, 1, reach)
    lowest = -F.max_pool2d(-labels, 2 * reach + 1, 1, reach)
    return (highest != lowest)[:, 0]
