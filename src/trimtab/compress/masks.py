r"""Masks by magnitude: which weights stay when a share of them, or all but n of every m, must go.

The number that goes is exact, and of equal weights the first one goes, so that all ranks of a distributed training
agree. A selection costs time linear in the number of weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer, real_problem, tensor

Sparsity = float | tuple[int, int]
"""The share that goes, or (n, m): n of every m consecutive weights stay."""


def smallest(scores: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """Which are the `count` smallest; of equal ones the first.

    Example:
        >>> smallest(torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0]), 3)
        tensor([ True,  True, False,  True, False])
    """
    flat = scores.flatten()
    if integer("count", count, 0, flat.numel()) == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    edge = flat.kthvalue(count).values
    below, equal = flat < edge, flat == edge
    goes: Tensor = below | (equal & (equal.cumsum(0) <= count - below.sum()))
    return goes.view_as(scores)


@torch.no_grad()
def magnitude_mask(weight: Float[Tensor, "..."], sparsity: Sparsity, most: float = 1.0) -> Bool[Tensor, "..."]:
    """Which weights stay.

    Args:
        weight: of one layer.
        sparsity: the share that goes, rounded up to whole weights; or (n, m), of which n of every m weights of a row
            stay.
        most: no more than this share goes.

    Raises:
        ValueError: the share is not in [0, 1), n is not in [1, m], or rows are not whole numbers of m.

    Example:
        >>> magnitude_mask(torch.tensor([1.0, -2.0, 3.0, -4.0]), 0.5)
        tensor([False, False,  True,  True])
        >>> magnitude_mask(torch.tensor([[1.0, -2.0, 3.0, -4.0]]), (1, 2))
        tensor([[False,  True, False,  True]])
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not 0 <= most <= 1:
        raise ValueError(f"most must be in [0, 1], got {most!r}")
    tensor("weight", weight, floating=True)
    check_sparsity("sparsity", sparsity, weight)
    if isinstance(sparsity, tuple):
        stay, of = sparsity
        order = weight.abs().reshape(-1, of).argsort(dim=1, stable=True)
        mask = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, : of - stay], False)
        return mask.view(weight.shape)
    count = weight.numel()
    return ~smallest(weight.abs(), min(math.ceil(round(sparsity * count, 6)), int(most * count)))


@torch.no_grad()
def magnitude_masks(weights: Sequence[Float[Tensor, "..."]], sparsity: float) -> list[Bool[Tensor, "..."]]:
    """Which weights of all layers together stay.

    Raises:
        TypeError: `sparsity` is a pattern, which belongs to one layer.
        ValueError: the share is not in [0, 1), or there are no weights.

    Example:
        >>> magnitude_masks([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])], 0.5)
        [tensor([False,  True]), tensor([ True, False])]
    """
    if isinstance(sparsity, tuple):
        raise TypeError(f"sparsity must be a share of all layers together, got the pattern {sparsity}")
    if not weights:
        raise ValueError("weights must be of at least one layer, got none")
    mask = magnitude_mask(torch.cat([weight.flatten() for weight in weights]), sparsity)
    parts = mask.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


@torch.no_grad()
def mask_overlap(one: Bool[Tensor, "..."], other: Bool[Tensor, "..."]) -> float:
    """Of the weights that one mask leaves out, the share that the other leaves out too; 1 where it leaves out none.

    Example:
        >>> mask_overlap(torch.tensor([True, False, False]), torch.tensor([True, True, False]))
        0.5
    """
    if not all(isinstance(part, Tensor) for part in (one, other)):
        raise TypeError(f"one and other must be tensors, got {[type(part).__name__ for part in (one, other)]}")
    if one.dtype != torch.bool or other.dtype != torch.bool:
        raise ValueError(f"one and other must be of booleans, got {one.dtype} and {other.dtype}")
    if one.shape != other.shape:
        raise ValueError(f"other must be of shape {tuple(one.shape)}, got {tuple(other.shape)}")
    gone = ~one
    return float((gone & ~other).sum() / gone.sum()) if bool(gone.any()) else 1.0


class KeepMask(nn.Module):
    """A parametrization: the weights of a mask, and zeros elsewhere, which get no gradient.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(2, 1)
        >>> _ = parametrize.register_parametrization(layer, "weight", KeepMask(torch.tensor([[True, False]])))
        >>> layer.weight[0, 1].item() == 0
        True
    """

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "..."]) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        super().__init__()
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        self.register_buffer("mask", mask)

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The masked weights."""
        if problem := real_problem(weight=weight):
            raise TypeError(problem)
        return weight * self.mask

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The weights; what the mask leaves out is forgotten."""
        if problem := real_problem(weight=weight):
            raise TypeError(problem)
        return weight * self.mask


def check_sparsity(name: str, sparsity: Sparsity, weight: Tensor) -> None:
    """Refuses what is neither a share nor a pattern that fits the rows of a weight."""
    if not isinstance(sparsity, tuple):
        in_range(name, sparsity, 0, 1, "left")
        return
    stay, of = sparsity
    integer(name, of)
    integer(name, stay, 1, of)
    row = weight.shape[1:].numel() if weight.dim() > 1 else weight.numel()
    if row % of:
        raise ValueError(f"{name} must be of {of} weights that divide a row, got rows of {row}")
