"""How much of a codebook is used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.ops.arguments import indices as check_indices
from trimtab.ops.arguments import integer


@dataclass(frozen=True)
class CodebookUse:
    """How much of a codebook is used.

    Attributes:
        share: of the codes that occur.
        perplexity: exp of the entropy of their frequencies, the number of codes that evenly used ones would be.
    """

    share: float
    perplexity: float


def codebook_use(indices: Int[Tensor, "..."], num_codes: int) -> CodebookUse:
    """How much of a codebook these indices use.

    Raises:
        TypeError: if they are no tensor of integers.
        ValueError: if there are none, or one is out of range.

    Example:
        >>> codebook_use(torch.tensor([0, 1, 1, 0]), 8)
        CodebookUse(share=0.25, perplexity=2.0)
    """
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if indices.is_floating_point():
        raise TypeError(f"indices must be integers, got {indices.dtype}")
    if indices.numel() == 0:
        raise ValueError("indices must be at least one, got none")
    check_indices("indices", indices, integer("num_codes", num_codes))
    freq = torch.bincount(indices.flatten(), minlength=num_codes).double() / indices.numel()
    return CodebookUse(float((freq > 0).double().mean()), round(float(torch.exp(-torch.xlogy(freq, freq).sum())), 10))
