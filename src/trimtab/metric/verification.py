r"""How well similarities tell genuine pairs from impostors: verification, one to one, at a fixed threshold.

$$
\mathrm{TPR@FAR}(f) = \max_t \, \frac{|\{ p \in G : p > t \}|}{|G|} \quad \text{where} \quad
\frac{|\{ n \in I : n > t \}|}{|I|} \le f
$$

with G the similarities of the pairs that share a class and I those of the pairs that do not. The equal error rate is
the share of errors at the threshold where both kinds are as frequent, the AUROC the probability that a genuine pair is
more similar than an impostor.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.metric.pairs import checked_points
from trimtab.ops.arguments import finite_tensor, in_range, same_shape, tensor
from trimtab.ops.pairwise import pairwise_cosine


class PairScores(NamedTuple):
    """Every pair of a set of samples, once.

    Attributes:
        similarity: cosines, `(pairs,)`.
        same: whether the two share a class, `(pairs,)`.
    """

    similarity: Float[Tensor, " pairs"]
    same: Bool[Tensor, " pairs"]


def pair_scores(embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> PairScores:
    """Cosines of all `n * (n - 1) / 2` pairs and whether they share a label; memory is quadratic in `n`.

    Args:
        embeddings: one row per sample, of any length; a tensor or an array.
        labels: classes.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes disagree, there is no sample or a value is not finite.

    Example:
        >>> pair_scores(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([5, 5, 3]))
        PairScores(similarity=tensor([1., 0., 0.]), same=tensor([ True, False, False]))
    """
    embeddings, labels = checked_points(embeddings, labels)
    first, second = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
    return PairScores(pairwise_cosine(embeddings)[first, second], labels[first] == labels[second])


def tpr_at_far(similarity: Float[Tensor, " pairs"], same: Bool[Tensor, " pairs"], far: float = 1e-3) -> float:
    """Largest share of genuine pairs accepted at a threshold that accepts at most a share `far` of the impostors.

    Also called true accept rate. Equation in the module's docstring; the threshold is the similarity of an impostor.

    Args:
        similarity: larger for pairs more alike; a tensor or an array.
        same: whether a pair is genuine.
        far: false accept rate, in [0, 1].

    Returns:
        The rate, in [0, 1].

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes disagree, a value is not finite, `far` is out of range or one kind of pairs is missing.

    Example:
        >>> similarity = torch.tensor([0.9, 0.4, 0.5, 0.3, 0.2, 0.1])
        >>> same = torch.tensor([True, True, False, False, False, False])
        >>> tpr_at_far(similarity, same, far=0.0), tpr_at_far(similarity, same, far=0.25)
        (0.5, 1.0)
    """
    far = in_range("far", far, 0, 1)
    genuine, impostor = _sorted_kinds(similarity, same)
    # A rate such as 0.29 of 100 pairs is 28.999999999999996 in floating point and means 29.
    accepted = math.floor(far * len(impostor) * (1 + 1e-12))
    if accepted >= len(impostor):
        return 1.0
    threshold = impostor[len(impostor) - 1 - accepted]
    return float((genuine > threshold).double().mean())


def equal_error_rate(similarity: Float[Tensor, " pairs"], same: Bool[Tensor, " pairs"]) -> float:
    """Share of errors at the threshold where false accepts are as frequent as false rejects.

    The thresholds are the similarities themselves, at or above which a pair is accepted; where no threshold makes both
    rates equal, it is their mean at the one that brings them nearest.

    Raises:
        TypeError, ValueError: as `tpr_at_far`.

    Example:
        >>> equal_error_rate(torch.tensor([0.9, 0.4, 0.5, 0.3]), torch.tensor([True, True, False, False]))
        0.5
    """
    genuine, impostor = _sorted_kinds(similarity, same)
    thresholds = torch.cat([genuine, impostor])
    rejected = torch.searchsorted(genuine, thresholds).double() / len(genuine)
    accepted = 1 - torch.searchsorted(impostor, thresholds).double() / len(impostor)
    nearest = (rejected - accepted).abs().argmin()
    return float((rejected + accepted)[nearest] / 2)


def auroc(similarity: Float[Tensor, " pairs"], same: Bool[Tensor, " pairs"]) -> float:
    """Probability that a genuine pair is more similar than an impostor; ties count half.

    Raises:
        TypeError, ValueError: as `tpr_at_far`.

    Example:
        >>> auroc(torch.tensor([0.9, 0.4, 0.5, 0.3]), torch.tensor([True, True, False, False]))
        0.75
    """
    genuine, impostor = _sorted_kinds(similarity, same)
    below = torch.searchsorted(impostor, genuine).double() + torch.searchsorted(impostor, genuine, right=True)
    return float(below.mean() / 2 / len(impostor))


def _sorted_kinds(similarity: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities of the genuine and of the impostor pairs, each ascending."""
    similarity = finite_tensor("similarity", similarity, ndim=1, floating=True).detach()
    same = tensor("same", same)
    if same.dtype != torch.bool:
        raise TypeError(f"same must be bool, got {same.dtype}")
    same_shape("same", same, "similarity", similarity)
    if bool(same.all()) or not bool(same.any()):
        raise ValueError("same must hold pairs of both kinds, got one")
    return similarity[same].sort().values, similarity[~same].sort().values
