"""Images of known regularity."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import integer, positive


def c_alpha_images(
    count: int,
    size: int,
    alpha: float,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "count 1 size size"]:
    r"""Two regions of regularity alpha, parted by a contour of regularity alpha, values in [0, 1].

    The best denoisers of such images are known: their error falls as $\sigma^{2\alpha/(\alpha+1)}$, which makes a slope
    of $\alpha/(\alpha+1)$ of output over input signal-to-noise ratio, in decibel. Regions and contour are white noise
    whose spectrum is multiplied by $|f|^{-\alpha}$; one region is darker; the contour is blurred by one pixel.

    Args:
        count: number of images.
        size: of a side, at least 4.
        alpha: regularity, positive.
        generator: decides the images.

    Example:
        >>> c_alpha_images(3, 16, alpha=2.0).shape
        torch.Size([3, 1, 16, 16])
    """
    integer("count", count)
    integer("size", size, 4)
    positive("alpha", alpha)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    line, plane = (_frequencies(size, dims) ** -alpha for dims in (1, 2))
    contour = torch.fft.ifft(torch.fft.fft(2 * uniform(count, size) - 1) * line).real * size + size / 2
    regions = torch.fft.ifft2(torch.fft.fft2(2 * uniform(2, count, size, size) - 1) * plane).real
    low, high = regions.amin((-2, -1), keepdim=True), regions.amax((-2, -1), keepdim=True)
    bright, dark = (regions - low) / (high - low)
    floor, ceiling = uniform(2, count, 1, 1)
    bright, dark = floor + (1 - floor) * bright, ceiling * dark
    rows = torch.arange(size, dtype=torch.float64)[:, None]
    below = (rows - contour[:, None].round() + 0.5).clamp(0, 1)
    below = (below + below.roll(1, -1)) / 2
    swapped = uniform(count, 1, 1) < 0.5
    below = torch.where(swapped, 1 - below, below)
    return (below * bright + (1 - below) * dark)[:, None].to(torch.get_default_dtype())  # type: ignore[no-any-return]


def _frequencies(size: int, dims: int) -> Tensor:
    """Lengths of the frequencies, in cycles an image; the constant counts as one cycle."""
    axis = torch.fft.fftfreq(size, dtype=torch.float64) * size
    squares = axis**2 if dims == 1 else axis[:, None] ** 2 + axis**2
    return squares.sqrt().clamp_min(1.0)  # type: ignore[no-any-return]
