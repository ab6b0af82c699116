"""Does matching what a datamodel predicts bring a classifier nearer to a retrained one than ascent and fine-tuning?"""

from __future__ import annotations

from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.unlearning.datamodel_matching.cluster_of_digits import digits
from trimtab.studies.unlearning.datamodel_matching.ridge_regression import convex

study = Study(
    paper="datamodel_matching",
    experiments=[digits, convex],
    headline=Claim("datamodel matching", below="SCRUB", on="klom", at=digits),
    claims=[
        Claim("datamodel matching", below="gradient ascent", on="klom", at=digits),
        Claim("datamodel matching", below="fine-tuning on retained", on="klom", at=digits),
        Claim("datamodel matching", below="SCRUB", on="klom_forget", at=digits),
        Claim("oracle matching", below="datamodel matching", on="klom_forget", at=digits),
        Claim("DM-direct", below="datamodel matching", on="klom", at=digits),
        Claim("datamodel matching", beats="as trained", on="accuracy_validation", by=-0.01, at=digits),
        Claim("datamodel matching", below="as trained", on="membership", at=digits),
        Claim("datamodel matching", below="fine-tuning on retained", on="left", times=2.0, at=convex),
        Claim("datamodel matching", below="descent and ascent", on="left", times=2.0, at=convex),
    ],
    notes="The paper unlearns ResNets on CIFAR-10 and a part of ImageNet, with datamodels of thousands of trainings; "
    "here networks of 16 hidden units see 300 digits of 8 x 8 pixels, a cluster of 15 of one class is forgotten, and "
    "the datamodel is a ridge regression (weight 10, tuned by nobody) over 600 trainings on 70 % of the samples. Each "
    "number compares 80 unlearned networks with 80 retrained ones, which are also trained on the forget set until its "
    "loss is as low as before, and `retrained again` is the floor that so few leave. All methods take about 60 steps "
    "of Adam, gradient ascent a sixth of it, at one of three learning rates, chosen on another forget set whose "
    "retrained networks are known, which favours all alike. SCRUB has its authors' weights for small sets, and a step "
    "away from the trained model in every six of the first two thirds. The same clusters are forgotten from a ridge "
    "regression on pixels, the convex case, in 50 steps of Adam over all samples; one run of it was seen before the "
    "results, and nothing was changed after it.",
)
