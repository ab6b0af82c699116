"""How good a set of generated samples is: distances to the data's distribution, and coverage of it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(
    samples: Float[Tensor, "batch dim"], mean: Float[Tensor, " dim"], cov: Float[Tensor, "dim dim"]
) -> float:
    """The squared 2-Wasserstein distance between Gaussians: the samples' moments against those given.

    Example:
        >>> round(frechet_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([4.0]), torch.tensor([[2.0]])), 4)
        9.0
    """
    own_mean, own_cov = samples.mean(0), torch.cov(samples.T).reshape(cov.shape)
    # tr (C1^1/2 C2 C1^1/2)^1/2 from a symmetric matrix, for which eigenvalues are safe.
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ own_cov @ root).clamp_min(0).sqrt().sum()
    return float((own_mean - mean).square().sum() + own_cov.trace() + cov.trace() - 2 * cross)


def sliced_wasserstein(
    samples: Float[Tensor, "batch dim"],
    reference: Float[Tensor, "other dim"],
    *,
    projections: int = 200,
    generator: torch.Generator | None = None,
) -> float:
    """The 2-Wasserstein distance averaged over random directions; the sets may differ in size.

    Example:
        >>> x = torch.randn(100, 3)
        >>> sliced_wasserstein(x, x)
        0.0
    """
    directions = torch.randn(samples.shape[1], projections, generator=generator, dtype=samples.dtype)
    directions = directions / directions.norm(dim=0)
    quantiles = (torch.arange(512, dtype=samples.dtype) + 0.5) / 512
    gaps = torch.quantile(samples @ directions, quantiles, dim=0) - torch.quantile(
        reference @ directions, quantiles, dim=0
    )
    return float(gaps.square().mean().sqrt())


def knn_recall(samples: Float[Tensor, "batch dim"], reference: Float[Tensor, "other dim"], k: int = 3) -> float:
    """Share of the reference within the k-nearest-neighbour balls of the samples: how much of the data is covered.

    Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019.

    Example:
        >>> x = torch.randn(100, 3)
        >>> knn_recall(x, x)
        1.0
    """
    radius = torch.cdist(samples, samples).kthvalue(k + 1, dim=1).values
    return float((torch.cdist(reference, samples) <= radius).any(1).double().mean())
