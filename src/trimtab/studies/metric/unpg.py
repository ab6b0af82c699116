"""Do the batch's negative pairs, in the softmax of a margin head, make unseen identities easier to verify?

The paper trains ResNets on millions of faces and tests on IJB-B, IJB-C and MegaFace. Here 20 identities are digits of
MNIST in rotation and the test is on ten others, so that a batch of 128 has some 7,700 negative pairs beside 19 negative
classes, where the paper has tens of thousands of classes. Heads with and without pairs choose among the same eight
settings of scale, margin and learning rate; the whisker is the authors' 1.5 where nothing else is said.
"""

from __future__ import annotations

from math import inf

from trimtab.metric import UNPGLoss
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.open_set_retrieval import (
    ARCFACE_SETTINGS,
    COSFACE_SETTINGS,
    SCALES,
    Embedding,
    clean,
    magface,
    margin_head,
    wrong_identities,
)

arcface, cosface = margin_head("arcface"), margin_head("cosface")

study = Study(
    paper="unpg",
    entrants={
        "ArcFace + UNPG": Embedding(loss=lambda plan: UNPGLoss(arcface(plan)), search=ARCFACE_SETTINGS),
        "CosFace + UNPG": {clean: Embedding(loss=lambda plan: UNPGLoss(cosface(plan)), search=COSFACE_SETTINGS)},
        "MagFace + UNPG": {clean: Embedding(loss=lambda plan: UNPGLoss(magface(plan)), search=SCALES)},
    },
    controls={
        "ArcFace + UNPG, unfiltered": Embedding(
            loss=lambda plan: UNPGLoss(arcface(plan), whisker=inf), search=ARCFACE_SETTINGS
        ),
    },
    on=[clean, wrong_identities],
    headline=Claim("MagFace + UNPG", beats="MagFace", on="tar_at_far_1e-3", by=0.005, at=clean),
    claims=[
        Claim("ArcFace + UNPG", beats="ArcFace", on="tar_at_far_1e-3", by=0.005, at=clean),
        Claim("CosFace + UNPG", beats="CosFace", on="tar_at_far_1e-3", by=0.005, at=clean),
        Claim("ArcFace + UNPG", beats="ArcFace", on="recall_at_1", at=clean),
        Claim("ArcFace + UNPG", beats="normalised softmax", on="tar_at_far_1e-3", at=clean),
        Claim("ArcFace + UNPG", beats="ArcFace + UNPG, unfiltered", on="tar_at_far_1e-3", at=clean),
        Claim("ArcFace + UNPG", beats="ArcFace + UNPG, unfiltered", on="tar_at_far_1e-3", at=wrong_identities),
    ],
)
