r"""Retrieval scores of embeddings by cosine similarity, each sample a query against all others.

$$
\mathrm{MAP@R} = \frac{1}{Q} \sum_{q} \frac{1}{R_q} \sum_{i=1}^{R_q} [\text{i-th neighbour is relevant}] \, P_q(i)
$$

with $R_q$ the number of other samples of the query's class and $P_q(i)$ the precision among the first i.

Reference: Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020, arXiv 2003.08505.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.metric.pairs import checked_points
from trimtab.ops.arguments import integer
from trimtab.ops.pairwise import pairwise_cosine

# Rows of the similarity matrix held at once.
_CHUNK = 1024


def recall_at_k(embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"], k: int = 1) -> float:
    """Share of the samples with at least one sample of their class among the `k` nearest others.

    Args:
        embeddings: one row per sample, of any length; a tensor or an array.
        labels: classes; samples that are alone in theirs are no queries.
        k: number of neighbours, at least 1 and below the number of samples.

    Returns:
        The recall, in [0, 1].

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes disagree, a value is not finite, `k` is out of range or no two samples share a class.

    Example:
        >>> recall_at_k(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.9, 1.0]]), torch.tensor([0, 0, 1, 0]))
        0.6666666666666666
    """
    embeddings, labels = checked_points(embeddings, labels)
    k = integer("k", k, 1, max(len(labels) - 1, 1))
    relevant, num_relevant = _ranked(embeddings, labels, k)
    return float(relevant[num_relevant > 0].any(1).double().mean())


def map_at_r(embeddings: Float[Tensor, "n dim"], labels: Int[Tensor, " n"]) -> float:
    """Mean average precision at R (equation in the module's docstring).

    Args:
        embeddings: one row per sample, of any length; a tensor or an array.
        labels: classes; samples that are alone in theirs are no queries.

    Returns:
        The score, in [0, 1].

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes disagree, a value is not finite or no two samples share a class.

    Example:
        >>> map_at_r(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    embeddings, labels = checked_points(embeddings, labels)
    relevant, num_relevant = _ranked(embeddings, labels, int(labels.unique(return_counts=True)[1].max()) - 1)
    rank = torch.arange(1, relevant.shape[1] + 1, device=labels.device)
    hits = relevant & (rank <= num_relevant[:, None])
    precision = hits.cumsum(1) / rank
    queries = num_relevant > 0
    return float(((precision * hits).sum(1)[queries] / num_relevant[queries]).double().mean())


def _ranked(embeddings: Tensor, labels: Tensor, k: int) -> tuple[Bool[Tensor, "n k"], Int[Tensor, " n"]]:
    """Whether each of the `k` nearest others is of the query's class, and how many others are."""
    _, class_of, size = labels.unique(return_inverse=True, return_counts=True)
    if int(size.max()) < 2:
        raise ValueError("labels must have a class of two samples, got one sample in each")
    relevant = []
    for rows in torch.arange(len(labels), device=labels.device).split(_CHUNK):
        similarity = pairwise_cosine(embeddings[rows], embeddings)
        similarity[torch.arange(len(rows), device=labels.device), rows] = -math.inf
        relevant.append(labels[similarity.topk(k, dim=1).indices] == labels[rows, None])
    return torch.cat(relevant), size[class_of] - 1
