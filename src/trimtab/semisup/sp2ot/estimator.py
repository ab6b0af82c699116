"""Clustering of samples by a small network that is trained on planned pseudo-labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from trimtab.ops.arguments import in_range, integer, non_negative, positive
from trimtab.semisup.sp2ot.plan import knn_gaussian_affinity, progressive_mass, sp2ot
from trimtab.semisup.sp2ot.rule import CosineHead, partial_cross_entropy

Matrix = NDArray[Any]
Augment = Callable[[Tensor, torch.Generator], Tensor]


class SP2OTClustering(ClusterMixin, BaseEstimator):  # type: ignore[misc]
    r"""Clusters samples of unequal classes: a network learns the pseudo-labels of a plan that takes in ever more.

    Features are centred and brought to a common scale. A network of one hidden layer with a head of cosines first
    learns the clusters of k-means; then, in each epoch, the plan of `sp2ot` is made over all samples, and the network
    learns its rows on samples with noise.

    Args:
        n_clusters: number of clusters, or an upper bound: clusters may stay empty.
        hidden: width of the network.
        epochs: plans that are made, each followed by a pass over the samples.
        warmup: passes over the samples with the labels of k-means, before the first plan.
        lr: learning rate of Adam.
        batch_size: samples in a step.
        initial_mass: share of the samples that takes part at first; 1 takes all from the start.
        gamma: weight of the sizes' divergence from equal ones; infinite makes clusters equal.
        epsilon: weight of the plan's entropy.
        semantic: weight of the similarities: what a cluster's cost falls by, at the start, where all neighbours go
            there. Seven is what the authors' weight of 1,000 comes to with their batches and memory.
        n_neighbors: of each sample in the similarities.
        noise: standard deviation of the noise on samples, in units of that of the features.
        augment: what is done to samples in a step instead, a function of samples and a generator.
        max_iter: most rounds of a plan.
        random_state: seed or `np.random.RandomState` of all that is drawn.

    Attributes:
        labels_: clusters of the samples.
        network_: from centred, scaled samples to logits.
        plan_: (n, n_clusters) the last plan, times n.
        n_iter_: epochs.
        n_features_in_: number of features.

    Raises:
        ValueError: there are fewer samples than clusters, a sample is not finite, or a setting is out of its range.

    Example:
        >>> X = np.concatenate([np.zeros((6, 2)), np.ones((3, 2))]) + np.arange(9)[:, None] / 100
        >>> SP2OTClustering(2, epochs=5, random_state=0).fit_predict(X)[[0, 5, 8]].tolist() in ([0, 0, 1], [1, 1, 0])
        True
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        hidden: int = 64,
        epochs: int = 50,
        warmup: int = 10,
        lr: float = 1e-3,
        batch_size: int = 128,
        initial_mass: float = 0.1,
        gamma: float = 1.0,
        epsilon: float = 0.1,
        semantic: float = 7.0,
        n_neighbors: int = 20,
        noise: float = 0.1,
        augment: Augment | None = None,
        max_iter: int = 3,
        random_state: Any = None,
    ) -> None:
        self.n_clusters, self.hidden, self.epochs, self.warmup = n_clusters, hidden, epochs, warmup
        self.lr, self.batch_size, self.initial_mass, self.gamma = lr, batch_size, initial_mass, gamma
        self.epsilon, self.semantic, self.n_neighbors, self.noise = epsilon, semantic, n_neighbors, noise
        self.augment, self.max_iter, self.random_state = augment, max_iter, random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Clusters samples (n, features); `y` is ignored."""
        X = validate_data(self, X, dtype=np.float64)
        self._check(X)
        center, scale = X.mean(0), float(X.std()) or 1.0
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        x = torch.from_numpy((X - center) / scale).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Linear(x.shape[1], self.hidden), nn.ReLU(), CosineHead(self.hidden, self.n_clusters)
            )
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        if self.warmup:
            labels = _k_means(x, self.n_clusters, seed)
            for _ in range(self.warmup):
                self._pass(network, optimizer, x, labels, generator)
        neighbors = min(self.n_neighbors, len(x) - 1)
        similarity = knn_gaussian_affinity(x, neighbors) if self.semantic and neighbors else None
        scaling, targets = None, x.new_full((len(x), self.n_clusters), 1 / self.n_clusters)
        for epoch in range(self.epochs):
            rho = progressive_mass(epoch, max(1, self.epochs - 1), self.initial_mass)
            with torch.no_grad():
                cost = -network(x).double().log_softmax(1)
            # A cluster that all neighbours share becomes cheaper by 2 lam neighbours / n.
            lam = self.semantic * (1 - rho) * len(x) / (2 * max(1, neighbors))
            found = sp2ot(
                cost,
                similarity,
                rho,
                lam=lam,
                gamma=self.gamma,
                epsilon=self.epsilon,
                max_iter=self.max_iter,
                tol=1e-3,
                max_sweeps=100,
                scaling=scaling,
            )
            scaling, targets = found.scaling, (len(x) * found.plan).float()
            self._pass(network, optimizer, x, targets, generator)
        self.network_, self.center_, self.scale_ = network.eval(), center, scale
        self.plan_, self.n_iter_ = targets.numpy(), self.epochs
        self.labels_ = self.predict(X)
        return self

    def predict(self, X: Any) -> Int[Matrix, " n"]:
        """The cluster of each sample."""
        return np.asarray(self.predict_proba(X).argmax(1))

    @torch.no_grad()
    def predict_proba(self, X: Any) -> Float[Matrix, "n clusters"]:
        """The network's softmax for each sample."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        x = torch.from_numpy((X - self.center_) / self.scale_).float()
        return np.asarray(self.network_(x).softmax(1).numpy())

    def _pass(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        targets: Tensor,
        generator: torch.Generator,
    ) -> None:
        """One pass over the samples in an order that is drawn."""
        for index in torch.randperm(len(x), generator=generator).split(self.batch_size):
            batch = x[index]
            if self.augment is not None:
                batch = self.augment(batch, generator)
            elif self.noise:
                batch = batch + self.noise * torch.randn(batch.shape, generator=generator)
            loss = partial_cross_entropy(network(batch), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _check(self, X: Matrix) -> None:
        for name in ("n_clusters", "hidden", "batch_size", "n_neighbors", "max_iter"):
            integer(name, getattr(self, name))
        for name in ("epochs", "warmup"):
            integer(name, getattr(self, name), 0)
        for name in ("lr", "epsilon"):
            positive(name, getattr(self, name))
        for name in ("semantic", "noise"):
            non_negative(name, getattr(self, name))
        in_range("initial_mass", self.initial_mass, 0, 1, "right")
        if self.gamma != math.inf:
            positive("gamma", self.gamma)
        if len(X) < self.n_clusters:
            raise ValueError(f"X must have at least n_clusters={self.n_clusters} samples, got n_samples = {len(X)}")


def _k_means(x: Tensor, n_clusters: int, seed: int) -> Tensor:
    """The clusters of k-means as one-hot rows."""
    from sklearn.cluster import KMeans

    found = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(x.double().numpy())
    return F.one_hot(torch.from_numpy(found).long(), n_clusters).float()
