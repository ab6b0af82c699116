r"""Contrastive losses on embeddings: a query must find its own among others, by cosine similarity.

$$
\mathcal{L}_i = -\log
\frac{e^{(\cos(q_i, p_i) - m) / \tau}}{e^{(\cos(q_i, p_i) - m) / \tau} + \sum_j e^{\cos(q_i, n_j) / \tau}}
$$

Embeddings are normalised inside; half precision is raised to float32, and autocast is left out.

References:
    Aaron van den Oord, Yazhe Li, Oriol Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
    arXiv 1807.03748 (InfoNCE).
    Ting Chen, Simon Kornblith, Mohammad Norouzi, Geoffrey Hinton, "A Simple Framework for Contrastive Learning of
    Visual Representations", ICML 2020, arXiv 2002.05709 (NT-Xent).
    Prannay Khosla and others, "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import class_indices, floating_tensor, integer, number, one_of, positive, same_shape
from trimtab.ops.pairwise import pairwise_cosine

Reduction = Literal["none", "mean", "sum"]


def info_nce(
    query: Float[Tensor, "batch dim"],
    positive: Float[Tensor, "batch dim"],
    negatives: Float[Tensor, "negatives dim"] | Float[Tensor, "batch negatives dim"] | None = None,
    temperature: float = 0.1,
    margin: float = 0.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Each query's cross-entropy of finding its positive among its negatives.

    Args:
        query: embeddings, of any length.
        positive: one for each query.
        negatives: the same for all queries (a queue), or some for each; None takes the positives of the other queries.
        temperature: divides the cosines.
        margin: taken from the positive's cosine: above zero the task is stricter, below it is easier.
        reduction: "none", "mean" or "sum" over the batch.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes do not fit, the batch is empty, or `temperature` is not positive.

    Example:
        >>> query, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(info_nce(query, 3 * query, other, temperature=1.0).item(), 4)  # log(1 + 1 / e)
        0.3133
    """
    query, positive = _embeddings("query", query), _embeddings("positive", positive)
    same_shape("positive", positive, "query", query)
    if negatives is None:
        cosines = pairwise_cosine(query, positive)
        own = torch.eye(len(query), dtype=torch.bool, device=query.device)
        # A query's own positive is no negative of it; the smallest number, for -inf alone in a row has no gradient.
        away = cosines.masked_fill(own, torch.finfo(cosines.dtype).min)
        return info_nce_of_cosines(cosines.diagonal(), away, temperature, margin, reduction=reduction)
    negatives = floating_tensor("negatives", negatives)
    dim = query.shape[1]
    if negatives.shape[-1:] != (dim,) or (negatives.ndim != 2 and negatives.shape[:-2] != query.shape[:1]):
        wanted = f"(negatives, {dim}) or ({len(query)}, negatives, {dim})"
        raise ValueError(f"negatives must have shape {wanted}, got {tuple(negatives.shape)}")
    with torch.autocast(query.device.type, enabled=False):
        q, p, n = (F.normalize(part, dim=-1) for part in (query, positive, negatives))
        away = q @ n.mT if n.ndim == 2 else (n @ q[:, :, None]).squeeze(2)
        return info_nce_of_cosines((q * p).sum(1), away, temperature, margin, reduction=reduction)


def info_nce_of_cosines(
    positive: Float[Tensor, " batch"],
    negatives: Float[Tensor, "batch negatives"],
    temperature: float = 0.1,
    margin: float = 0.0,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """`info_nce` where the cosines are at hand. A negative that is none may have the cosine -inf.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes do not fit, the batch is empty, or `temperature` is not positive.

    Example:
        >>> round(info_nce_of_cosines(torch.zeros(1), torch.zeros(1, 3)).item(), 4)  # log(4)
        1.3863
    """
    _check_temperature(temperature)
    number("margin", margin)
    one_of("reduction", reduction, ("none", "mean", "sum"))
    positive, negatives = floating_tensor("positive", positive), floating_tensor("negatives", negatives)
    if positive.ndim != 1 or len(positive) == 0:
        raise ValueError(f"positive must be (batch,) with at least one sample, got shape {tuple(positive.shape)}")
    if negatives.ndim != 2 or len(negatives) != len(positive):
        raise ValueError(f"negatives must be ({len(positive)}, negatives), got shape {tuple(negatives.shape)}")
    logits = torch.cat([positive[:, None] - margin, negatives], 1) / temperature
    value = logits.logsumexp(1) - logits[:, 0]
    return value if reduction == "none" else value.mean() if reduction == "mean" else value.sum()


def nt_xent(z: Float[Tensor, "rows dim"], n_views: int = 2, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss: every view must find the other views of its sample among all other rows.

    Args:
        z: embeddings, view by view: the whole batch's first views, then its second ones (`torch.cat([z1, z2])`).
        n_views: views of each sample.
        temperature: divides the cosines.

    Returns:
        The mean over all rows; with more than two views the mean over a row's positives is taken outside the logarithm.

    Raises:
        TypeError: `z` is no floating-point tensor, or `n_views` no integer.
        ValueError: `z` has not rows for `n_views` views of at least one sample, or `temperature` is not positive.

    Example:
        >>> round(nt_xent(torch.eye(2).repeat(2, 1), temperature=1.0).item(), 4)  # log((e + 2) / e)
        0.5514
    """
    integer("n_views", n_views, 2)
    z = _embeddings("z", z)
    if len(z) % n_views:
        raise ValueError(f"z must have a multiple of n_views = {n_views} rows, got {len(z)}")
    return sup_con(z, torch.arange(len(z) // n_views, device=z.device).repeat(n_views), temperature)


def sup_con(z: Float[Tensor, "rows dim"], labels: Int[Tensor, " rows"], temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss: every row must find the rows of its label among all other rows.

    Args:
        z: embeddings.
        labels: of the rows, any integers.
        temperature: divides the cosines.

    Returns:
        The mean over the rows whose label comes more than once; zero where none does.

    Raises:
        TypeError: `z` is no floating-point tensor, or `labels` is not int64.
        ValueError: shapes do not fit, the batch is empty, or `temperature` is not positive.

    Example:
        >>> z, labels = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([7, 7, 3])
        >>> round(sup_con(z, labels, temperature=1.0).item(), 4)  # log(1 + 1 / e)
        0.3133
    """
    _check_temperature(temperature)
    z = _embeddings("z", z)
    class_indices("labels", labels)
    if labels.shape != z.shape[:1]:
        raise ValueError(f"labels must be one a row of z, ({len(z)},), got shape {tuple(labels.shape)}")
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (labels[:, None] == labels) & ~itself
    cosines = pairwise_cosine(z)
    # The smallest number, for -inf alone in a row has no gradient.
    log_probs = (cosines / temperature).masked_fill(itself, torch.finfo(cosines.dtype).min).log_softmax(1)
    count = positives.sum(1)
    of_rows = -torch.where(positives, log_probs, 0).sum(1) / count.clamp(min=1)
    return of_rows.sum() / (count > 0).sum().clamp(min=1)


def _check_temperature(temperature: float) -> None:
    positive("temperature", temperature)


def _embeddings(name: str, value: Tensor) -> Tensor:
    value = floating_tensor(name, value)
    if value.ndim != 2 or 0 in value.shape:
        raise ValueError(f"{name} must be (rows, dim) with at least one row, got shape {tuple(value.shape)}")
    return value
