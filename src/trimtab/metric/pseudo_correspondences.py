"""Local matches between images of one place that nobody has labelled, and the loss that trains on them.

Patches that an aggregator puts in one cluster may show one thing; those of which one is clearly the other's nearest are
taken to, and their local features are drawn together.

Reference: Changwei Wang et al., "Focus on Local: Finding Reliable Discriminative Regions for Visual Place Recognition",
AAAI 2025, arXiv 2504.09881.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import integer, tensor_problem


@dataclass(frozen=True)
class Correspondences:
    """Patches of two images that should show the same thing.

    Attributes:
        image: which pair of images, `(matches,)`.
        anchor: patch of the first image.
        positive: patch of the second.
        similarity: their cosine.
    """

    image: Int[Tensor, " matches"]
    anchor: Int[Tensor, " matches"]
    positive: Int[Tensor, " matches"]
    similarity: Float[Tensor, " matches"]


@torch.no_grad()
def pseudo_correspondences(
    features: Float[Tensor, "batch dim n"],
    other_features: Float[Tensor, "batch dim m"],
    assignment: Float[Tensor, "batch clusters n"],
    other_assignment: Float[Tensor, "batch clusters m"],
    importance: Float[Tensor, "batch n"],
    *,
    min_importance: float = 0.1,
    min_assignment: float = 0.1,
    min_similarity: float = 0.8,
    ratio: float = 2.0,
    max_matches: int = 5,
) -> Correspondences:
    """Matches between images of one place that nobody has labelled, from what the aggregator puts in one cluster.

    An important patch looks among the patches of the other image that hold enough of its own cluster. Their most
    similar one is a match if it is similar and clearly more so than the second. A lone candidate has no second to
    rival it, nor does one whose second is dissimilar (the authors' release, which divides, refuses both by the sign,
    and skips each image's first important patch).

    Args:
        features: the backbone's patches.
        other_features: those of other images of the same places, in the same order.
        assignment: of the first images, `Aggregation.assignment`.
        other_assignment: of the others.
        importance: attention on the first images' patches.
        min_importance: a patch must exceed it to look for a match.
        min_assignment: mass in the cluster that a candidate must exceed.
        min_similarity: cosine that a match must exceed.
        ratio: by which factor it must exceed the second candidate's.
        max_matches: of an image, in the order of its patches.

    Raises:
        TypeError: if an argument is no floating-point tensor.
        ValueError: if shapes disagree, or a threshold is not finite.

    Example:
        >>> patches = torch.eye(3)[None]
        >>> held = torch.ones(1, 1, 3)
        >>> found = pseudo_correspondences(patches, patches.roll(1, 2), held, held, torch.tensor([[0.5, 0.0, 0.5]]))
        >>> found.anchor, found.positive
        (tensor([0, 2]), tensor([1, 0]))
    """
    for name, tensor in (("features", features), ("other_features", other_features), ("assignment", assignment)):
        if problem := tensor_problem(**{name: tensor}):
            raise TypeError(problem)
        if tensor.ndim != 3:
            raise ValueError(f"{name} must have three dimensions, got shape {tuple(tensor.shape)}")
    if problem := tensor_problem(other_assignment=other_assignment, importance=importance):
        raise TypeError(problem)
    if not all(math.isfinite(limit) for limit in (min_importance, min_assignment, min_similarity, ratio)):
        raise ValueError(
            "min_importance, min_assignment, min_similarity and ratio must be finite, "
            f"got {min_importance}, {min_assignment}, {min_similarity} and {ratio}"
        )
    if integer("max_matches", max_matches, 0) < 0:
        raise ValueError(f"max_matches must be at least 0, got {max_matches}")
    batch, dim, patches = features.shape
    clusters, other_patches = assignment.shape[1], other_features.shape[2]
    for name, tensor, wanted in (
        ("other_features", other_features, (batch, dim, other_patches)),
        ("assignment", assignment, (batch, clusters, patches)),
        ("other_assignment", other_assignment, (batch, clusters, other_patches)),
        ("importance", importance, (batch, patches)),
    ):
        if tensor.shape != wanted:
            raise ValueError(f"{name} must be of shape {wanted}, got {tuple(tensor.shape)}")
    cosine = F.normalize(features, dim=1).mT @ F.normalize(other_features, dim=1)
    cluster = assignment.argmax(1)
    of_cluster = other_assignment.gather(1, cluster[..., None].expand(-1, -1, other_assignment.shape[2]))
    cosine = cosine.masked_fill(of_cluster <= min_assignment, -math.inf)
    best, nearest = cosine.max(2)
    second = cosine.scatter(2, nearest[..., None], -math.inf).amax(2)
    accepted = (importance > min_importance) & (best > min_similarity) & (best > ratio * second)
    image, anchor = (accepted & (accepted.cumsum(1) <= max_matches)).nonzero(as_tuple=True)
    return Correspondences(image, anchor, nearest[image, anchor], best[image, anchor])


def correspondence_loss(
    local: Float[Tensor, "batch dim n"], other_local: Float[Tensor, "batch dim m"], matches: Correspondences
) -> Float[Tensor, ""]:
    """One less the cosine of matched local features, weighted by the matches' similarity; their mean, 0 without any.

    Args:
        local: local features on the grid of the patches that were matched (`torch.nn.functional.adaptive_avg_pool2d`
            brings a finer map there).
        other_local: those of the other images.
        matches: from `pseudo_correspondences`.

    Returns:
        The loss; the authors' weight is 0.01.

    Raises:
        TypeError: if features are no floating-point tensors.
        ValueError: if they are not `(batch, dim, patches)`.

    Example:
        >>> one = torch.zeros(1, dtype=torch.int64)
        >>> matches = Correspondences(one, one, one, torch.tensor([0.9]))
        >>> correspondence_loss(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [2.0]]]), matches)
        tensor(0.9000)
    """
    if problem := tensor_problem(local=local, other_local=other_local):
        raise TypeError(problem)
    if any(held.ndim != 3 or 0 in held.shape for held in (local, other_local)):
        raise ValueError(
            "local and other_local must be (batch, dim, patches), not empty, "
            f"got shapes {tuple(local.shape)} and {tuple(other_local.shape)}"
        )
    anchors = local.mT[matches.image, matches.anchor]
    positives = other_local.mT[matches.image, matches.positive]
    values = matches.similarity * (1 - F.cosine_similarity(anchors, positives))
    return values.sum() / max(1, len(values))
