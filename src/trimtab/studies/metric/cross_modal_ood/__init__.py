"""Does weaker repulsion in contrastive fine-tuning narrow the modality gap and help to tell unknown images?

The paper fine-tunes CLIP ViT-B/16 on ImageNet. Here the model is a CNN and a recurrent network over characters, trained
on 3,000 pictures of clothes and as many digits, 40 % of them with a wrong caption, so that it knows other things than
the six known classes, and knows none of them well. Fine-tuning sees some 3,600 images for six epochs, with AdamW,
weight decay 0.1 and a warmed-up cosine as the authors have it, in batches of 128: with six classes an image has twenty
others of its class in the batch (in the paper, hardly one), hence the label-aware arms. CMA has the authors' weight of
0.001; the scale of the cosines is about 13 here where CLIP's is 100, so that a weight has less force.

Every arm chooses among the same three learning rates, by accuracy and AUROC on held-out images; the unknown classes
used for it are in no test. AUROC and the share of unknown images accepted are means over three unknown sets, by the
negative-label score; the negatives are the other classes' names that are least like the known ones, where the paper has
10,000 words of WordNet. 'Centred afterwards' takes the mean of either tower's known embeddings away after plain
fine-tuning: it closes the gap without any training for it. The learning rates were placed, and the rule that chooses
among them was settled, after a look at the frozen model and FLYP for one seed, before any aligned model had been
trained at this size.
"""

from __future__ import annotations

from functools import partial

from trimtab.metric import CrossModalAlignmentLoss, cross_modal_alignment
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.metric.cross_modal_ood.unknown_kinds import METRICS, AlignmentLoss, frozen, tune


def without_labels(lam: float) -> AlignmentLoss:
    """The paper's loss: images of one class count as negatives of each other."""
    return lambda images, texts, scale, labels: cross_modal_alignment(images, texts, scale, lam=lam)


def with_labels(lam: float) -> AlignmentLoss:
    """Images of one class are no negatives of each other."""
    return lambda images, texts, scale, labels: CrossModalAlignmentLoss(lam)(images, texts, scale, labels)


detection = Experiment(
    "clothes, other clothes and digits",
    {
        "frozen": frozen,
        "FLYP": partial(tune, loss=without_labels(0.0)),
        "FLYP, centred afterwards": partial(tune, loss=without_labels(0.0), centre=True),
        "CMA": partial(tune, loss=without_labels(1e-3)),
        "CMA, weight 0.01": partial(tune, loss=without_labels(1e-2)),
        "CMA, weight 0.1": partial(tune, loss=without_labels(1e-1)),
        "FLYP, label-aware": partial(tune, loss=with_labels(0.0)),
        "CMA, label-aware, weight 0.01": partial(tune, loss=with_labels(1e-2)),
    },
    METRICS,
    reads=("fashion_mnist", "mnist"),
    seeds={"smoke": 1, "laptop": 10, "paper": 5},
    cost=4.5,
)

study = Study(
    paper="cross_modal_ood",
    experiments=[detection],
    headline=Claim("CMA", beats="FLYP", on="auroc", by=0.005),
    claims=[
        Claim("CMA, weight 0.1", beats="FLYP", on="auroc", by=0.005),
        Claim("CMA, weight 0.1", beats="FLYP, centred afterwards", on="auroc"),
        Claim("CMA", beats="FLYP", on="accuracy", by=-0.005),
        Claim("CMA", beats="frozen", on="auroc", by=0.005),
        Claim("CMA", below="FLYP", on="modality_gap"),
        Claim("CMA, weight 0.1", below="CMA, weight 0.01", on="modality_gap"),
        Claim("CMA, label-aware, weight 0.01", beats="FLYP, label-aware", on="auroc", by=0.005),
    ],
)
