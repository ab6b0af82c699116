"""Classifiers with a named feature layer and a linear head."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class Classifier(nn.Module):
    """A feature extractor and a linear head: `head(features(x))`.

    Args:
        features: maps a batch to (batch, feature_dim).
        feature_dim: width of the feature layer.
        num_classes: number of logits.
    """

    def __init__(self, features: nn.Module, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.feature_dim = feature_dim
        self.head = nn.Linear(feature_dim, num_classes)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.head(self.features(x))
        return logits


def mlp(in_features: int, hidden: Sequence[int] = (256, 128), num_classes: int = 10) -> Classifier:
    """ReLU layers over flattened input; the last hidden layer is the feature layer.

    Example:
        >>> import torch
        >>> mlp(64)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    sizes = [in_features, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return Classifier(nn.Sequential(*layers), sizes[-1], num_classes)


def small_cnn(in_shape: tuple[int, ...] = (1, 28, 28), num_classes: int = 10, width: int = 16) -> Classifier:
    """Two strided convolutions with batch normalisation and one fully connected feature layer of 8 x width.

    Example:
        >>> import torch
        >>> small_cnn()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if len(in_shape) != 3:
        raise ValueError(f"in_shape must be (channels, height, width) of images, got {in_shape}")
    channels, height, breadth = in_shape
    grid = math.ceil(height / 4) * math.ceil(breadth / 4)
    features = nn.Sequential(
        nn.Conv2d(channels, width, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * grid, 8 * width),
        nn.ReLU(),
    )
    return Classifier(features, 8 * width, num_classes)
