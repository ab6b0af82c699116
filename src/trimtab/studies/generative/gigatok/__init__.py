"""Does alignment with a frozen encoder keep the codes of a larger tokenizer easy to generate?"""

from __future__ import annotations

from functools import partial

from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.generative.gigatok.tokenizers import metrics, run

small = partial(run, width=24, encoder_depth=1, decoder_depth=2)
large = partial(run, width=48, encoder_depth=1, decoder_depth=3)

garments = Experiment(
    "garments in 8 tokens",
    arms={
        "large, semantic": partial(large, semantic=0.5),
        "large": large,
        "small, semantic": partial(small, semantic=0.5),
        "small": small,
        "large, semantic and entropy": partial(large, semantic=0.5, entropy=0.1),
    },
    metrics=metrics,
    reads=("digits", "fashion_mnist"),
    cost=12.0,
)

study = Study(
    paper="gigatok",
    experiments=[garments],
    headline=Claim("large, semantic", below="large", on="ar_frechet"),
    claims=[
        Claim("large, semantic", below="large", on="ar_loss"),
        Claim("large, semantic", beats="large", on="accuracy", by=0.02),
        Claim("large, semantic", below="large", on="error", by=-0.01),
        Claim("large, semantic", below="small, semantic", on="ar_frechet"),
        Claim("small", below="large", on="ar_loss"),
        Claim("large, semantic and entropy", beats="large, semantic", on="used", by=0.05),
    ],
    notes="",
)
