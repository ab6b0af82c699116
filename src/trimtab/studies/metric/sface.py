"""Does SFace hold up under wrong labels, where margin softmax learns them, and lose nothing on right ones?

The paper trains ResNets on hundreds of thousands of faces of ten thousand people and more, whose labels are noisy by
nature, and tests on LFW, MegaFace and IJB-C. Here 20 identities are digits of MNIST in rotation, 150 images each, 40 %
of whose labels are replaced at random, and the test is on ten others. SFace chooses among four pairs of angles, its
authors' default among them, and two learning rates; its slope and initial class weights are the authors'. Adam takes
the place of SGD, so that the size of a loss does not matter.
"""

from __future__ import annotations

from trimtab.metric import SFaceLoss
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.open_set_retrieval import EMBEDDING_SIZE, TWO_RATES, Embedding, clean, wrong_identities

sface = Embedding(
    loss=lambda plan: SFaceLoss(EMBEDDING_SIZE, plan.num_classes, a=plan.setting["a"], b=plan.setting["b"]),
    search={"a": (0.8, 0.9), "b": (1.23, 1.4), "lr": TWO_RATES},
)

study = Study(
    paper="sface",
    entrants={"SFace": sface},
    on=[wrong_identities, clean],
    headline=Claim("SFace", beats="ArcFace", on="tar_at_far_1e-2", by=0.01, at=wrong_identities),
    claims=[
        Claim("SFace", beats="CosFace", on="tar_at_far_1e-2", by=0.01, at=wrong_identities),
        Claim("SFace", beats="ArcFace", on="recall_at_1", by=0.01, at=wrong_identities),
        Claim("SFace", beats="CosFace", on="recall_at_1", by=0.01, at=wrong_identities),
        Claim("SFace", beats="multi-similarity", on="tar_at_far_1e-2", at=wrong_identities),
        Claim("SFace", beats="ArcFace", on="tar_at_far_1e-2", by=-0.01, at=clean),
        Claim("SFace", beats="CosFace", on="tar_at_far_1e-2", by=-0.01, at=clean),
    ],
)
