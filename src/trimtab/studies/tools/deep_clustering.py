"""Deep clustering that everyone would want to see beside a method, from an autoencoder that was trained before."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.semisup import DEPICT, DenoisingAutoencoder, depict_targets, mlp_autoencoder
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descent_step

CODE = 10
"""Numbers in a code."""
BATCH = 256
"""Samples in a step."""


def pretrained(x: Float[Tensor, "n dim"], trial: Trial, key: str) -> DenoisingAutoencoder:
    """A denoising autoencoder of samples in [0, 1], trained once for all who begin from it.

    Args:
        x: the samples.
        trial: of the run.
        key: names the samples, the seed apart.
    """
    epochs = trial.pick(smoke=10, laptop=60, paper=1000)

    def build() -> dict[str, Tensor]:
        made = trial.seeded(lambda: mlp_autoencoder(x.shape[1], CODE), 5)
        rule = DEPICT(
            2,
            autoencoder=made,
            batch_size=BATCH,
            pretrain_epochs=epochs,
            init_epochs=0,
            epochs=0,
            random_state=trial.seed,
        )
        return dict(rule.fit((2 * x - 1).numpy()).autoencoder_.state_dict())

    autoencoder = trial.seeded(lambda: mlp_autoencoder(x.shape[1], CODE), 5)
    autoencoder.load_state_dict(trial.cached(build, key=f"autoencoder for clustering {key} {trial.seed}"))
    return autoencoder


@torch.no_grad()
def codes(autoencoder: DenoisingAutoencoder, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n code"]:
    """Clean codes of samples in [0, 1]."""
    return autoencoder.eval().encode(2 * x - 1)


def k_means(x: Tensor, num_clusters: int, seed: int) -> tuple[Int[Tensor, " n"], Float[Tensor, "clusters dim"]]:
    """Clusters and centres, the best of ten starts."""
    from sklearn.cluster import KMeans

    found = KMeans(num_clusters, n_init=10, random_state=seed).fit(x.double().numpy())
    return torch.from_numpy(found.labels_).long(), torch.from_numpy(found.cluster_centers_).float()


def dec(
    autoencoder: DenoisingAutoencoder,
    x: Float[Tensor, "n dim"],
    num_clusters: int,
    *,
    epochs: int,
    generator: torch.Generator,
    lr: float = 1e-3,
    batch_size: int = BATCH,
) -> Int[Tensor, " n"]:
    """Deep embedded clustering: Student's kernel of distances to centres learns its own sharpened targets.

    Junyuan Xie, Ross Girshick and Ali Farhadi, "Unsupervised Deep Embedding for Clustering Analysis", ICML 2016, arXiv
    1511.06335. The decoder is left; it stops where fewer than one label in a thousand changes.

    Args:
        autoencoder: trained before; it is copied.
        x: samples in [0, 1].
        num_clusters: number of clusters.
        epochs: most passes over the samples.
        generator: of the order of samples and of the start.
        lr: learning rate of Adam.
        batch_size: samples in a step.
    """
    encoder = copy.deepcopy(autoencoder).train()
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    labels, centers = k_means(codes(encoder, x), num_clusters, seed)
    centers = centers.requires_grad_()
    optimizer = torch.optim.Adam([*encoder.parameters(), centers], lr=lr)
    encoder.train()

    def logits(samples: Tensor) -> Tensor:
        return -(1 + torch.cdist(encoder.encode(2 * samples - 1), centers).square()).log()

    for _ in range(epochs):
        with torch.no_grad():
            targets = depict_targets(logits(x).softmax(1), "dec")
        before, labels = labels, targets.argmax(1)
        if float((before != labels).float().mean()) < 1e-3 and _ > 0:
            break
        for index in torch.randperm(len(x), generator=generator).split(batch_size):
            descent_step(optimizer, F.cross_entropy(logits(x[index]), targets[index]))
    with torch.no_grad():
        return logits(x).argmax(1)
