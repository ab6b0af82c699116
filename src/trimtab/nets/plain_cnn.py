"""A plain chain of convolutions with batch normalisation, for what takes networks apart layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.nets.classifiers import Classifier


def plain_cnn(
    in_channels: int = 1,
    num_classes: int = 10,
    widths: Sequence[int] = (12, 24, 24, 32),
    strides: Sequence[int] = (2, 1, 2, 1),
) -> Classifier:
    """Convolutions of 3 x 3 (the first one 5 x 5), each with batch normalisation and ReLU, a mean over places, a head.

    The features are an `nn.Sequential` of conv, norm, ReLU, conv, …, pool, flatten.

    Args:
        in_channels: of an image.
        num_classes: number of logits.
        widths: output channels of each convolution; the last one is the feature dimension.
        strides: of each convolution.

    Example:
        >>> import torch
        >>> plain_cnn()(torch.zeros(2, 1, 14, 14)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    before = in_channels
    for number, (width, stride) in enumerate(zip(widths, strides, strict=True)):
        size = 3 if number else 5
        layers += [
            nn.Conv2d(before, width, size, stride=stride, padding=size // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
    return Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), before, num_classes)
