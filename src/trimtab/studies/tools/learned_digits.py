"""A diffusion model of digits, trained once and shared by the studies that ask how to sample from a learned one."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.data import load
from trimtab.diffusion import EDM, EDMPreconditioned, denoising_loss, lognormal_levels
from trimtab.nets import DenoisingMLP
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.digit_generation import BATCH, Images, Labels, Lesson, train

SCHEDULE = EDM(t_min=0.02, t_max=20.0)
BLOCKS = 6


def digits(*, test: bool = False) -> Tensor:
    """Images as vectors of 64 numbers in [-1, 1], in float32: those to train on, or the others."""
    data = load("digits")
    return (data.x_test if test else data.x_train).flatten(1) * 2 - 1


def learned_digits(trial: Trial) -> EDMPreconditioned:
    """An unconditional model of digits on the EDM schedule, with six blocks; the same one for every seed."""
    images = digits()
    steps = trial.pick(smoke=30, laptop=3000, paper=20_000)
    fixed = Trial(seed=0, budget=trial.budget, report=trial.report, artifacts=trial.artifacts)
    lesson = Lesson(images, torch.zeros(len(images), dtype=torch.int64), 1, 3 * BATCH * steps, 10**9, fixed)
    denoiser = fixed.seeded(
        lambda: EDMPreconditioned(
            DenoisingMLP(images.shape[1], hidden=trial.pick(smoke=32, laptop=128, paper=256), blocks=BLOCKS),
            lesson.spread,
            SCHEDULE,
        )
    )

    def loss(images: Images, labels: Labels, generator: torch.Generator) -> Tensor:
        t = lognormal_levels(len(images), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        return denoising_loss(denoiser, images, t, noise, weight=denoiser.weight(t))

    def build() -> dict[str, Tensor]:
        return train(lesson, denoiser, loss, steps).state_dict()

    denoiser.load_state_dict(trial.cached(build, key=f"unconditional digits diffusion, {steps} steps, {BLOCKS} blocks"))
    return denoiser.eval().requires_grad_(False)
