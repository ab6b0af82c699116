"""Which pairs of a batch share a label, and what every metric loss asks of its arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class PairMasks(NamedTuple):
    """Ordered pairs of a batch; a sample makes no pair with itself.

    Attributes:
        positive: pairs of one label, shape `(batch, batch)`.
        negative: pairs of different labels, shape `(batch, batch)`.
    """

    positive: Bool[Tensor, "batch batch"]
    negative: Bool[Tensor, "batch batch"]


def pair_masks(labels: Int[Tensor, " batch"]) -> PairMasks:
    """Masks of the pairs that share a label and of those that do not.

    Example:
        >>> pair_masks(torch.tensor([0, 0, 1])).positive
        tensor([[False,  True, False],
                [ True, False, False],
                [False, False, False]])
    """
    same = labels[:, None] == labels
    return PairMasks(same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same)


def checked_embeddings(
    embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, "batch dim"]:
    """The embeddings, in float32 where they came in half precision, once they are known to suit the labels.

    Raises:
        TypeError: if `embeddings` is not floating point or `labels` not of integer type.
        ValueError: if the shapes are not `(batch, dim)` and `(batch,)`, or the batch is empty.
    """
    if not embeddings.is_floating_point():
        raise TypeError(f"embeddings: dtype {embeddings.dtype}; it must be a floating-point type")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: dtype {labels.dtype}; it must be an integer type")
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings: shape {tuple(embeddings.shape)}; it must be (batch, dim)")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"labels: shape {tuple(labels.shape)}; it must be ({embeddings.shape[0]},), one label per embedding"
        )
    if embeddings.shape[0] == 0:
        raise ValueError("embeddings: the batch is empty")
    return embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
