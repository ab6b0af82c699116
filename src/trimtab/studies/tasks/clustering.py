"""Clusters of images without a label: of equal classes, of a long tail, and with more clusters allowed than classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from trimtab.data import load
from trimtab.ops.cluster_scores import ari, cluster_accuracy, nmi
from trimtab.semisup import DenoisingAutoencoder, SP2OTClustering
from trimtab.studies.engine.study import Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools import deep_clustering

Labels = Int[Tensor, " n"]


@dataclass(frozen=True)
class Sample:
    """What is to be clustered.

    Attributes:
        x: rows of pixels in [0, 1], of square images of one channel.
        num_clusters: the number of classes, or an upper bound of it.
        passes: over the samples that a network may make, its pre-training apart.
        trial: of the run.
        key: names the samples, the seed apart.
    """

    x: Float[Tensor, "n pixels"]
    num_clusters: int
    passes: int
    trial: Trial
    key: str

    @property
    def seed(self) -> int:
        """Of whatever is drawn by scikit-learn's conventions."""
        return self.trial.seed

    @property
    def images(self) -> Float[Tensor, "n 1 side side"]:
        """The rows as images."""
        side = math.isqrt(self.x.shape[1])
        return self.x.view(-1, 1, side, side)

    def autoencoder(self) -> DenoisingAutoencoder:
        """A denoising autoencoder of these samples, the same for all who begin from one."""
        return deep_clustering.pretrained(self.x, self.trial, self.key)


@dataclass(frozen=True, kw_only=True)
class Clustering(Entrant):
    """What a contestant of clustering brings.

    Attributes:
        fit: clusters of the samples, any integers.
    """

    fit: Callable[[Sample], Labels]


@dataclass(frozen=True)
class ImageClustering(Task[Clustering]):
    """Cluster images; a seed draws which images, and which class is how frequent.

    There is no label to choose settings by, and nobody may: everyone has the settings of its authors. Networks begin
    from the same autoencoder, if from any, and pass over the samples equally often at most. Clusters stand for classes
    under the best one-to-one match, so that what goes to clusters beyond the number of classes is wrong.

    Attributes:
        dataset: "digits" (8 x 8 pixels), "fashion_mnist" or "mnist" (14 x 14).
        tail: how many times more images the most frequent class has than the rarest, falling geometrically between.
        spare: clusters allowed, per class.
    """

    dataset: str = "digits"
    tail: float = 1.0
    spare: float = 1.0

    name: ClassVar[str] = "clustering"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("accuracy (%)", percent=True),
        "balanced_accuracy": Metric("balanced accuracy (%)", percent=True),
        "nmi": Metric("normalised mutual information"),
        "ari": Metric("adjusted Rand index"),
        "clusters": Metric("clusters in use", best=None),
    }
    accepts: ClassVar[type[Clustering]] = Clustering
    tries: ClassVar[int] = 1
    search: ClassVar[Mapping[str, Sequence[Any]]] = {}
    cost: ClassVar[float] = 2.5

    def __post_init__(self) -> None:
        for name in ("tail", "spare"):
            if not 1 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 1 and finite, got {getattr(self, name)}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"digits": digits, "long tail": long_tail, "unknown number": unknown_number}

    @classmethod
    def references(cls) -> Mapping[str, Clustering]:
        return {
            "k-means": Clustering(fit=lambda sample: _k_means(sample, sample.x)),
            "Gaussian mixture": Clustering(fit=partial(mixture, bayesian=False)),
            "Dirichlet mixture": Clustering(fit=partial(mixture, bayesian=True)),
            "spectral": Clustering(fit=spectral),
            "Ward": Clustering(fit=ward),
            "autoencoder and k-means": Clustering(
                fit=lambda sample: _k_means(sample, deep_clustering.codes(sample.autoencoder(), sample.x))
            ),
            "DEC": Clustering(fit=dec),
            "equal-size transport": Clustering(fit=equal_size),
        }

    def run(self, trial: Trial, entrant: Clustering) -> Result:
        sample, classes = self.sample(trial)
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore")  # of not having converged, which shows in the numbers
            found = entrant.fit(sample)
        return Result(
            {
                "accuracy": cluster_accuracy(classes, found),
                "balanced_accuracy": cluster_accuracy(classes, found, balanced=True),
                "nmi": nmi(classes, found),
                "ari": ari(classes, found),
                "clusters": float(len(found.unique())),
            }
        )

    def sample(self, trial: Trial) -> tuple[Sample, Labels]:
        """The images of a run and their classes, which no contestant sees."""
        data = load(self.datasets(trial.budget)[0])
        x, y = data.x_train, data.y_train
        if data.name == "digits":
            x, y = torch.cat([x, data.x_test]), torch.cat([y, data.y_test])
        elif min(x.shape[2:]) >= 28 and trial.budget != "paper":
            x = F.avg_pool2d(x[:20_000], 2)
            y = y[:20_000]
        generator = trial.generator()
        largest = trial.pick(smoke=30, laptop=170 if self.tail > 1 else 150, paper=170 if self.tail > 1 else 1000)
        if self.dataset != "digits" and self.tail == 1:
            largest = trial.pick(smoke=30, laptop=200, paper=1000)
        rank = torch.randperm(data.num_classes, generator=generator)
        chosen = []
        for label in range(data.num_classes):
            count = round(largest * self.tail ** -(int(rank[label]) / (data.num_classes - 1)))
            members = (y == label).nonzero()[:, 0]
            chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
        index = torch.cat(chosen)
        index = index[torch.randperm(len(index), generator=generator)]
        passes = trial.pick(smoke=5, laptop=40, paper=300)
        key = f"{data.name} {self.tail} {largest}"
        sample = Sample(x[index].flatten(1), round(self.spare * data.num_classes), passes, trial, key)
        return sample, y[index]


digits = ImageClustering()
long_tail = ImageClustering(tail=10.0)
unknown_number = ImageClustering("fashion_mnist", spare=2.0)


def _k_means(sample: Sample, x: Tensor) -> Labels:
    return deep_clustering.k_means(x, sample.num_clusters, sample.seed)[0]


def mixture(sample: Sample, *, bayesian: bool) -> Labels:
    """Gaussians on twenty principal components; the Bayesian kind may leave some without samples."""
    from sklearn.decomposition import PCA
    from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

    x = PCA(20, random_state=sample.seed).fit_transform(sample.x.double().numpy())
    kind = BayesianGaussianMixture if bayesian else GaussianMixture
    model = kind(n_components=sample.num_clusters, reg_covar=1e-3, n_init=2, random_state=sample.seed)
    return torch.from_numpy(np.asarray(model.fit_predict(x))).long()


def spectral(sample: Sample) -> Labels:
    """Spectral clustering of the graph of ten nearest neighbours."""
    from sklearn.cluster import SpectralClustering

    model = SpectralClustering(
        sample.num_clusters, affinity="nearest_neighbors", n_neighbors=10, random_state=sample.seed
    )
    return torch.from_numpy(np.asarray(model.fit_predict(sample.x.double().numpy()))).long()


def ward(sample: Sample) -> Labels:
    """Agglomerative clustering by Ward's criterion."""
    from sklearn.cluster import AgglomerativeClustering

    found = AgglomerativeClustering(sample.num_clusters).fit_predict(sample.x.double().numpy())
    return torch.from_numpy(np.asarray(found)).long()


def dec(sample: Sample) -> Labels:
    """Deep embedded clustering."""
    return deep_clustering.dec(
        sample.autoencoder(), sample.x, sample.num_clusters, epochs=sample.passes, generator=sample.trial.generator(1)
    )


def equal_size(sample: Sample) -> Labels:
    """Pseudo-labels by transport to clusters of equal size, as SeLa and SwAV make them."""
    return pseudo_labelled(sample, initial_mass=1.0, gamma=math.inf, semantic=0.0)


def pseudo_labelled(sample: Sample, **options: Any) -> Labels:
    """A network trained on planned pseudo-labels of pixels; half of the passes warm it up and half follow plans."""
    warmup = sample.passes // 2
    model = SP2OTClustering(
        sample.num_clusters,
        epochs=sample.passes - warmup,
        warmup=warmup,
        random_state=sample.seed,
        **options,
    )
    return torch.from_numpy(model.fit_predict(sample.x.double().numpy()))
