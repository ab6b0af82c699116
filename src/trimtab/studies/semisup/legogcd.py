"""Do the two terms keep known classes while new ones are discovered?"""

from __future__ import annotations

from functools import partial

from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.category_discovery import Discovery, classifier, clothes, digits

study = Study(
    paper="legogcd",
    entrants={"LegoGCD": Discovery(rule=classifier)},
    controls={
        "local entropy alone": Discovery(rule=partial(classifier, dkl=0.0)),
        "divergence alone": Discovery(rule=partial(classifier, ler=0.0)),
        "without the margin": Discovery(rule=partial(classifier, margin=0.0)),
    },
    on=[digits, clothes],
    headline=Claim("LegoGCD", beats="SimGCD", on="known", by=0.01, at=digits),
    claims=[
        Claim("LegoGCD", beats="SimGCD", on="novel", by=-0.02, at=digits),
        Claim("LegoGCD", beats="SimGCD", on="all", at=digits),
        Claim("LegoGCD", beats="SimGCD", on="known", by=0.01, at=clothes),
        Claim("LegoGCD", beats="SimGCD", on="novel", by=-0.02, at=clothes),
        Claim("local entropy alone", beats="SimGCD", on="known", at=digits),
        Claim("LegoGCD", beats="divergence alone", on="known", at=digits),
        Claim("LegoGCD", beats="without the margin", on="all", at=digits),
        Claim("LegoGCD", beats="semi-supervised k-means", on="all", at=digits),
    ],
    notes=(
        "The paper trains the last block of a vision transformer that has seen ImageNet, for 200 epochs; here a layer "
        "is trained on top of a small network that has seen the 2,000 images of the run, for 20 epochs of Adam, so "
        "that the temperature of the targets falls over 3 of them. Weights, thresholds and temperatures are the "
        "authors' for fine-grained data, in all arms. The number of classes is given, as in the paper. SimGCD is the "
        "same program with both weights at zero. The optimizer of all arms was chosen for SimGCD alone, of three, on "
        "one seed that no result is taken from, after a first run of both with SGD at 0.1; nothing was chosen for "
        "LegoGCD."
    ),
)
