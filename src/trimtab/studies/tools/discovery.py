"""A trunk that has seen images without labels, and clusterings that know some labels: where discovery starts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab import nets
from trimtab.ops.info_nce import nt_xent, sup_con
from trimtab.semisup.views import strong_view
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descent_step


def pretrained(
    images: Float[Tensor, "n channels height width"],
    targets: Int[Tensor, " n"],
    labelled: Bool[Tensor, " n"],
    trial: Trial,
    *,
    width: int,
    steps: int,
    key: str,
) -> nn.Sequential:
    """The features of a small CNN, trained by contrast of views, and of the labelled images' classes; in eval mode.

    Args:
        images: all images of the run.
        targets: classes, of which those of labelled images are read.
        labelled: which they are.
        trial: source of the draws; keeps the weights.
        width: of the network.
        steps: of Adam, with 128 images each.
        key: names the data.
    """
    network = trial.seeded(lambda: nets.small_cnn(tuple(images.shape[1:]), width=width), 2)
    features: nn.Sequential = network.features  # type: ignore[assignment]

    def fit() -> dict[str, Tensor]:
        projector = trial.seeded(lambda: nn.Linear(network.feature_dim, 32), 3).to(images.device)
        trained = features.to(images.device).train()
        optimizer = torch.optim.Adam([*trained.parameters(), *projector.parameters()], lr=3e-3)
        draws = trial.generator(11)
        for _ in range(steps):
            chosen = torch.randperm(len(images), generator=draws)[:128]
            views = torch.cat([random_view(images[chosen], draws) for _ in range(2)])
            z = projector(trained(views))
            loss = nt_xent(z, 2, 0.3)
            known = labelled[chosen].repeat(2)
            if bool(known.any()):
                loss = 0.65 * loss + 0.35 * sup_con(z[known], targets[chosen].repeat(2)[known], 0.1)
            descent_step(optimizer, loss)
        return {name: value.cpu() for name, value in trained.state_dict().items()}

    features.load_state_dict(trial.cached(fit, key=f"{key} seed {trial.seed}"))
    return features.to(images.device).eval()


def random_view(x: Float[Tensor, "n channels height width"], generator: torch.Generator) -> Tensor:
    """A view for contrast: shifted, distorted twice at half of the strength, and with a small square cut out."""
    return strong_view(x, strength=0.5, cutout=0.25, generator=generator)


def known_kmeans(
    features: Float[Tensor, "n dim"],
    targets: Int[Tensor, " n"],
    labelled: Bool[Tensor, " n"],
    num_classes: int,
    seed: int,
    iterations: int = 50,
) -> Int[Tensor, " n"]:
    """k-means in which labelled samples stay with their class (Vaze et al., CVPR 2022).

    Known classes start at their means, the others at the centres that k-means finds for the unlabelled samples
    farthest from these.

    Args:
        features: of all samples.
        targets: classes of the labelled ones.
        labelled: which they are.
        num_classes: number of clusters; the known classes are its first names.
        seed: of the start.
        iterations: at most.
    """
    from sklearn.cluster import KMeans

    known = targets[labelled].unique()
    means = torch.stack([features[labelled & (targets == label)].mean(0) for label in known])
    far = torch.cdist(features, means).amin(1).masked_fill(labelled, -1)
    count = num_classes - len(known)
    pool = features[far.topk(max(count, int((~labelled).sum()) // 2)).indices]
    found = KMeans(count, n_init=10, random_state=seed).fit(pool.cpu().numpy()).cluster_centers_
    centres = torch.cat([means, torch.from_numpy(found).to(means)])
    fixed = torch.where(labelled, torch.searchsorted(known, targets.clamp(max=int(known[-1]))), 0)
    assigned = torch.full_like(targets, -1)
    for _ in range(iterations):
        before = assigned
        assigned = torch.where(labelled, fixed, torch.cdist(features, centres).argmin(1))
        if torch.equal(before, assigned):
            break
        members = F.one_hot(assigned, num_classes).to(features)
        sizes = members.sum(0)
        centres = torch.where(sizes[:, None] > 0, members.T @ features / sizes.clamp_min(1)[:, None], centres)
    return assigned
