"""Do denoisers trained on disjoint sets become the same one, and are they as good as the best on regular images?

The paper trains a network of 7.6 million weights on 100,000 faces of 80 x 80 pixels for 1,000 epochs; here it is the
same kind of network with 114,000 weights, on MNIST brought to 16 x 16, in 250 steps of 32 images.

Agreement is the cosine of two networks' outputs at unseen images with noise of 0.5, less the mean image. It tells
memory from knowledge, but is no feat by itself: estimates as simple as the Wiener filter's agree too, which is why
networks must also beat that filter. The gap is how much better training images are denoised than unseen ones at the
same noise. Novelty is the cosine between both networks' samples from one noise, less that between samples and the
nearest image trained on. Samples by evaluations are 200 of one network, judged in the 20 principal directions of unseen
images. The energy is the share of a clean image that 20 of 256 directions hold: eigenvectors of the Jacobian at that
noisy image, or for the Wiener filter those of the covariance. For images of regularity alpha the best slope of the
output's against the input's signal-to-noise ratio is alpha / (alpha + 1); it is a limit of small noise and fine images,
and these have 16 pixels a side. Not re-run: images whose best basis is not harmonic (shuffled faces, discs that move),
on which the paper finds the same bases, and worse than the best.
"""

from __future__ import annotations

from functools import partial

from trimtab.studies.diffusion.harmonic_bases.denoisers import (
    REGULAR,
    SAMPLED,
    TWINS,
    linear_twins,
    regular,
    sampled,
    twins,
)
from trimtab.studies.engine.study import Claim, Experiment, Study

disjoint = Experiment(
    "two denoisers of disjoint sets",
    arms={
        "10 images": partial(twins, size=10),
        "100 images": partial(twins, size=100),
        "10,000 images": partial(twins, size=10_000),
        "Wiener filter, 10,000 images": linear_twins,
    },
    metrics=TWINS,
    reads=("mnist",),
    cost=11.0,
)

slopes = Experiment(
    "images of regularity alpha",
    arms={"alpha 1": partial(regular, alpha=1.0), "alpha 4": partial(regular, alpha=4.0)},
    metrics=REGULAR,
    log="x",
    cost=6.0,
)

sampling = Experiment(
    "samples by evaluations",
    arms={
        "10 images": partial(sampled, size=10),
        "100 images": partial(sampled, size=100),
        "10,000 images": partial(sampled, size=10_000),
    },
    metrics=SAMPLED,
    reads=("mnist",),
    log="x",
    cost=12.0,
)

study = Study(
    paper="harmonic_bases",
    experiments=[disjoint, slopes, sampling],
    headline=Claim("10,000 images", at_least=0.95, on="agreement", at=disjoint),
    claims=[
        Claim("10,000 images", beats="100 images", on="agreement", by=0.05, at=disjoint),
        Claim("10,000 images", at_most=0.2, on="gap", at=disjoint),
        Claim("10 images", at_least=2.0, on="gap", at=disjoint),
        Claim("10,000 images", at_least=0.0, on="novelty", at=disjoint),
        Claim("10,000 images", beats="Wiener filter, 10,000 images", on="psnr", by=1.0, at=disjoint),
        Claim("10,000 images", beats="Wiener filter, 10,000 images", on="energy", by=0.05, at=disjoint),
        Claim("alpha 4", beats="alpha 1", on="slope", by=0.1, at=slopes),
        Claim("alpha 4", at_most=0.1, on="off_slope", at=slopes),
        Claim("10,000 images", below="100 images", on="frechet", at=sampling),
    ],
)
