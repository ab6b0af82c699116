r"""Local features matched by mutual nearest neighbours: the score of two images, its loss, and re-ranking by it.

Two patches match if each is the other's most similar one, and their cosine is above a threshold. The number of matches
ranks candidates that a global descriptor has found. Zero rows are padding and match nothing, so that images with
different numbers of patches fit one tensor.

Reference: Changwei Wang et al., "Focus on Local: Finding Reliable Discriminative Regions for Visual Place Recognition",
AAAI 2025, arXiv 2504.09881, whose second stage this is, after Lu et al., "Towards Seamless Adaptation of Pre-trained
Models for Visual Place Recognition", ICLR 2024, arXiv 2402.14505.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.metric.pairs import checked_embeddings, pair_masks
from trimtab.ops.arguments import floating_tensor, in_range, integer, non_negative, real_problem, tensor
from trimtab.ops.pairwise import pairwise_cosine

# What a product with padding is, or twice that.
_PADDED = -4.0


@dataclass(frozen=True)
class MutualMatches:
    """For each patch of the first image, its nearest in the second.

    Attributes:
        index: position of the nearest patch, `(..., patches)`.
        similarity: its cosine; 0 for padding.
        mutual: whether each is the other's nearest.
    """

    index: Int[Tensor, "*batch patches"]
    similarity: Float[Tensor, "*batch patches"]
    mutual: Bool[Tensor, "*batch patches"]

    def above(self, threshold: float) -> Bool[Tensor, "*batch patches"]:
        """The matches: mutual, and of a cosine larger than the threshold.

        Raises:
            ValueError: if `threshold` is not finite.
        """
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be finite, got {threshold}")
        return self.mutual & (self.similarity > threshold)


def mutual_nearest_neighbors(a: Float[Tensor, "*batch n dim"], b: Float[Tensor, "*batch m dim"]) -> MutualMatches:
    """Nearest neighbours by cosine, in both directions.

    Args:
        a: local features of the first image, of any length; rows of zeros are padding. Leading dimensions broadcast,
            so that one query `(n, dim)` meets all candidates `(candidates, m, dim)` at once.
        b: those of the second image.

    Raises:
        TypeError: if an argument is not floating point.
        ValueError: if the shapes do not fit.

    Example:
        >>> a = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 0.0]])
        >>> mutual_nearest_neighbors(a, torch.tensor([[2.0, 0.0], [0.0, 1.0]])).mutual
        tensor([ True, False, False])
    """
    a, b = _checked_patches("a", a), _checked_patches("b", b)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a and b must agree in the last dimension, got shapes {tuple(a.shape)} and {tuple(b.shape)}")
    with torch.autocast(a.device.type, enabled=False):
        cosine = _unit(a, padding_first=True) @ _unit(b, padding_first=False).mT
    similarity, index = cosine.max(-1)
    found = similarity > _PADDED / 2
    # Mutual by the value of the largest in the column: a second argmax, across rows, would cost as much as the product.
    # Of equals the first is mutual.
    row = torch.arange(a.shape[-2], device=a.device).expand_as(index)
    reached = found & (similarity == cosine.amax(-2).gather(-1, index))
    nobody = torch.full_like(cosine[..., 0, :], a.shape[-2], dtype=torch.int64)
    first = nobody.scatter_reduce(-1, index, torch.where(reached, row, a.shape[-2]), "amin")
    return MutualMatches(index, torch.where(found, similarity, 0.0), reached & (first.gather(-1, index) == row))


def mutual_nn_score(
    a: Float[Tensor, "*batch n dim"], b: Float[Tensor, "*batch m dim"], threshold: float = 0.7
) -> Int[Tensor, "*batch"]:
    """The number of matches between two images; arguments as in `mutual_nearest_neighbors`.

    Args:
        a, b: local features.
        threshold: cosine that a match must exceed.

    Example:
        >>> patches = torch.eye(5)
        >>> mutual_nn_score(patches, torch.stack([patches, patches.roll(1, 0), torch.zeros(5, 5)]))
        tensor([5, 5, 0])
    """
    return mutual_nearest_neighbors(a, b).above(threshold).sum(-1)


def mutual_nn_similarity(
    a: Float[Tensor, "*batch n dim"], b: Float[Tensor, "*batch m dim"], threshold: float = 0.7
) -> Float[Tensor, "*batch"]:
    """The mean cosine of the matches between two images: what `mutual_nn_score` counts, with a gradient.

    Where no pair exceeds the threshold, the mean is over all mutual nearest neighbours, of which there is at least
    one; 0 where an image is nothing but padding. Arguments as in `mutual_nn_score`.

    Example:
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> mutual_nn_similarity(a, torch.tensor([[0.8, 0.6], [0.0, 1.0]]))
        tensor(0.9000)
    """
    matches = mutual_nearest_neighbors(a, b)
    kept = matches.above(threshold)
    kept = torch.where(kept.any(-1, keepdim=True), kept, matches.mutual)
    return torch.where(kept, matches.similarity, 0.0).sum(-1) / kept.sum(-1).clamp(min=1)


def local_triplet_loss(
    local: Float[Tensor, "batch patches dim"],
    descriptors: Float[Tensor, "batch width"],
    labels: Int[Tensor, " batch"],
    margin: float = 0.0,
    threshold: float = 0.7,
) -> Float[Tensor, ""]:
    """Asks an image's local matches with its own place to be closer than those with the place that looks most alike.

    Triplets are the hardest by descriptor: of each image, the least similar one of its place and the most similar one
    of another. The loss is the mean over the images that have both; the authors' release sums.

    Args:
        local: local features; rows of zeros are padding.
        descriptors: global descriptors, for the choice of the triplets; they get no gradient.
        labels: places.
        margin: by how much the similarities must differ, at least 0.
        threshold: as in `mutual_nn_similarity`.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes disagree, the batch is empty or `margin` is negative.

    Example:
        >>> local = torch.eye(4).view(2, 2, 4).repeat_interleave(2, 0)  # two places, two equal images each
        >>> local_triplet_loss(local, local.flatten(1), torch.tensor([0, 0, 1, 1]))
        tensor(0.)
    """
    if problem := real_problem(descriptors=descriptors):
        raise TypeError(problem)
    margin = non_negative("margin", margin)
    similarity = pairwise_cosine(checked_embeddings(descriptors, labels).detach())
    local = _checked_patches("local", local)
    if local.ndim != 3 or len(local) != len(labels):
        raise ValueError(f"local must be ({len(labels)}, patches, dim), got shape {tuple(local.shape)}")
    positive, negative = pair_masks(labels)
    hardest_positive = similarity.masked_fill(~positive, math.inf).argmin(1)
    hardest_negative = similarity.masked_fill(~negative, -math.inf).argmax(1)
    to_positive, to_negative = (
        mutual_nn_similarity(local, local[other], threshold) for other in (hardest_positive, hardest_negative)
    )
    whole = positive.any(1) & negative.any(1)
    return torch.where(whole, (margin + to_negative - to_positive).relu(), 0.0).sum() / whole.sum().clamp(min=1)


def discriminative_patches(
    local: Float[Tensor, "batch patches dim"], weights: Float[Tensor, "batch patches"], keep: float | int = 0.425
) -> Float[Tensor, "batch kept dim"]:
    """The local features of the patches with the largest weights, the largest first.

    Args:
        local: local features.
        weights: how telling a patch is, for instance `Aggregation.confidence`.
        keep: how many: a share in (0, 1], of which the whole number below is taken but one at least, or a number. The
            authors keep 225 of 529.

    Raises:
        ValueError: if shapes disagree or `keep` is out of range.

    Example:
        >>> discriminative_patches(torch.arange(4.0).view(1, 4, 1), torch.tensor([[0.1, 0.9, 0.2, 0.8]]), keep=0.5)
        tensor([[[1.],
                 [3.]]])
    """
    local, weights = tensor("local", local), tensor("weights", weights)
    if local.ndim != 3 or weights.shape != local.shape[:2]:
        raise ValueError(
            f"weights must be (batch, patches) for local of {tuple(local.shape)}, got shape {tuple(weights.shape)}"
        )
    patches = local.shape[1]
    if isinstance(keep, Real) and not isinstance(keep, Integral):
        number = max(1, int(in_range("keep", keep, 0, 1, "right") * patches))
    else:
        number = integer("keep", keep, 1, patches)
    chosen = weights.topk(number, dim=1).indices
    return local.gather(1, chosen[..., None].expand(-1, -1, local.shape[2]))


@torch.no_grad()
def rerank(
    query: Float[Tensor, "n dim"],
    database: Float[Tensor, "images m dim"],
    order: Int[Tensor, " ranked"],
    *,
    top: int = 100,
    threshold: float = 0.7,
) -> Int[Tensor, " ranked"]:
    """Orders the first candidates of a query anew, by their number of matches; equals keep their order.

    Args:
        query: local features of the query.
        database: those of all images.
        order: positions in the database, the best first, as a global descriptor has ranked them.
        top: how many candidates to look at; what follows keeps its place.
        threshold: cosine that a match must exceed.

    Raises:
        TypeError: if features are not floating point, or `order` not of integer type.
        ValueError: if shapes do not fit, a feature is not finite, a position is out of range or `top` is below 1.

    Example:
        >>> database = torch.stack([torch.eye(3), torch.eye(3).flip(1), -torch.eye(3)])
        >>> rerank(torch.eye(3)[:2], database, torch.tensor([2, 1, 0]), top=3)
        tensor([1, 0, 2])
    """
    integer("top", top)
    query, database, order = tensor("query", query), tensor("database", database), tensor("order", order)
    if order.ndim != 1 or database.ndim != 3 or query.ndim != 2:
        raise ValueError(
            "query, database and order must be (patches, dim), (images, patches, dim) and (ranked,), "
            f"got shapes {tuple(query.shape)}, {tuple(database.shape)} and {tuple(order.shape)}"
        )
    if order.is_floating_point() or order.dtype == torch.bool:
        raise TypeError(f"order must be integers, got {order.dtype}")
    if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < len(database):
        raise ValueError(f"order must be positions in [0, {len(database)}), got {order}")
    if not (query.isfinite().all() and database.isfinite().all()):
        raise ValueError("query and database must be finite, got NaN or infinity")
    candidates = order[:top]
    scores = mutual_nn_score(query, database[candidates], threshold)
    return torch.cat([candidates[scores.argsort(descending=True, stable=True)], order[top:]])


def _checked_patches(name: str, patches: Tensor) -> Tensor:
    patches = floating_tensor(name, patches)
    if patches.ndim < 2 or 0 in patches.shape[-2:]:
        raise ValueError(f"{name} must be (..., patches, dim), and not empty, got shape {tuple(patches.shape)}")
    return patches


def _unit(patches: Tensor, *, padding_first: bool) -> Tensor:
    """Patches of length 1 with two more numbers, by which a product with padding is below any cosine."""
    padding = _PADDED * (patches == 0).all(-1, keepdim=True).to(patches)
    more = [padding, torch.ones_like(padding)] if padding_first else [torch.ones_like(padding), padding]
    return torch.cat([F.normalize(patches, dim=-1), *more], dim=-1)
