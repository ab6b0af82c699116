"""A memory of a feature and a cluster label for every training image, kept up to date while the network learns.

As in online deep clustering: a label changes whenever its image is visited, centroids follow every few steps, and no
cluster stays too small.

Reference: Xiaohang Zhan, Jiahao Xie, Ziwei Liu, Yew-Soon Ong, Chen Change Loy, "Online Deep Clustering for Unsupervised
Representation Learning", CVPR 2020, arXiv 2006.10645.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import finite_tensor, in_range, indices, integer
from trimtab.ops.feature_bank import FeatureBank
from trimtab.ops.states import fits


class ClusterMemory(nn.Module):
    """A unit feature and a cluster label for each training image, and the clusters' centroids.

    `start(features)` clusters what an untrained network makes of the whole training set; then `write(index, z)` after
    each step moves the features of a batch and labels them anew, and `renew()` every few steps moves the centroids.

    Args:
        num_samples: size of the training set.
        dim: width of the features.
        num_clusters: number of clusters.
        momentum: share of the new feature in a row, in (0, 1]; at 1 it takes the row's place.
        min_cluster: clusters of fewer images are dissolved, and the largest cluster is split in their place.

    Attributes:
        features: (num_samples, dim), of length one.
        labels: (num_samples,), int64.
        centroids: (num_clusters, dim), the means of the clusters' features.

    Raises:
        ValueError: a size or `momentum` is out of range, or there are more clusters than samples.

    Example:
        >>> memory = ClusterMemory(4, 2, num_clusters=2)
        >>> z = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.1]])
        >>> memory.start(z, generator=torch.Generator().manual_seed(0))
        >>> bool(memory.labels[0] == memory.labels[3] != memory.labels[1] == memory.labels[2])
        True
    """

    centroids: Tensor

    def __init__(
        self, num_samples: int, dim: int, num_clusters: int, *, momentum: float = 1.0, min_cluster: int = 2
    ) -> None:
        super().__init__()
        self.num_clusters = integer("num_clusters", num_clusters, 2)
        if num_clusters > integer("num_samples", num_samples):
            raise ValueError(f"num_clusters must be at most num_samples = {num_samples}, got {num_clusters}")
        self.momentum = in_range("momentum", momentum, 0, 1, "right")
        self.min_cluster = integer("min_cluster", min_cluster)
        self.bank = FeatureBank(num_samples, dim, payload=(), payload_dtype=torch.int64)
        self.register_buffer("centroids", torch.zeros(num_clusters, dim))

    @property
    def features(self) -> Tensor:
        return self.bank.features

    @property
    def labels(self) -> Tensor:
        assert self.bank.payload is not None
        return self.bank.payload

    @torch.no_grad()
    def start(
        self,
        z: Float[Tensor, "samples dim"],
        *,
        generator: torch.Generator | None = None,
        iterations: int = 20,
    ) -> None:
        """Takes the features of all training images, in their order, and clusters them by k-means.

        Args:
            z: features, of any length.
            generator: draws the first centroids, on the CPU.
            iterations: of k-means.

        Raises:
            ValueError: there is not one finite feature for each sample, or `iterations` is not positive.
        """
        z = finite_tensor("z", z, ndim=2, floating=True)
        if z.shape != self.features.shape:
            raise ValueError(f"z must be of shape {tuple(self.features.shape)}, got {tuple(z.shape)}")
        integer("iterations", iterations)
        everyone = torch.arange(len(z), device=z.device)
        self.bank.write(everyone, z, torch.zeros_like(everyone))
        chosen = torch.randperm(len(z), generator=generator)[: self.num_clusters]
        self.centroids.copy_(self.features[chosen.to(self.features.device)])
        for _ in range(iterations):
            # By distance, as in k-means, where means are of different lengths.
            score = self.features @ self.centroids.mT - self.centroids.square().sum(1) / 2
            self.labels.copy_(score.argmax(1))
            self._move_centroids()
        self.renew()

    @torch.no_grad()
    def write(self, index: Int[Tensor, " batch"], z: Float[Tensor, "batch dim"]) -> None:
        """Moves the features of these samples and gives them the label of the centroid that fits best.

        Args:
            index: the samples' positions in the training set, each once.
            z: their features, of any length.

        Raises:
            TypeError: if `z` is not floating point, or `index` not int64.
            ValueError: if shapes do not fit, or an index is out of range or repeated.
        """
        self.check(index, z)
        new = F.normalize(z.to(self.features), dim=1)
        if self.momentum < 1:
            new = F.normalize(self.features[index].lerp(new, self.momentum), dim=1)
        self.bank.write(index, new, (new @ self.centroids.mT).argmax(1))

    @torch.no_grad()
    def renew(self) -> None:
        """Moves the centroids to the means of their clusters; small clusters make room for halves of the largest."""
        self._move_centroids()
        counts = self.labels.bincount(minlength=self.num_clusters)
        small = counts < self.min_cluster
        if not bool(small.any()) or bool(small.all()):
            return
        fits_best = (self.features @ self.centroids.mT).masked_fill(small, -torch.inf).argmax(1)
        self.labels.copy_(torch.where(small[self.labels], fits_best, self.labels))
        for empty in small.nonzero()[:, 0].tolist():
            largest = int(self.labels.bincount(minlength=self.num_clusters).argmax())
            members = (self.labels == largest).nonzero()[:, 0]
            if len(members) > 1:
                self.labels[members[_second_half(self.features[members])]] = empty
        self._move_centroids()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, but a state that does not fit changes nothing.

        Raises:
            ValueError: it is of a memory of another form.
        """
        if strict and not fits(state_dict, self.state_dict()):
            raise ValueError("state_dict must be of a memory of this form, got other names or shapes")
        return super().load_state_dict(state_dict, strict, assign)

    def _move_centroids(self) -> None:
        """To the means of their clusters; one without members stays."""
        counts = self.labels.bincount(minlength=self.num_clusters)[:, None]
        totals = torch.zeros_like(self.centroids).index_add_(0, self.labels, self.features)
        self.centroids.copy_(torch.where(counts > 0, totals / counts.clamp(min=1), self.centroids))

    def check(self, index: Int[Tensor, " batch"], z: Float[Tensor, "batch dim"]) -> None:
        """Refuses what could not be written; arguments and errors as in `write`, save that an index may come twice."""
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"z must be floating point, got {getattr(z, 'dtype', type(z).__name__)}")
        if z.ndim != 2 or len(z) == 0 or z.shape[1] != self.features.shape[1]:
            raise ValueError(f"z must be (batch, {self.features.shape[1]}), not empty, got shape {tuple(z.shape)}")
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index must be int64, got {getattr(index, 'dtype', type(index).__name__)}")
        if index.shape != z.shape[:1]:
            raise ValueError(f"index must be of shape ({len(z)},), got {tuple(index.shape)}")
        indices("index", index, len(self.features))


def _second_half(z: Tensor, iterations: int = 20) -> Tensor:
    """Which rows fall to the second of two means; never none, never all."""
    first = z[(z - z.mean(0)).square().sum(1).argmax()]
    means = torch.stack([first, z[(z - first).square().sum(1).argmax()]])
    second = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    for _ in range(iterations):
        second = torch.cdist(z, means).argmin(1) == 1
        if bool(second.all()) or not bool(second.any()):
            return torch.arange(len(z), device=z.device) % 2 == 1  # all the same: any half
        means = torch.stack([z[~second].mean(0), z[second].mean(0)])
    return second
