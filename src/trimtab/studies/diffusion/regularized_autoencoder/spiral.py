"""Points along a spiral in the plane: the score that is read out of a model, and chains that follow it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.diffusion import AnalyticGMM, DenoisingAutoencoderLoss, ReconstructionContractiveLoss
from trimtab.diffusion.regularized_autoencoder import LogRatio, energy_difference, metropolis, score_from_reconstruction
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descend, reported
from trimtab.studies.tools.sample_quality import sliced_wasserstein
from trimtab.studies.tools.trained_once import trained_once

SIGMA = 0.07
FAR = 0.3

METRICS = {
    "cosine": Metric("cosine with the smoothed score, at noisy samples"),
    "cosine_data": Metric("cosine with the smoothed score, at samples"),
    "cosine_far": Metric("cosine with the smoothed score, far from the data"),
    "error": Metric("relative error of the score, at noisy samples (%)", best="min", percent=True),
    "sliced_wasserstein": Metric("sliced Wasserstein distance of chains to the smoothed density", best="min"),
    "acceptance": Metric("accepted proposals (%)", best=None, percent=True),
}


@functools.cache
def data(parts: int = 200) -> AnalyticGMM:
    """Narrow Gaussians along one turn and a half of a spiral, as many on every stretch."""
    turn = torch.linspace(0.15, 1, parts, dtype=torch.float64).sqrt()
    angle = 3 * math.pi * turn
    means = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1)
    return AnalyticGMM.isotropic(means.float(), std=SIGMA)


@dataclass(frozen=True)
class Reading:
    """What a model says of the density.

    Attributes:
        score: of points (n, 2).
        log_ratio: log p(b) - log p(a).
    """

    score: Callable[[Tensor], Tensor]
    log_ratio: LogRatio


def _trained(trial: Trial, x: Tensor, loss: Literal["denoising", "contractive", "none"]) -> nn.Module:
    """An auto-encoder, trained once for all arms that read it."""
    steps, draws = trial.pick(smoke=30, laptop=4000, paper=100_000), trial.generator(2)
    layers = lambda: (nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 2))
    model = nn.Sequential(*trial.seeded(layers))

    def build() -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
        kinds = {"denoising": DenoisingAutoencoderLoss(SIGMA), "contractive": ReconstructionContractiveLoss(SIGMA)}

        def value(batch: Tensor) -> Tensor:
            if loss == "none":
                return F.mse_loss(model(batch), batch, reduction="sum") / len(batch)
            found: Tensor = kinds[loss](model, batch, generator=draws)
            return found

        progress = reported(steps, lambda share: trial.report(0.7 * share))
        batches = (x[torch.randint(len(x), (256,), generator=draws)] for _ in progress)
        descend(optimizer, value, batches, anneal=decay)

    key = f"auto-encoder of a spiral {loss} {steps} steps seed {trial.seed}"
    return trained_once(trial, model, build, key=key).requires_grad_(False)


def by_residual(trial: Trial, x: Tensor, loss: Literal["denoising", "contractive", "none"]) -> Reading:
    """The residual over the variance of the corruption."""
    model = _trained(trial, x, loss)
    return Reading(
        lambda at: score_from_reconstruction(model, at, SIGMA),
        lambda a, b: -energy_difference(model, a, b, SIGMA, n_points=4),
    )


def as_energy(trial: Trial, x: Tensor) -> Reading:
    """The squared residual as an energy, as in earlier interpretations."""
    model = _trained(trial, x, "denoising")

    def energy(at: Tensor) -> Tensor:
        return (model(at) - at).square().sum(1) / (2 * SIGMA**2)  # type: ignore[no-any-return]

    def score(at: Tensor) -> Tensor:
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            return -torch.autograd.grad(energy(at).sum(), at)[0]

    return Reading(score, lambda a, b: energy(a) - energy(b))


def by_density_estimate(trial: Trial, x: Tensor) -> Reading:
    """A kernel density estimate with the bandwidth of greatest likelihood on a tenth of the samples."""
    held = len(x) // 10
    fitted, kept = x[held:], x[:held]

    def log_density(at: Tensor, width: float) -> Tensor:
        return (-torch.cdist(at, fitted).square() / (2 * width**2)).logsumexp(1) - 2 * math.log(width)

    width = max((0.01 * 1.25**k for k in range(12)), key=lambda w: float(log_density(kept, w).mean()))

    def score(at: Tensor) -> Tensor:
        weights = (-torch.cdist(at, fitted).square() / (2 * width**2)).softmax(1)
        return (weights @ fitted - at) / width**2

    return Reading(score, lambda a, b: log_density(b, width) - log_density(a, width))


def read(trial: Trial, reading: Callable[[Trial, Tensor], Reading]) -> Result:
    """Scores and chains of a model of samples of the spiral, against the truth.

    The cosine is that of the two fields as a whole: where the score vanishes, on the ridge of the density, its
    direction counts for nothing.

    What there is to be known is the density of the samples smoothed by the corruption. The kernel density estimate
    learns from samples with that noise, for it would know the density without it otherwise.
    """
    size = trial.pick(smoke=200, laptop=2000, paper=10_000)
    draws = trial.generator(1)
    x = data().sample(size, generator=draws)
    if reading is by_density_estimate:
        x = x + SIGMA * torch.randn(x.shape, generator=draws)
    found = reading(trial, x)
    unseen = data().sample(2000, generator=draws)
    noise = torch.randn(unseen.shape, generator=draws)

    def compare(level: float) -> tuple[float, float]:
        at = unseen + level * noise
        true, said = data().score(at, 1.0, SIGMA), found.score(at)
        cosine = (true * said).sum() / (true.norm() * said.norm())
        return float(cosine), float((said - true).norm() / true.norm())

    levels = (0.01, 0.02, SIGMA, 0.1, 0.2, FAR)
    cosines = [compare(level)[0] for level in levels]
    start = x[torch.randperm(len(x), generator=draws)[:500]]
    start = start + 0.2 * torch.randn(start.shape, generator=draws)
    steps = trial.pick(smoke=10, laptop=300, paper=5000)
    chain = metropolis(found.log_ratio, start, proposal_std=0.1, n_steps=steps, generator=trial.generator(4))
    truth = data().sample(5000, generator=trial.generator(5))
    truth = truth + SIGMA * torch.randn(truth.shape, generator=trial.generator(6))
    end = chain.states[-1]
    return Result(
        {
            "cosine": cosines[levels.index(SIGMA)],
            "cosine_data": compare(0.0)[0],
            "cosine_far": cosines[-1],
            "error": compare(SIGMA)[1],
            "sliced_wasserstein": sliced_wasserstein(end, truth, generator=trial.generator(7)),
            "acceptance": chain.acceptance,
        },
        {"cosine with the score": Curve(levels, cosines, x_label="noise on the samples where it is read")},
        pictures={"ends of the chains": Picture.density(end, -1.5, 1.5)},
    )
