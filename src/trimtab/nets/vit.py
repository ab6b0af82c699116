"""A small vision transformer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.nets.classifiers import Classifier


class _Tokens(nn.Module):
    """Patches as tokens behind a class token, with learned positions; the class token comes out."""

    def __init__(self, in_shape: tuple[int, ...], patch: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        channels, height, width = in_shape
        self.embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.start = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (height // patch) * (width // patch), dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.start.expand(len(x), -1, -1), patches], 1) + self.positions
        out: Tensor = self.blocks(tokens)[:, 0]
        return out


def vit(
    in_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10, dim: int = 64, depth: int = 3, heads: int = 4
) -> Classifier:
    """A pre-norm transformer over a 4 x 4 grid of patches and a class token, whose output is the feature layer.

    Raises:
        ValueError: the image is not a square of a side divisible by 4.

    Example:
        >>> vit()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if len(in_shape) != 3 or in_shape[1] != in_shape[2] or in_shape[1] % 4:
        raise ValueError(f"in_shape must be (channels, side, side) with a side divisible by 4, got {in_shape}")
    return Classifier(_Tokens(in_shape, in_shape[1] // 4, dim, depth, heads), dim, num_classes)
