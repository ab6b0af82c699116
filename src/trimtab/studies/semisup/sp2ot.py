"""Do pseudo-labels that take in confident samples first, with clusters of free size, find classes of a long tail?

The paper tunes the last block of a large network trained by self-supervision, on long-tailed CIFAR-100, ImageNet-R and
iNaturalist; here a network of one hidden layer with the paper's head of cosines sees the pixels of 690 digits, is
warmed up on the clusters of k-means, and plans over all samples once a pass instead of over a memory once a step. Noise
on the pixels takes the place of the two augmentations. The weight of the similarities is scaled so that what neighbours
can take off a cost is what it is in the paper's batches; entropy, divergence and the ramp of the mass are the authors'.
Each plan is three rounds, warm-started. The unbalanced transport is the strongest of the baselines that the paper makes
pseudo-labels with, on the same network. To save time, after runs of one seed, plans were cut from 30 to 20, their
rounds from 10 to 3, and transport is solved less finely. Where classes are to be discovered it clusters features that
were trained with labels of known classes, and sees no label itself.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trimtab.semisup import SP2OTClustering
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks import category_discovery
from trimtab.studies.tasks.category_discovery import Discovery, Found, lengths_one
from trimtab.studies.tasks.clustering import Clustering, long_tail, pseudo_labelled, unknown_number


def discovered(start: Found) -> Tensor:
    """Clusters of the pre-trained features of all images, without a label; the number of classes bounds theirs."""
    model = SP2OTClustering(start.num_classes, epochs=start.epochs, warmup=start.epochs, random_state=start.seed)
    labels = model.fit_predict(lengths_one(start).double().cpu().numpy())
    return torch.from_numpy(labels).long().to(start.x.device)


study = Study(
    paper="sp2ot",
    entrants={
        "SP2OT": {
            long_tail: Clustering(fit=pseudo_labelled),
            unknown_number: Clustering(fit=pseudo_labelled),
            category_discovery.digits: Discovery(assign=discovered, search={}),
        }
    },
    controls={
        "unbalanced transport": Clustering(fit=partial(pseudo_labelled, initial_mass=1.0, semantic=0.0)),
        "progressive partial transport": Clustering(fit=partial(pseudo_labelled, semantic=0.0)),
        "half of the semantic weight": Clustering(fit=partial(pseudo_labelled, semantic=3.5)),
    },
    on=[long_tail, unknown_number, category_discovery.digits],
    headline=Claim("SP2OT", beats="unbalanced transport", on="accuracy", by=0.01, at=long_tail),
    claims=[
        Claim("SP2OT", beats="equal-size transport", on="accuracy", by=0.1, at=long_tail),
        Claim("SP2OT", beats="progressive partial transport", on="accuracy", at=long_tail),
        Claim("progressive partial transport", beats="unbalanced transport", on="accuracy", at=long_tail),
        Claim("SP2OT", beats="k-means", on="accuracy", at=long_tail),
        Claim("SP2OT", beats="DEC", on="accuracy", at=long_tail),
        Claim("SP2OT", beats="unbalanced transport", on="balanced_accuracy", at=long_tail),
        Claim("SP2OT", beats="spectral", on="accuracy", at=long_tail),
        Claim("SP2OT", beats="k-means", on="accuracy", at=unknown_number),
        Claim("SP2OT", beats="k-means", on="all", at=category_discovery.digits),
    ],
)
