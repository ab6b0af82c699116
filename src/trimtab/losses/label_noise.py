"""Artificial label noise: symmetric and class-dependent flips of integer labels.

Both functions take clean labels and a generator and say, beside the noisy labels, which of them are now wrong; that is
what a study needs to measure how many wrong labels a network has memorised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from trimtab.ops.arguments import in_range, integer, labels, tensor


class NoisyLabels(NamedTuple):
    """Labels after corruption.

    Attributes:
        targets: the labels, some of them replaced, shape `(samples,)`.
        is_noisy: True where the label differs from the clean one, shape `(samples,)`.
    """

    targets: Int[Tensor, " samples"]
    is_noisy: Bool[Tensor, " samples"]


def symmetric_noise(
    targets: Int[Tensor, " samples"],
    rate: float,
    num_classes: int,
    *,
    generator: torch.Generator | None = None,
    exclude_true: bool = False,
) -> NoisyLabels:
    """Replaces each label, with probability `rate`, by a class drawn uniformly.

    The draw is over all classes, the true one among them, so that the share of wrong labels is
    `rate * (num_classes - 1) / num_classes`; this is what most papers on noisy labels call symmetric noise. With
    `exclude_true=True` the draw is over the other classes and the share of wrong labels is `rate`.

    Args:
        targets: clean labels, integers in `[0, num_classes)`; a tensor or an array.
        rate: probability of a replacement, in [0, 1].
        num_classes: number of classes, at least 2.
        generator: source of the random draws, on the CPU; torch's global one where it is None.
        exclude_true: draw the replacement from the other classes only.

    Returns:
        The noisy labels, and where they differ from `targets`. Type and device are those of `targets`.

    Raises:
        TypeError: if `targets` is not of integer type.
        ValueError: if a label, the rate or the number of classes is out of range.

    Example:
        >>> clean = torch.arange(10).repeat(100)
        >>> noisy, wrong = symmetric_noise(clean, 0.4, 10, generator=torch.Generator().manual_seed(0))
        >>> bool((noisy[~wrong] == clean[~wrong]).all()), 0.3 < wrong.float().mean() < 0.42
        (True, tensor(True))
    """
    targets, rate, num_classes = _checked(targets, rate, num_classes)
    replaced = torch.rand(targets.shape, generator=generator) < rate
    # A shift by 1..K-1 is uniform over the other classes; a shift by 0..K-1 over all of them.
    shift = torch.randint(1 if exclude_true else 0, num_classes, targets.shape, generator=generator)
    # In int64, for in a narrow type the sum could overflow.
    shifted = ((targets.long() + shift.to(targets.device)) % num_classes).to(targets.dtype)
    noisy = torch.where(replaced.to(targets.device), shifted, targets)
    return NoisyLabels(noisy, noisy != targets)


def asymmetric_noise(
    targets: Int[Tensor, " samples"],
    rate: float,
    num_classes: int,
    *,
    generator: torch.Generator | None = None,
    mapping: Int[Tensor, " classes"] | None = None,
) -> NoisyLabels:
    """Replaces each label, with probability `rate`, by the one class that its class is mistaken for.

    Args:
        targets: clean labels, integers in `[0, num_classes)`; a tensor or an array.
        rate: probability of a replacement, in [0, 1].
        num_classes: number of classes, at least 2.
        generator: source of the random draws, on the CPU; torch's global one where it is None.
        mapping: `mapping[k]` is the class that class `k` is mistaken for; `k` itself leaves the class clean. By
            default the next class, cyclically (pair flip).

    Returns:
        The noisy labels, and where they differ from `targets`. Type and device are those of `targets`.

    Raises:
        TypeError: if `targets` or `mapping` is not of integer type.
        ValueError: if a label, the rate, the number of classes or the mapping is out of range.

    Example:
        >>> asymmetric_noise(torch.tensor([0, 1, 2]), 1.0, 3).targets
        tensor([1, 2, 0])
        >>> asymmetric_noise(torch.tensor([0, 1, 2]), 1.0, 3, mapping=torch.tensor([0, 2, 1])).is_noisy
        tensor([False,  True,  True])
    """
    targets, rate, num_classes = _checked(targets, rate, num_classes)
    if mapping is None:
        mapping = (torch.arange(num_classes) + 1) % num_classes
    mapping = labels("mapping", mapping, num_classes, num_classes)
    replaced = torch.rand(targets.shape, generator=generator) < rate
    noisy = torch.where(replaced.to(targets.device), mapping.to(targets)[targets.long()], targets)
    return NoisyLabels(noisy, noisy != targets)


def _checked(targets: Tensor, rate: float, num_classes: int) -> tuple[Tensor, float, int]:
    """The arguments of both; the labels in the type they came in."""
    rate, num_classes = in_range("rate", rate, 0, 1), integer("num_classes", num_classes, 2)
    targets = tensor("targets", targets, ndim=1)
    labels("targets", targets, num_classes)
    return targets, rate, num_classes
