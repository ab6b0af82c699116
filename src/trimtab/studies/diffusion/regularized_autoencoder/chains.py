"""Chains that start anywhere in the plane: how near they come to the density, by their length."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.diffusion.regularized_autoencoder import metropolis
from trimtab.studies.diffusion.regularized_autoencoder.spiral import SIGMA, Reading, by_density_estimate, data
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.sample_quality import sliced_wasserstein

LENGTHS = (1, 3, 10, 30, 100, 300)

FOLLOWED = {
    "distance": Metric("sliced Wasserstein distance to the smoothed density", best="min"),
    "distance_30": Metric("sliced Wasserstein distance after 30 steps", best="min"),
}


def follow(trial: Trial, reading: Callable[[Trial, Tensor], Reading]) -> Result:
    """Chains of a model of samples of the spiral, from points all over the square that holds it."""
    size, count = trial.pick(smoke=200, laptop=2000, paper=10_000), trial.pick(smoke=50, laptop=500, paper=2000)
    x = data().sample(size, generator=trial.generator(1))
    if reading is by_density_estimate:  # it would know the density without the noise otherwise
        x = x + SIGMA * torch.randn(x.shape, generator=trial.generator(2))
    found = reading(trial, x)
    start = 3 * torch.rand(count, 2, generator=trial.generator(3)) - 1.5
    truth = data().sample(5000, generator=trial.generator(5))
    truth = truth + SIGMA * torch.randn(truth.shape, generator=trial.generator(6))
    chain = metropolis(
        found.log_ratio, start, proposal_std=0.1, n_steps=LENGTHS[-1], generator=trial.generator(4)
    ).states
    distances = [sliced_wasserstein(chain[n - 1], truth, generator=trial.generator(7)) for n in LENGTHS]
    return Result(
        {"distance": distances[-1], "distance_30": distances[LENGTHS.index(30)]},
        {"distance": Curve(LENGTHS, distances, x_label="steps of the chain")},
        pictures={"ends of the chains": Picture.density(chain[-1], -1.5, 1.5)},
    )
