"""Does SFace hold up under wrong labels, where margin softmax learns them, and lose nothing on right ones?"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.metric import MarginSoftmaxLoss, SFaceLoss
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.verification import MARGIN_SETTINGS, Setting, Verification, VerificationLoss

RATES = {"": 0.0, ", 20 % noise": 0.2, ", 40 % noise": 0.4}
WORST = ", 40 % noise"

# As many settings for each, the authors' first.
LOSSES: dict[str, tuple[VerificationLoss, Sequence[Setting]]] = {
    **{head: (MarginSoftmaxLoss, settings) for head, settings in MARGIN_SETTINGS.items()},
    "SFace": (SFaceLoss, [{"a": a, "b": b} for a, b in ((0.8, 1.23), (0.87, 1.2), (0.7, 1.3), (0.9, 1.4))]),
}

study = Study(
    paper="sface",
    arms={
        f"{name}{where}": Verification(noise=rate).train(loss=loss, settings=settings)
        for where, rate in RATES.items()
        for name, (loss, settings) in LOSSES.items()
    },
    claims=[
        *(
            Claim(f"SFace{WORST}", beats=f"{other}{WORST}", on=metric, by=0.01)
            for metric in ("tar_at_far_1e-2", "recall_at_1")
            for other in ("ArcFace", "CosFace")
        ),
        *(Claim("SFace", beats=other, on="tar_at_far_1e-2", by=-0.01) for other in ("ArcFace", "CosFace")),
    ],
    seeds={"laptop": 5},
    plot=[f"{name}{WORST}" for name in LOSSES],
    leaderboard=list(LOSSES),
    notes=(
        "The paper trains ResNets on hundreds of thousands of faces of ten thousand people and more, whose labels are "
        "noisy by nature, and tests on LFW, MegaFace and IJB-C. Here 20 identities are digits of MNIST in rotation, "
        "150 images each, a share of whose labels is replaced at random, and the test is on ten others. Every loss has "
        "four settings, of scale and margin or of SFace's two angles, its authors' among them, and keeps the best on "
        "held-out identities; the rest, SFace's slope and initial class weights included, is the authors'. Adam in "
        "place of SGD, so that the size of a loss does not matter. Before any training with SFace, ArcFace and softmax "
        "were trained with seeds of no result: the images are shifted because embeddings verified no better than "
        "pixels without it, and the length and the number of images leave time to learn the wrong labels."
    ),
)
