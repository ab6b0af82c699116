"""A generating network and a discriminator for small images of one channel, with classes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import leaky_relu
from torch.nn.utils.parametrizations import spectral_norm


class ImageGenerator(nn.Module):
    """From noise and a class to an image with values in (-1, 1): a linear layer, then convolutions at twice the side.

    Args:
        side: of the image, an even number.
        latent_dim: length of the noise.
        num_classes: number of classes.
        width: channels of the last layer but one.

    Example:
        >>> ImageGenerator(8)(torch.randn(5, 32), torch.arange(5)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(self, side: int, latent_dim: int = 32, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.start = side // 2
        self.embedding = nn.Embedding(num_classes, latent_dim)
        self.enter = nn.Linear(2 * latent_dim, 2 * width * self.start**2)
        self.layers = nn.Sequential(
            nn.GroupNorm(8, 2 * width),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Float[Tensor, "batch latent"], labels: Int[Tensor, " batch"]) -> Tensor:
        h = self.enter(torch.cat([z, self.embedding(labels)], 1))
        made: Tensor = self.layers(h.unflatten(1, (-1, self.start, self.start)))
        return made


class ImageDiscriminator(nn.Module):
    """Spectrally normalised convolutions, summed over the image, and a score that looks for the class.

    Args:
        num_classes: number of classes.
        width: channels of the first layer; there are twice as many features.

    Example:
        >>> net = ImageDiscriminator()
        >>> net.score(net.features(torch.zeros(5, 1, 8, 8)), torch.arange(5)).shape
        torch.Size([5])
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.num_features = 2 * width
        self.layers = nn.ModuleList(
            [
                spectral_norm(nn.Conv2d(1, width, 3, padding=1)),
                spectral_norm(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)),
                spectral_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1)),
            ]
        )
        self.head = spectral_norm(nn.Linear(2 * width, 1))
        self.embedding = spectral_norm(nn.Embedding(num_classes, 2 * width))

    def features(self, x: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch features"]:
        """What is known of an image, whatever its class."""
        for layer in self.layers:
            x = leaky_relu(layer(x), 0.2)
        return x.sum((2, 3))

    def score(
        self, features: Float[Tensor, "batch features"], labels: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, " batch"]:
        """High for real images of the class (projection, Miyato and Koyama, ICLR 2018, arXiv 1802.05637)."""
        found: Tensor = self.head(features)[:, 0]
        return found if labels is None else found + (self.embedding(labels) * features).sum(1)
