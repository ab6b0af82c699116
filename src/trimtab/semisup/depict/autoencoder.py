"""Autoencoders whose decoder reconstructs every layer of the encoder, and the loss that asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import in_range

_SLOPE = 0.01  # of the leaky rectifiers


class Pass(NamedTuple):
    """What an autoencoder makes of a batch.

    Attributes:
        code: of the last encoder layer.
        activations: the input and what each encoder layer but the last makes of it.
        reconstructions: of these, in the same order.
    """

    code: Float[Tensor, "batch dim"]
    activations: list[Tensor]
    reconstructions: list[Tensor]


class DenoisingAutoencoder(nn.Module):
    """An autoencoder whose decoder reconstructs every layer of its encoder, with dropout on the way in.

    Args:
        encoder: layers from input to code, each with its nonlinearity.
        decoder: as many, from the code back; the last one gives the input's shape.
        dropout: share of the numbers before each encoder layer that the noisy path drops, in [0, 1).

    Raises:
        ValueError: the two have not as many layers, or `dropout` is out of range.

    Example:
        >>> autoencoder = mlp_autoencoder(8, 3, hidden=(5,))
        >>> found = autoencoder(torch.zeros(2, 8))
        >>> found.code.shape, [tuple(r.shape) for r in found.reconstructions]
        (torch.Size([2, 3]), [(2, 8), (2, 5)])
    """

    def __init__(self, encoder: Sequence[nn.Module], decoder: Sequence[nn.Module], dropout: float = 0.1) -> None:
        super().__init__()
        if not 0 < len(encoder) == len(decoder):
            raise ValueError(f"decoder must have as many layers as encoder, got {len(decoder)} and {len(encoder)}")
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.dropout = in_range("dropout", dropout, 0, 1, "left")

    def forward(self, x: Tensor, *, noisy: bool = False, generator: torch.Generator | None = None) -> Pass:
        """The clean pass, or the noisy one.

        Args:
            x: a batch.
            noisy: whether to drop numbers.
            generator: decides which.
        """
        h, activations = x, []
        for layer in self.encoder:
            activations.append(h)
            if noisy and self.dropout:
                kept = torch.rand(h.shape, generator=generator, dtype=h.dtype, device=h.device) >= self.dropout
                h = h * kept / (1 - self.dropout)
            h = layer(h)
        back, reconstructions = h, []
        for layer in self.decoder:
            back = layer(back)
            reconstructions.append(back)
        return Pass(h, activations, reconstructions[::-1])

    def encode(self, x: Tensor) -> Float[Tensor, "batch dim"]:
        """The clean code."""
        for layer in self.encoder:
            x = layer(x)
        return x


def mlp_autoencoder(
    in_dim: int, code_dim: int, *, hidden: Sequence[int] = (128, 64), dropout: float = 0.1
) -> DenoisingAutoencoder:
    """Fully connected layers with leaky rectifiers; code and reconstruction in [-1, 1] by a tanh.

    Args:
        in_dim: numbers in a sample.
        code_dim: numbers in a code.
        hidden: widths of the layers between.
        dropout: see `DenoisingAutoencoder`.

    Raises:
        ValueError: a width is not a positive integer, or `dropout` is out of range.

    Example:
        >>> len(mlp_autoencoder(64, 10).encoder)
        3
    """
    if not all(isinstance(size, int | Integral) and size > 0 for size in (in_dim, *hidden, code_dim)):
        raise ValueError(f"in_dim, hidden and code_dim must be positive integers, got {(in_dim, *hidden, code_dim)}")
    sizes = [in_dim, *hidden, code_dim]
    last = len(sizes) - 2
    encoder = [
        nn.Sequential(nn.Linear(a, b), nn.Tanh() if i == last else nn.LeakyReLU(_SLOPE))
        for i, (a, b) in enumerate(pairwise(sizes))
    ]
    decoder = [
        nn.Sequential(nn.Linear(b, a), nn.Tanh() if i == 0 else nn.LeakyReLU(_SLOPE))
        for i, (a, b) in reversed(list(enumerate(pairwise(sizes))))
    ]
    return DenoisingAutoencoder(encoder, decoder, dropout)


def conv_autoencoder(
    in_shape: tuple[int, int, int],
    code_dim: int,
    *,
    channels: Sequence[int] = (50, 50),
    batch_norm: bool = False,
    dropout: float = 0.1,
) -> DenoisingAutoencoder:
    """Convolutions of stride two and a linear layer, mirrored in the decoder, for images with values in [-1, 1].

    Args:
        in_shape: (channels, height, width).
        code_dim: numbers in a code; the authors take as many as there are clusters.
        channels: of the convolutions, which see 5 x 5 pixels.
        batch_norm: normalise before each rectifier; without it, learning rates above 1e-4 may let the code collapse.
        dropout: see `DenoisingAutoencoder`.

    Raises:
        ValueError: a size is not a positive integer, or `dropout` is out of range.

    Example:
        >>> autoencoder = conv_autoencoder((1, 14, 14), 10, channels=(4, 8))
        >>> [tuple(r.shape) for r in autoencoder(torch.zeros(2, 1, 14, 14)).reconstructions]
        [(2, 1, 14, 14), (2, 4, 7, 7), (2, 8, 4, 4)]
    """
    if len(in_shape) != 3 or not all(isinstance(n, int | Integral) and n > 0 for n in (*in_shape, code_dim, *channels)):
        raise ValueError(
            "in_shape, code_dim and channels must be three, one and some positive integers, "
            f"got {in_shape}, {code_dim} and {channels}"
        )
    shapes = [in_shape]
    encoder: list[nn.Module] = []
    decoder: list[nn.Module] = []

    def rectified(layer: nn.Module, width: int) -> nn.Sequential:
        norm = [nn.BatchNorm2d(width)] if batch_norm else []
        return nn.Sequential(layer, *norm, nn.LeakyReLU(_SLOPE))

    for width in channels:
        before, height, breadth = shapes[-1]
        shapes.append((width, (height + 1) // 2, (breadth + 1) // 2))
        # A side of an even number of pixels needs one more on the way back.
        back = nn.ConvTranspose2d(width, before, 5, 2, 2, output_padding=((height + 1) % 2, (breadth + 1) % 2))
        decoder.insert(0, nn.Sequential(back, nn.Tanh()) if not encoder else rectified(back, before))
        encoder.append(rectified(nn.Conv2d(before, width, 5, 2, 2), width))
    flat = int(np.prod(shapes[-1]))
    encoder.append(nn.Sequential(nn.Flatten(), nn.Linear(flat, code_dim), nn.Tanh()))
    first = nn.Sequential(nn.Linear(code_dim, flat), nn.LeakyReLU(_SLOPE), nn.Unflatten(1, shapes[-1]))
    return DenoisingAutoencoder(encoder, [first, *decoder], dropout)


def layerwise_reconstruction_loss(
    reconstructions: Sequence[Tensor], activations: Sequence[Tensor], weight: float = 0.1
) -> Float[Tensor, ""]:
    """Mean squared errors of the input and, times `weight`, of each layer; clean activations are constants.

    Raises:
        ValueError: there are not as many of both, or none, two differ in shape, or `weight` is negative.

    Example:
        >>> zeros, ones = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
        >>> round(float(layerwise_reconstruction_loss(zeros, ones)), 4)
        1.1
    """
    if not 0 < len(reconstructions) == len(activations):
        raise ValueError(
            f"reconstructions must be as many as activations, got {len(reconstructions)} and {len(activations)}"
        )
    if not (isinstance(weight, float | Real) and 0 <= weight < float("inf")):
        raise ValueError(f"weight must be at least 0 and finite, got {weight!r}")
    if any(r.shape != h.shape for r, h in zip(reconstructions, activations, strict=True)):
        raise ValueError("reconstructions must have the shapes of activations, got others")
    errors = [F.mse_loss(r, h.detach()) for r, h in zip(reconstructions, activations, strict=True)]
    return torch.stack([error * (1.0 if i == 0 else weight) for i, error in enumerate(errors)]).sum()
