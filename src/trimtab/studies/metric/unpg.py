"""Do the batch's negative pairs, in the softmax of a margin head, make unseen identities easier to verify?"""

from __future__ import annotations

from math import inf

from trimtab.metric import MarginSoftmaxLoss, UNPGLoss
from trimtab.studies.study import Arm, Claim, Study
from trimtab.studies.tasks.verification import MARGIN_SETTINGS, Verification

task = Verification()
HEADS = ("CosFace", "ArcFace")


def with_pairs(head: str, whisker: float) -> Arm:
    """A head with the batch's negative pairs, and the head's own settings to choose from."""
    return task.train(
        loss=lambda embedding_size, num_classes, **setting: UNPGLoss(
            MarginSoftmaxLoss(embedding_size, num_classes, **setting), whisker=whisker
        ),
        settings=MARGIN_SETTINGS[head],
    )


study = Study(
    paper="unpg",
    arms={
        **{head: task.train(loss=MarginSoftmaxLoss, settings=MARGIN_SETTINGS[head]) for head in HEADS},
        **{f"{head} + UNPG": with_pairs(head, 1.5) for head in HEADS},
        **{f"ArcFace + UNPG, r = {r:g}": with_pairs("ArcFace", r) for r in (0.5, 1.0)},
        "ArcFace + UNPG, unfiltered": with_pairs("ArcFace", inf),
    },
    claims=[
        *(Claim(f"{head} + UNPG", beats=head, on="tar_at_far_1e-3", by=0.005) for head in HEADS),
        Claim("ArcFace + UNPG", beats="ArcFace + UNPG, unfiltered", on="tar_at_far_1e-3"),
    ],
    seeds={"laptop": 5},
    plot=["CosFace", "CosFace + UNPG", "ArcFace", "ArcFace + UNPG"],
    leaderboard=["CosFace", "ArcFace", "CosFace + UNPG", "ArcFace + UNPG"],
    notes=(
        "The paper trains ResNets on millions of faces and tests on IJB-B, IJB-C and MegaFace. Here 20 identities are "
        "digits of MNIST in rotation and the test is on ten others, so that a batch of 128 has some 7,700 negative "
        "pairs beside 19 negative classes, where the paper has tens of thousands of classes. Heads with and without "
        "pairs choose among the same four settings of scale and margin on held-out identities; the whisker r is the "
        "authors' 1.5 where nothing else is said."
    ),
)
