"""A U-Net without additive constants."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer


class BiasFreeNorm(nn.Module):
    """Divides each channel by its standard deviation and scales it: batch normalisation that subtracts no mean.

    In training it is that of the batch, in evaluation a running one, a constant: the layer is then linear.

    Args:
        channels: number of channels.
        momentum: weight of a batch in the running deviation.

    Raises:
        ValueError: the input has not four dimensions, not as many channels, or holds nothing.

    Example:
        >>> norm = BiasFreeNorm(3).eval()
        >>> x = torch.randn(2, 3, 4, 4)
        >>> bool(torch.allclose(norm(5 * x), 5 * norm(x)))
        True
    """

    running_std: Float[Tensor, " channels"]

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        integer("channels", channels)
        self.momentum = in_range("momentum", momentum, 0, 1)
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_std", torch.ones(channels))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        if x.ndim != 4 or x.shape[1] != len(self.weight) or x.numel() == 0:
            raise ValueError(f"x must have shape (batch, {len(self.weight)}, height, width), got {tuple(x.shape)}")
        std = self.running_std
        if self.training:
            std = (x.var((0, 2, 3), correction=0) + 1e-5).sqrt()
            self.running_std.lerp_(std.detach().to(self.running_std.dtype), self.momentum)
        return x * (self.weight / std)[:, None, None]


def _block(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), BiasFreeNorm(after), nn.ReLU()]
    return nn.Sequential(*layers)


class BiasFreeUNet(nn.Module):
    """A U-Net without any additive constant, which denoises without being told how much noise there is.

    It computes the noise and returns the image less the noise: `f(y) = y - net(y)`. In evaluation
    `f(c y) = c f(y)` for c > 0. With its defaults it is the authors' network of 7.6 million weights. Its last layer
    starts at zero, the denoiser at the identity.

    Args:
        channels: of an image.
        base: channels at full resolution, twice as many at each one below.
        depth: how often the resolution is halved.

    Example:
        >>> denoiser = BiasFreeUNet(base=8, depth=2)
        >>> denoiser(torch.randn(2, 1, 16, 16)).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(self, channels: int = 1, base: int = 64, depth: int = 3) -> None:
        super().__init__()
        integer("channels", channels)
        integer("base", base)
        integer("depth", depth)
        widths = [base * 2**level for level in range(depth + 1)]
        first = nn.Sequential(nn.Conv2d(channels, base, 3, padding=1, bias=False), nn.ReLU(), *_block(base, base))
        deeper = (_block(widths[i - 1], widths[i], widths[i]) for i in range(1, depth + 1))
        self.encoder = nn.ModuleList([first, *deeper])
        levels = list(reversed(range(depth)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(widths[i + 1], widths[i], 2, 2, bias=False) for i in levels)
        self.decoder = nn.ModuleList(
            _block(2 * widths[i], widths[i]) if i == 0 else _block(2 * widths[i], widths[i], widths[i]) for i in levels
        )
        self.last = nn.Conv2d(base, channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, y: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """The denoised images.

        Raises:
            ValueError: a side is not divisible by 2 to the power of the depth.
        """
        unit = 2 ** len(self.decoder)
        if y.ndim != 4 or y.shape[-1] % unit or y.shape[-2] % unit:
            raise ValueError(
                f"y must have shape (batch, channels, height, width), sides divisible by {unit}, got {tuple(y.shape)}"
            )
        kept: list[Tensor] = []
        x = y
        for level, block in enumerate(self.encoder):
            x = block(F.avg_pool2d(x, 2) if level else x)
            kept.append(x)
        x = kept.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat([up(x), kept.pop()], dim=1))
        return y - self.last(x)  # type: ignore[no-any-return]
