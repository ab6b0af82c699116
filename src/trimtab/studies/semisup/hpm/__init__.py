"""Does a masked autoencoder learn better features from patches that it knows to be hard, and does it know them?

The paper trains a vision transformer that sees only the patches left, for hundreds of epochs of ImageNet. Here all
methods share a small CNN, which sees grey in place of hidden patches, for 200 steps on 4,000 digits; the share hidden,
0.75 of the paper's, is searched in 0.25 and 0.5, as the masked autoencoder's is. The teacher's decay goes from 0.98 to
0.99 in place of 0.999 to 0.9999. HPM passes each sample through the encoder once more than a masked autoencoder,
without a gradient. Losses are ranked among the hidden patches of a test image, from the whole image.
"""

from __future__ import annotations

from functools import partial

from trimtab.studies.engine.study import Arm, Claim, Experiment, Metric, Study
from trimtab.studies.semisup.hpm.learner import HardPatches, ranking
from trimtab.studies.tasks.representation_learning import Pretraining, numerals
from trimtab.studies.tools.pretraining import PreTraining

arms: dict[str, Arm] = {
    "relative objective": partial(ranking, guess="HPM"),
    "absolute objective": partial(ranking, guess="HPM", objective="absolute"),
    "contrast of the patch": partial(ranking, guess="contrast"),
}
where = Experiment(
    "which patches are hard",
    arms,
    {"correlation": Metric("rank correlation with the losses of hidden patches")},
    reads=("mnist",),
    cost=4.0,
)

search = {"lr": (1e-3, 4e-3, 1.6e-2), "ratio": (0.25, 0.5)}


def no_patches(task: Pretraining) -> str:
    """Why it cannot enter a variant."""
    return "it hides patches of an image, and a table has none" if task.dataset == "adult" else ""


study = Study(
    paper="hpm",
    entrants={"HPM": PreTraining(learner=HardPatches, search=search, unfit=no_patches)},
    controls={
        "loss prediction, random masks": PreTraining(learner=partial(HardPatches, max_hard=0.0), search=search),
        "hard patches from the start": PreTraining(learner=partial(HardPatches, ramped=False), search=search),
    },
    on=[numerals],
    experiments=[where],
    headline=Claim("HPM", beats="masked autoencoder", on="probe", by=0.01, at=numerals),
    claims=[
        Claim("HPM", beats="masked autoencoder", on="few_labels", by=0.01, at=numerals),
        Claim("loss prediction, random masks", beats="masked autoencoder", on="probe", by=0.005, at=numerals),
        Claim("HPM", beats="loss prediction, random masks", on="probe", at=numerals),
        Claim("HPM", beats="hard patches from the start", on="probe", at=numerals),
        Claim("HPM", beats="SimCLR", on="probe", at=numerals),
        Claim("relative objective", at_least=0.4, on="correlation", at=where),
        Claim("relative objective", beats="absolute objective", on="correlation", at=where),
        Claim("relative objective", beats="contrast of the patch", on="correlation", at=where),
    ],
)
