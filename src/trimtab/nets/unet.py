"""A small U-Net."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """An encoder that halves the image `depth` times, and a decoder that sees every resolution again.

    Images of any size go in, those with an odd side too: a decoder level is resized to the encoder's.

    Args:
        in_channels: channels of an image.
        num_classes: number of logits of a pixel.
        width: channels at full resolution; each level below has twice as many.
        depth: number of times the resolution is halved.

    Example:
        >>> UNet(1, 3)(torch.zeros(2, 1, 24, 31)).shape
        torch.Size([2, 3, 24, 31])
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList(
            _block(before, after) for before, after in zip([in_channels, *widths], widths, strict=False)
        )
        self.decoder = nn.ModuleList(
            _block(widths[level] + widths[level + 1], widths[level]) for level in reversed(range(depth))
        )
        self.head = nn.Conv2d(width, num_classes, 1)

    def with_features(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch classes height width"], Float[Tensor, "batch dim rows columns"]]:
        """Logits, and the feature map of the lowest resolution that they come from."""
        levels: list[Tensor] = []
        for block in self.encoder:
            x = block(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        features = levels.pop()
        x = features
        for block in self.decoder:
            skip = levels.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([skip, x], dim=1))
        return self.head(x), features

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        return self.with_features(x)[0]
