"""Does the residual of an auto-encoder give the score, and do chains that follow it give samples?

The paper shows its two-dimensional experiments as pictures; here the data are 200 narrow Gaussians along a spiral, so
that the smoothed density and its score are exact. Auto-encoders have two hidden layers of 128 tanh units: one of 500,
as first taken, fitted the spiral badly in so few steps. The spiral's shape and the number of chains were changed after
a first look as well.

Corruption (for the contractive one the root of the penalty's weight) is 0.07, as wide as the spiral itself, which is 2
across. Scores are read at unseen samples with that noise, at unseen samples as they are, and far away, with noise of
0.3; the cosine is that of the whole fields, since a mean over points is ruled by the ridge, where the score has no
direction. The reconstruction error as an energy is that of the DAE, over twice the corruption's variance, the scale of
a Gaussian error; only chains depend on it. The kernel density estimate has the bandwidth of greatest held-out
likelihood, in place of the corruption. Chains of 300 steps start at training samples moved by noise of 0.2, and have to
find back; those from anywhere start all over the square of side 3 that holds the spiral. Of the paper the abstract was
at hand and its theorems, which are derived anew; sizes of its experiments are not known. Representation learning is no
claim of the paper's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from trimtab.diffusion import DenoisingAutoencoderLoss, ReconstructionContractiveLoss
from trimtab.studies.diffusion.regularized_autoencoder.chains import FOLLOWED, follow
from trimtab.studies.diffusion.regularized_autoencoder.spiral import (
    METRICS,
    as_energy,
    by_density_estimate,
    by_residual,
    read,
)
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.tasks.representation import Lesson, Representation, shape_images
from trimtab.studies.tools.autoencoders import Autoencoder

spiral = Experiment(
    "spiral",
    arms={
        "DAE": partial(read, reading=partial(by_residual, loss="denoising")),
        "RCAE": partial(read, reading=partial(by_residual, loss="contractive")),
        "auto-encoder": partial(read, reading=partial(by_residual, loss="none")),
        "DAE, reconstruction error as energy": partial(read, reading=as_energy),
        "kernel density estimate": partial(read, reading=by_density_estimate),
    },
    metrics=METRICS,
    log="x",
    cost=6.0,
)

anywhere = Experiment(
    "chains from anywhere",
    arms={
        "DAE": partial(follow, reading=partial(by_residual, loss="denoising")),
        "RCAE": partial(follow, reading=partial(by_residual, loss="contractive")),
        "DAE, reconstruction error as energy": partial(follow, reading=as_energy),
        "kernel density estimate": partial(follow, reading=by_density_estimate),
    },
    metrics=FOLLOWED,
    log="x",
    cost=5.0,
)


class Regularized(Autoencoder):
    """An auto-encoder whose whole reconstruction, images in and images out, is regularised."""

    def __init__(self, lesson: Lesson, criterion: Any) -> None:
        super().__init__(lesson.encoder(lesson.latents), lesson.decoder(lesson.latents))
        self.criterion = criterion

    def loss(self, x: Tensor, generator: Any) -> Tensor:
        value: Tensor = self.criterion(self.reconstruct, x, generator=generator)
        return value / x[0].numel()


def denoising(lesson: Lesson) -> Regularized:
    """With the denoising loss."""
    return Regularized(lesson, DenoisingAutoencoderLoss(float(lesson.setting["sigma"])))


def contractive(lesson: Lesson) -> Regularized:
    """With the reconstruction-contractive loss."""
    return Regularized(lesson, ReconstructionContractiveLoss(float(lesson.setting["sigma"]), estimator="hutchinson"))


corruptions = {"sigma": (0.1, 0.2, 0.4)}

study = Study(
    paper="regularized_autoencoder",
    entrants={
        "DAE": Representation(model=denoising, search=corruptions),
        "RCAE": Representation(model=contractive, search=corruptions),
    },
    on=[shape_images],
    experiments=[spiral, anywhere],
    headline=Claim("DAE", at_least=0.95, on="cosine", at=spiral),
    claims=[
        Claim("RCAE", at_least=0.95, on="cosine_data", at=spiral),
        Claim("DAE", beats="DAE, reconstruction error as energy", on="cosine", by=0.2, at=spiral),
        Claim("DAE", below="DAE, reconstruction error as energy", on="sliced_wasserstein", times=2, at=spiral),
        Claim("RCAE", below="DAE, reconstruction error as energy", on="sliced_wasserstein", times=2, at=spiral),
        Claim("DAE", below="kernel density estimate", on="error", at=spiral),
        Claim("DAE", at_least=0.9, on="cosine_far", at=spiral),
        Claim("DAE", below="DAE, reconstruction error as energy", on="distance", at=anywhere),
    ],
)
