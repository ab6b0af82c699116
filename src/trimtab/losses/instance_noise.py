"""Label noise that depends on what a sample looks like."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.losses.label_noise import NoisyLabels, asymmetric_noise
from trimtab.ops.arguments import finite_tensor, non_negative, tensor


def instance_dependent_noise(
    inputs: Float[Tensor, "samples ..."],
    targets: Int[Tensor, " samples"],
    rate: float,
    num_classes: int,
    *,
    spread: float = 0.1,
    generator: torch.Generator | None = None,
) -> NoisyLabels:
    """Replaces labels so that how likely a mistake is, and which, depends on what the sample looks like.

    Each sample has its own probability of a wrong label, normal around `rate` and cut to [0, 1]; the wrong class is
    drawn with the softmax of the sample's scores under a random linear map that belongs to its true class.

    Xia et al., "Part-dependent Label Noise: Towards Instance-dependent Label Noise", NeurIPS 2020, Algorithm 2.

    Args:
        inputs: the samples, flattened to vectors.
        targets: clean labels, integers in `[0, num_classes)`.
        rate: mean probability of a wrong label, in [0, 1].
        num_classes: number of classes, at least 2.
        spread: standard deviation of that probability over the samples, at least 0.
        generator: source of the random draws, on the CPU; torch's global one where it is None.

    Returns:
        The noisy labels, and where they differ from `targets`. Type and device are those of `targets`.

    Raises:
        TypeError: if `targets` is not of integer type.
        ValueError: if a label, the rate, the spread or the number of classes is out of range, an input is not finite,
            or the lengths differ.

    Example:
        >>> x, clean = torch.rand(1000, 8), torch.arange(1000) % 5
        >>> noisy, wrong = instance_dependent_noise(x, clean, 0.4, 5, generator=torch.Generator().manual_seed(0))
        >>> 0.35 < wrong.float().mean() < 0.45
        tensor(True)
    """
    asymmetric_noise(targets, rate, num_classes, generator=torch.Generator())  # refuses what is out of range
    non_negative("spread", spread)
    inputs, targets = finite_tensor("inputs", inputs), tensor("targets", targets)
    if inputs.ndim < 2:
        raise ValueError(f"inputs must be (samples, ...), with features, got shape {tuple(inputs.shape)}")
    if len(inputs) != len(targets):
        raise ValueError(f"inputs must be {len(targets)} samples as there are labels, got {len(inputs)}")
    x, labels = inputs.flatten(1).cpu().double(), targets.cpu().long()
    mistaken = rate + spread * torch.randn(len(labels), generator=generator, dtype=torch.float64)
    mistaken = torch.rand(len(labels), generator=generator, dtype=torch.float64) < mistaken
    maps = torch.randn(num_classes, x.shape[1], num_classes, generator=generator, dtype=torch.float64)
    scores = torch.empty(len(labels), num_classes, dtype=torch.float64)
    for k in labels.unique():
        scores[labels == k] = x[labels == k] @ maps[k]
    scores.scatter_(1, labels[:, None], -math.inf)
    wrong = torch.multinomial(scores.softmax(1), 1, generator=generator).squeeze(1)
    noisy = torch.where(mistaken, wrong, labels).to(targets)
    return NoisyLabels(noisy, noisy != targets)
