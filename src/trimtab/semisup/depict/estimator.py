"""The targets in closed form, and the estimator that learns them by turns."""

from __future__ import annotations

import copy
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from trimtab.ops.arguments import finite_tensor, integer, non_negative, one_of, positive
from trimtab.semisup.depict.autoencoder import (
    DenoisingAutoencoder,
    conv_autoencoder,
    layerwise_reconstruction_loss,
    mlp_autoencoder,
)

Targets = Literal["paper", "dec"]
Matrix = NDArray[Any]


@torch.no_grad()
def depict_targets(p: Float[Tensor, "n clusters"], targets: Targets = "paper") -> Float[Tensor, "n clusters"]:
    """Soft targets from the predictions of all samples, each cluster weighed down by its size.

    Args:
        p: predictions of the whole set, rows that sum to one.
        targets: "paper" divides by the root of the sizes; "dec", as the authors' code, squares and divides by them.

    Returns:
        Rows that sum to one.

    Raises:
        TypeError: `p` is not floating point.
        ValueError: `p` is no matrix of distributions, or `targets` is unknown.

    Example:
        >>> depict_targets(torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
        tensor([[0.8386, 0.1614],
                [0.4641, 0.5359]])
    """
    one_of("targets", targets, get_args(Targets))
    p = finite_tensor("p", p, ndim=2, floating=True).detach()
    if 0 in p.shape or bool((p < 0).any()) or not torch.allclose(p.sum(1), torch.ones_like(p[:, 0]), atol=1e-4):
        raise ValueError("p must have rows that are distributions, at least one, got others")
    sizes = p.sum(0).clamp_min(torch.finfo(p.dtype).tiny)
    q = p / sizes.sqrt() if targets == "paper" else p.square() / sizes
    return q / q.sum(1, keepdim=True)


class DEPICT(TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    """Deep embedded regularised clustering.

    Samples are scaled to [-1, 1]. An autoencoder is trained; k-means on its clean code gives a head its start; head
    and autoencoder learn the clusters of k-means for a few epochs, and then the targets of `depict_targets`, which are
    computed anew from all samples before each epoch.

    The authors train the autoencoder until its loss has stalled for a hundred epochs, and the clusters of k-means until
    the mutual information with a split of the data has; both are numbers of epochs here.

    Args:
        n_clusters: number of clusters.
        autoencoder: to start from, which is copied; its code may have any length. By default `mlp_autoencoder` for
            vectors and `conv_autoencoder` for images, with a code as long as there are clusters.
        targets: see `depict_targets`.
        pretrain_epochs: of the autoencoder alone; 0 takes it as it is.
        init_epochs: with the clusters of k-means.
        epochs: most epochs with targets.
        tol: mean squared change of the targets at which to stop.
        lr: learning rate of Adam; the authors' is 1e-4.
        batch_size: samples in a step.
        layer_weight: of the reconstruction of inner layers.
        random_state: seed or `np.random.RandomState` of all that is drawn.

    Attributes:
        labels_: clusters of the samples.
        initial_labels_: those of k-means on the code of the trained autoencoder.
        autoencoder_, head_: the trained network; `head_` gives logits of a code.
        targets_: (n, n_clusters) the last targets.
        n_iter_: epochs with targets.
        n_features_in_: number of features; of images, of channels.

    Raises:
        ValueError: there are fewer samples than clusters, a sample is not finite, or a setting is out of its range.

    Example:
        >>> X = np.concatenate([np.zeros((6, 4)), np.ones((6, 4))]) + np.arange(12)[:, None] / 100
        >>> labels = DEPICT(2, pretrain_epochs=20, epochs=5, random_state=0).fit_predict(X)
        >>> labels.tolist() in ([0] * 6 + [1] * 6, [1] * 6 + [0] * 6)
        True
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        autoencoder: DenoisingAutoencoder | None = None,
        targets: Targets = "paper",
        pretrain_epochs: int = 100,
        init_epochs: int = 8,
        epochs: int = 60,
        tol: float = 1e-7,
        lr: float = 1e-3,
        batch_size: int = 128,
        layer_weight: float = 0.1,
        random_state: Any = None,
    ) -> None:
        self.n_clusters, self.autoencoder, self.targets = n_clusters, autoencoder, targets
        self.pretrain_epochs, self.init_epochs, self.epochs, self.tol = pretrain_epochs, init_epochs, epochs, tol
        self.lr, self.batch_size, self.layer_weight, self.random_state = lr, batch_size, layer_weight, random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Clusters samples (n, features) or images (n, channels, height, width); `y` is ignored."""
        from sklearn.cluster import KMeans

        X = validate_data(self, X, dtype=np.float64, allow_nd=True)
        self._check(X)
        low, high = float(X.min()), float(X.max())
        scaling = (low + high) / 2, (high - low) / 2 or 1.0
        x = torch.from_numpy((X - scaling[0]) / scaling[1]).float()
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            autoencoder = copy.deepcopy(self.autoencoder) or self._default(x)
        optimizer = torch.optim.Adam(autoencoder.parameters(), lr=self.lr)
        for _ in range(self.pretrain_epochs):
            self._pass(autoencoder, None, optimizer, x, None, generator)
        codes = _codes(autoencoder, x)
        k_means = KMeans(self.n_clusters, n_init=10, random_state=seed).fit(codes.double().numpy())
        initial = torch.from_numpy(k_means.labels_).long()
        head = nn.utils.skip_init(nn.Linear, codes.shape[1], self.n_clusters)
        with torch.no_grad():
            centers = torch.from_numpy(k_means.cluster_centers_).float()
            head.weight.copy_(F.normalize(centers, dim=1))
            head.bias.zero_()
        optimizer = torch.optim.Adam([*autoencoder.parameters(), *head.parameters()], lr=self.lr)
        targets = F.one_hot(initial, self.n_clusters).float()
        for _ in range(self.init_epochs):
            self._pass(autoencoder, head, optimizer, x, targets, generator)
        n_iter = 0
        while n_iter < self.epochs:
            with torch.no_grad():
                found = depict_targets(head(_codes(autoencoder, x)).softmax(1), self.targets)
            change, targets = float((found - targets).square().mean()), found
            if n_iter and change < self.tol:
                break
            self._pass(autoencoder, head, optimizer, x, targets, generator)
            n_iter += 1
        self.autoencoder_, self.head_, self.scaling_ = autoencoder.eval(), head.eval(), scaling
        self.initial_labels_, self.targets_, self.n_iter_ = k_means.labels_, targets.numpy(), n_iter
        self.labels_ = self.predict(X)
        return self

    def predict(self, X: Any) -> Int[Matrix, " n"]:
        """The cluster of each sample."""
        return np.asarray(self.predict_proba(X).argmax(1))

    @torch.no_grad()
    def predict_proba(self, X: Any) -> Float[Matrix, "n clusters"]:
        """The clean softmax of each sample."""
        codes = torch.from_numpy(self.transform(X)).float()
        return np.asarray(self.head_(codes).softmax(1).numpy())

    @torch.no_grad()
    def transform(self, X: Any) -> Float[Matrix, "n dim"]:
        """The clean code of each sample."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64, allow_nd=True)
        x = torch.from_numpy((X - self.scaling_[0]) / self.scaling_[1]).float()
        return np.asarray(_codes(self.autoencoder_, x).double().numpy())

    def _default(self, x: Tensor) -> DenoisingAutoencoder:
        if x.ndim == 4:
            return conv_autoencoder((x.shape[1], x.shape[2], x.shape[3]), self.n_clusters)
        return mlp_autoencoder(x.shape[1], self.n_clusters)

    def _pass(
        self,
        autoencoder: DenoisingAutoencoder,
        head: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        targets: Tensor | None,
        generator: torch.Generator,
    ) -> None:
        """One epoch of reconstruction, and of targets where there is a head."""
        autoencoder.train()
        for index in torch.randperm(len(x), generator=generator).split(self.batch_size):
            with torch.no_grad():
                clean = autoencoder(x[index]).activations
            noisy = autoencoder(x[index], noisy=True, generator=generator)
            loss = layerwise_reconstruction_loss(noisy.reconstructions, clean, self.layer_weight)
            if head is not None and targets is not None:
                loss = loss + F.cross_entropy(head(noisy.code), targets[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _check(self, X: Matrix) -> None:
        one_of("targets", self.targets, get_args(Targets))
        for name in ("n_clusters", "batch_size"):
            integer(name, getattr(self, name))
        for name in ("pretrain_epochs", "init_epochs", "epochs"):
            integer(name, getattr(self, name), 0)
        positive("lr", self.lr)
        for name in ("tol", "layer_weight"):
            non_negative(name, getattr(self, name))
        if X.ndim not in (2, 4) and self.autoencoder is None:
            raise ValueError(f"X must be vectors or images (n, channels, height, width), got shape {X.shape}")
        if len(X) < self.n_clusters:
            raise ValueError(f"X must have at least n_clusters={self.n_clusters} samples, got n_samples = {len(X)}")


@torch.no_grad()
def _codes(autoencoder: DenoisingAutoencoder, x: Tensor) -> Tensor:
    """Clean codes, as they are in use: batch normalisation by running statistics."""
    training = autoencoder.training
    codes = torch.cat([autoencoder.eval().encode(part) for part in x.split(1024)])
    autoencoder.train(training)
    return codes
