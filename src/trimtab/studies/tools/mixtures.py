"""Data of which everything is known: Gaussian mixtures whose denoiser, classifier and moments are exact."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from trimtab.data import load
from trimtab.diffusion import AnalyticGMM

Target = Literal["ring8", "digits"]


@functools.cache
def mixture(target: Target) -> AnalyticGMM:
    """The data of a target, in float64.

    "digits" is a mixture of 30 low-rank Gaussians in 64 dimensions fitted to scikit-learn's digits, "ring8" has eight
    modes on a circle.

    Raises:
        ValueError: for an unknown target.
    """
    if target == "ring8":
        return AnalyticGMM.ring(8, dtype=torch.float64)
    if target == "digits":
        return _digits_mixture()
    raise ValueError(f"target must be 'ring8' or 'digits', got {target!r}")


def _digits_mixture(clusters: int = 3, rank: int = 8, floor: float = 0.02) -> AnalyticGMM:
    """Per class three k-means clusters, each a Gaussian of rank 8 plus a little isotropic noise; pixels in [-1, 1]."""
    from sklearn.cluster import KMeans

    data = load("digits")
    x = torch.cat([data.x_train, data.x_test]).flatten(1).double() * 2 - 1
    y = torch.cat([data.y_train, data.y_test])
    weights, means, covs, labels = [], [], [], []
    for label in range(data.num_classes):
        members = x[y == label]
        assigned = torch.from_numpy(KMeans(clusters, n_init=1, random_state=0).fit_predict(members.numpy()))
        for cluster in range(clusters):
            part = members[assigned == cluster]
            values, vectors = torch.linalg.eigh(torch.cov(part.T))
            main = vectors[:, -rank:]
            weights.append(len(part) / len(x))
            means.append(part.mean(0))
            covs.append((main * values[-rank:]) @ main.T + floor**2 * torch.eye(x.shape[1], dtype=x.dtype))
            labels.append(label)
    return AnalyticGMM(
        torch.tensor(weights, dtype=x.dtype), torch.stack(means), torch.stack(covs), torch.tensor(labels)
    )
