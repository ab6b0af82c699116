"""AdaDFQ: how much of a quantised network's accuracy comes back without data, by images made to fit it?

The paper trains for 80,000 steps on CIFAR and ImageNet; here a generator of 12 channels and a CNN of 15,000 weights
take 150 steps of 32 images, after 30 in which the generator trains alone. All data-free contestants know the mean and
the deviation of pixels, and nothing else of the data; their rate is chosen by held-out images, as everyone's, which a
user without data could not do. GDFQ has the generator, steps and rates of AdaDFQ with its own losses (label and
statistics; cross-entropy and distillation), weighted as its paper says. Round to nearest and LSQ have real images.
First and last layers have 8 bits. Nine trial runs of a seed outside of the study came first (AdaDFQ 81.6 %, GDFQ
80.4 %); then GDFQ was given its authors' weight and everyone as many steps, which hardly moved the gap.
"""

from __future__ import annotations

from functools import partial

from trimtab.studies.compress.adadfq.data_free import GDFQ, Unbounded, generated, on_noise, untrained
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.compress_classifier import Compression, three_bits

RATES = {"lr": (1e-4, 1e-3)}

study = Study(
    paper="adadfq",
    entrants={"AdaDFQ": Compression(compress=generated, search=RATES)},
    controls={
        "GDFQ": Compression(compress=partial(generated, kind=GDFQ, gamma=0.1), search=RATES),
        "AdaDFQ without margins": Compression(compress=partial(generated, kind=Unbounded), search=RATES),
        "distilled on noise": Compression(compress=on_noise, search=RATES),
        "rounded without data": Compression(compress=untrained, search={}),
    },
    on=[three_bits],
    headline=Claim("AdaDFQ", beats="GDFQ", on="accuracy", by=0.005),
    claims=[
        Claim("AdaDFQ", beats="rounded without data", on="accuracy", by=0.05),
        Claim("AdaDFQ", beats="distilled on noise", on="accuracy", by=0.02),
        Claim("AdaDFQ", beats="AdaDFQ without margins", on="accuracy"),
        Claim("AdaDFQ", beats="LSQ", on="accuracy", by=-0.05),
        Claim("AdaDFQ", beats="round to nearest", on="accuracy"),
        Claim("GDFQ", beats="distilled on noise", on="accuracy"),
    ],
)
