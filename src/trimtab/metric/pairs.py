"""Which pairs of a batch share a label, and what every metric loss asks of its arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, floating_tensor, tensor
from trimtab.ops.pairwise import pairwise_cosine


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

    Raises:
        TypeError: if `labels` is not of integer type.
        ValueError: if it is no vector.

    Example:
        >>> pair_masks(torch.tensor([0, 0, 1])).positive
        tensor([[False,  True, False],
                [ True, False, False],
                [False, False, False]])
    """
    labels = tensor("labels", labels)
    if labels.ndim != 1:
        raise ValueError(f"labels must be (batch,), got shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    same = labels[:, None] == labels
    return PairMasks(same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same)


def compared(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    indices_tuple: tuple[Tensor, ...] | None = None,
    ref_emb: Float[Tensor, "refs dim"] | None = None,
    ref_labels: Int[Tensor, " refs"] | None = None,
) -> tuple[Float[Tensor, "batch refs"], PairMasks]:
    """Cosines of a batch with itself or with references, and which pairs count; as pytorch-metric-learning calls it.

    Args:
        embeddings: one row per sample, of any length.
        labels: classes.
        indices_tuple: the pairs that count, as a miner of pytorch-metric-learning gives them: anchors and positives,
            anchors and negatives, or the three of triplets. All pairs where it is None.
        ref_emb: what the batch is compared with, such as a memory's embeddings; the batch itself where it is None.
        ref_labels: their classes.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes disagree, a batch is empty, only one of the references is given, or the tuple has not
            three or four parts.
    """
    embeddings = checked_embeddings(embeddings, labels)
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("ref_emb and ref_labels must be given together, got one of them")
    if ref_emb is None or ref_labels is None:
        similarity, masks = pairwise_cosine(embeddings), pair_masks(labels)
    else:
        ref_emb = checked_embeddings(ref_emb, ref_labels)
        same = labels[:, None] == ref_labels
        similarity, masks = pairwise_cosine(embeddings, ref_emb.to(embeddings)), PairMasks(same, ~same)
    if indices_tuple is not None:
        if len(indices_tuple) not in (3, 4):
            raise ValueError(f"indices_tuple must have three or four parts, got {len(indices_tuple)}")
        anchor, positive, *others, negative = indices_tuple
        nobody = torch.zeros_like(masks.positive)
        of_negative = others[0] if others else anchor
        masks = PairMasks(
            nobody.index_put((anchor, positive), nobody.new_ones(())),
            nobody.index_put((of_negative, negative), nobody.new_ones(())),
        )
    return similarity, masks


def mined_weights(
    embeddings: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    indices_tuple: tuple[Tensor, ...] | None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Float[Tensor, " batch"] | None:
    """How much each sample counts in a loss that classifies; as pytorch-metric-learning weighs those of its own.

    Args:
        embeddings: the batch, whose precision the weights take.
        labels: its classes.
        indices_tuple: what a miner of that package gives. A sample counts as often as it occurs there, relative to the
            one that occurs most; all alike where it is empty.
        ref_emb, ref_labels: other samples, which such a loss has no use for.

    Returns:
        The weights, at most 1; None, for a plain mean, where there is no tuple.

    Raises:
        ValueError: if references are given.
    """
    if ref_emb is not None or ref_labels is not None:
        raise ValueError("ref_emb and ref_labels must be None for a loss that compares samples with classes, got some")
    if indices_tuple is None:
        return None
    occurrences = torch.cat(indices_tuple).bincount(minlength=len(labels)).to(embeddings)
    return torch.where(occurrences.any(), occurrences / occurrences.max().clamp(min=1), 1.0)


def checked_embeddings(
    embeddings: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, "batch dim"]:
    """The embeddings, in float32 where they came in half precision, once they are known to suit the labels.

    Raises:
        TypeError: if `embeddings` is not floating point or `labels` not of integer type.
        ValueError: if the shapes are not `(batch, dim)` and `(batch,)`, or the batch is empty.
    """
    embeddings = floating_tensor("embeddings", embeddings)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be (batch, dim), got shape {tuple(embeddings.shape)}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"labels must be of shape ({embeddings.shape[0]},), one label per embedding, got {tuple(labels.shape)}"
        )
    if 0 in embeddings.shape:
        raise ValueError(
            "embeddings must hold at least one sample and one column, "
            f"got an empty batch of shape {tuple(embeddings.shape)}"
        )
    return embeddings


def checked_points(
    embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "n dim"], Int[Tensor, " n"]]:
    """Embeddings and labels of an evaluation: arrays are taken, values are looked at, and nothing has a gradient.

    Raises:
        TypeError, ValueError: as `checked_embeddings`; ValueError too where an embedding is not finite.
    """
    labels = tensor("labels", labels)
    embeddings = checked_embeddings(tensor("embeddings", embeddings), labels).detach()
    return finite_tensor("embeddings", embeddings), labels.to(embeddings.device)
