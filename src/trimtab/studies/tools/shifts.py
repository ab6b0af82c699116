"""Changes of grey images by which a model's surroundings may differ from those it was trained in.

Images are (n, channels, height, width) in [0, 1], and stay so. What is random takes a generator.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Images = Float[Tensor, "n channels height width"]


def noise(x: Images, generator: torch.Generator, strength: float = 0.3) -> Images:
    """Normal noise of this deviation."""
    return (x + strength * torch.randn(x.shape, generator=generator).to(x)).clamp(0, 1)


def speckle(x: Images, generator: torch.Generator, share: float = 0.15) -> Images:
    """A share of the pixels black or white."""
    drawn = torch.rand(x.shape, generator=generator).to(x)
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn > 1 - share / 2, 1.0, x))


def blur(x: Images, width: float = 1.2) -> Images:
    """A Gaussian blur of this deviation in pixels."""
    reach = max(1, math.ceil(2.5 * width))
    at = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (at / width) ** 2)
    kernel = kernel / kernel.sum()
    channels = x.shape[1]
    row = kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, row, groups=channels)
    return F.conv2d(across, row.transpose(2, 3), groups=channels)


def contrast(x: Images, factor: float = 0.3) -> Images:
    """Values drawn towards the image's mean (below 1), or away from it (above)."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + factor * (x - mean)).clamp(0, 1)


def brighten(x: Images, by: float = 0.3) -> Images:
    """A constant added."""
    return (x + by).clamp(0, 1)


def power(x: Images, exponent: float = 0.5) -> Images:
    """Values to a power: strokes that are fuller (below 1) or thinner (above)."""
    return x.clamp_min(0) ** exponent


def invert(x: Images) -> Images:
    """Black for white."""
    return 1 - x


def rotate(x: Images, degrees: float) -> Images:
    """Turned about the centre, against the clock; what comes in from outside is zero."""
    angle = math.radians(degrees)
    return affine(x, [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])


def shear(x: Images, by: float = 0.4) -> Images:
    """Rows displaced in proportion to their height."""
    return affine(x, [[1.0, by, 0.0], [0.0, 1.0, 0.0]])


def scale(x: Images, factor: float = 0.7) -> Images:
    """Smaller (below 1) or larger about the centre."""
    return affine(x, [[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]])


def affine(x: Images, matrix: list[list[float]]) -> Images:
    """Where each pixel of the result is read from, in coordinates of [-1, 1]."""
    theta = torch.tensor(matrix, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def dilate(x: Images, size: int = 3) -> Images:
    """Each pixel the largest around it."""
    return F.max_pool2d(x, size, 1, size // 2)


def erode(x: Images, size: int = 2) -> Images:
    """Each pixel the smallest around it; the frame stays as large as it was."""
    before = (size - 1) // 2
    padded = F.pad(x, (before, size - 1 - before) * 2, mode="replicate")
    return -F.max_pool2d(-padded, size, 1)


def pixelate(x: Images, factor: int = 2) -> Images:
    """Means of squares in place of their pixels."""
    small = F.avg_pool2d(x, factor, ceil_mode=True)
    return small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)[:, :, : x.shape[2], : x.shape[3]]


def posterize(x: Images, levels: int = 3) -> Images:
    """Few values only."""
    return (x * (levels - 1)).round() / (levels - 1)


def occlude(x: Images, generator: torch.Generator, size: float = 0.35, value: float = 0.0) -> Images:
    """A square at a random place, its side a share of the image's, painted over."""
    n, _, height, width = x.shape
    side = max(1, round(size * min(height, width)))
    top = (torch.rand(n, generator=generator) * (height - side + 1)).long().to(x.device)
    left = (torch.rand(n, generator=generator) * (width - side + 1)).long().to(x.device)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    tall = (rows >= top[:, None]) & (rows < top[:, None] + side)
    broad = (columns >= left[:, None]) & (columns < left[:, None] + side)
    return x.masked_fill((tall[:, :, None] & broad[:, None, :])[:, None], value)


def outline(x: Images) -> Images:
    """The length of the gradient, as a line drawing."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=x.dtype, device=x.device)
    channels = x.shape[1]
    padded = F.pad(x, (1,) * 4, mode="replicate")
    both = [F.conv2d(padded, k.expand(channels, 1, 3, 3), groups=channels) for k in (kernel, kernel.T)]
    return (torch.hypot(*both) / 3).clamp(0, 1)


def gradient_ground(x: Images, generator: torch.Generator, strength: float = 0.6) -> Images:
    """A ground that grows lighter in a random direction, behind what is there."""
    n, _, height, width = x.shape
    angle = 2 * math.pi * torch.rand(n, 1, 1, generator=generator).to(x)
    rows = torch.linspace(-0.5, 0.5, height, device=x.device, dtype=x.dtype)[:, None]
    columns = torch.linspace(-0.5, 0.5, width, device=x.device, dtype=x.dtype)[None]
    ground = strength * (0.5 + angle.cos() * rows / 1.5 + angle.sin() * columns / 1.5)
    return torch.maximum(x, ground[:, None].clamp(0, 1).expand_as(x))


def waves(x: Images, generator: torch.Generator, strength: float = 0.5) -> Images:
    """A ground of stripes of random direction and width, behind what is there."""
    n, _, height, width = x.shape
    angle, phase = (2 * math.pi * torch.rand(n, 1, 1, generator=generator).to(x) for _ in range(2))
    rate = 1 + 2 * torch.rand(n, 1, 1, generator=generator).to(x)
    rows = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)[:, None]
    columns = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)[None]
    ground = torch.sin(math.pi * rate * (angle.cos() * rows + angle.sin() * columns) + phase)
    return torch.maximum(x, strength * (0.5 + 0.5 * ground)[:, None].expand_as(x))
