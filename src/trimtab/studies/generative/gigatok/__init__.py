"""Does alignment with a frozen encoder keep the codes of a larger tokenizer easy to generate?

The paper's tokenizers have up to three billion parameters and 256 tokens for ImageNet; here Fashion-MNIST at half its
resolution, padded to 16 x 16 pixels, is 8 tokens of 128 codes, and the tokenizers have 66,000 and about 250,000
parameters. DINOv2 is replaced by a small convolutional encoder that learned from other images, without labels, to tell
views of an image apart; its features are centred, and aligned with the second of the decoder's two or three layers (the
authors: the third of six or more). The entropy loss, which the authors need for their largest tokenizers alone, at
0.005, is in all arms but one at a weight of 0.1: without it a pilot on another seed used a tenth of the codes, and this
was changed after it. There is no perceptual and no adversarial loss.

Training is as long for all; the probe judges codes as the authors do, by its loss, its samples and a linear classifier
on its features. A loss in nats is lower too where fewer codes are used, so that the headline is the samples' distance.
On the shared tasks the tokenizer has networks of its own kind, smaller than the others': eight tokens of sixteen codes
for factor images; for digits, tokens for which no evaluation is left are drawn by their frequency in the class.
"""

from __future__ import annotations

from functools import partial

from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.generative.gigatok.entries import factor_tokenizer, token_by_token
from trimtab.studies.generative.gigatok.tokenizers import metrics, run
from trimtab.studies.tasks.digits_generation import Generator, digits
from trimtab.studies.tasks.representation import Representation, shape_images

small = partial(run, width=24, encoder_depth=1, decoder_depth=2, entropy=0.1)
large = partial(run, width=48, encoder_depth=1, decoder_depth=3, entropy=0.1)

garments = Experiment(
    "garments in 8 tokens",
    arms={
        "large, semantic": partial(large, semantic=0.5),
        "large": large,
        "small, semantic": partial(small, semantic=0.5),
        "small": small,
        "large, semantic, no entropy loss": partial(large, semantic=0.5, entropy=0.0),
    },
    metrics=metrics,
    reads=("digits", "fashion_mnist"),
    cost=12.0,
)

study = Study(
    paper="gigatok",
    entrants={
        "GigaTok": {
            shape_images: Representation(model=factor_tokenizer, search={}),
            digits: Generator(fit=token_by_token),
        }
    },
    on=[shape_images, digits],
    experiments=[garments],
    headline=Claim("large, semantic", below="large", on="ar_frechet", at=garments),
    claims=[
        Claim("large, semantic", below="large", on="ar_loss", at=garments),
        Claim("large, semantic", beats="large", on="accuracy", by=0.02, at=garments),
        Claim("large, semantic", below="large", on="error", by=-0.01, at=garments),
        Claim("large, semantic", below="small, semantic", on="ar_frechet", at=garments),
        Claim("small", below="large", on="ar_loss", at=garments),
        Claim("large, semantic", below="large, semantic, no entropy loss", on="ar_frechet", at=garments),
        Claim("GigaTok", beats="VQ-VAE", on="modularity", at=shape_images),
        Claim("GigaTok", below="flow matching", on="frechet_10", at=digits),
    ],
)
