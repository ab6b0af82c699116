"""Do the region losses put a descriptor's mass on things, and do its most telling patches suffice to re-rank?

The paper trains DINOv2 on street views. Here places are arrangements of six Fashion-MNIST pictures on one of eight
grounds, seen from turned, tilted and shifted sides in other light behind other things; 300 test places with one view in
the database and two queries each, of pictures that training has not seen. A small CNN with four heads of attention,
pre-trained on warps of its training images, stands in for the transformer.

FoL is the three region losses and re-ranking by the 40 % of the patches with the largest confidence; its strongest
baseline re-ranks by all patches without these losses. Weights, thresholds and peaks of the losses are the authors'; at
their temperature of 1 the two softmaxes over patches are nearly flat here, as a patch's confidence is at most one over
the number of clusters. The learning rates and the pre-training were settled on a seed outside the study, by recall@1 of
the global descriptor and of re-ranking with all patches, without region losses; the data's difficulty on such baseline
runs at seed 0. Re-ranking looks at the first hundred candidates; 40 % of the patches have a sixth of the products to
compute.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trimtab.metric import (
    correspondence_loss,
    foreground_background_loss,
    pseudo_correspondences,
    region_mask,
    same_place_pairs,
    spatial_alignment_loss,
)
from trimtab.studies.engine.study import Arm, Claim, Experiment, Study
from trimtab.studies.metric.fol.places import METRICS, Seen, recognise


def region_losses(seen: Seen, places: Tensor, generator: torch.Generator) -> Tensor:
    """The three losses with the authors' weights."""
    confidence, importance = seen.aggregation.confidence, seen.importance
    alignment = spatial_alignment_loss(confidence, importance)
    mask = region_mask(confidence, importance).view_as(seen.local[:, 0])
    image, partner = same_place_pairs(places, generator=generator)
    contrast = foreground_background_loss(seen.local[image], mask[image], seen.local[partner], mask[partner])
    features, local, assignment = seen.features.flatten(2), seen.local.flatten(2), seen.aggregation.assignment
    matches = pseudo_correspondences(
        features[image], features[partner], assignment[image], assignment[partner], importance[image]
    )
    return 0.005 * alignment + contrast + 0.01 * correspondence_loss(local[image], local[partner], matches)


arms: dict[str, Arm] = {
    "global descriptor": recognise,
    "all patches": partial(recognise, patches="all"),
    "top 40 % of patches": partial(recognise, patches="discriminative"),
    "region losses": partial(recognise, region_loss=region_losses),
    "region losses, all patches": partial(recognise, region_loss=region_losses, patches="all"),
    "region losses, random 40 %": partial(recognise, region_loss=region_losses, patches="random"),
    "FoL": partial(recognise, region_loss=region_losses, patches="discriminative"),
}
places = Experiment(
    "arrangements of pictures",
    arms,
    METRICS,
    reads=("fashion_mnist",),
    cost=8.5,
    requires=dict.fromkeys(arms, ("pytorch_metric_learning",)),
)

study = Study(
    paper="fol",
    experiments=[places],
    headline=Claim("FoL", beats="all patches", on="recall_at_1"),
    claims=[
        Claim("FoL", beats="region losses, all patches", on="recall_at_1", by=-0.01),
        Claim("FoL", beats="region losses, random 40 %", on="recall_at_1", by=0.01),
        Claim("FoL", beats="top 40 % of patches", on="recall_at_1"),
        Claim("FoL", beats="region losses", on="recall_at_1", by=0.01),
        Claim("region losses", beats="global descriptor", on="recall_at_1"),
        Claim("region losses", beats="global descriptor", on="foreground_mass", by=0.02),
    ],
)
