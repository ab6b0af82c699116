"""DDO of a small diffusion model of digits, within the allowance that its rivals have for likelihood training."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from trimtab.diffusion import EDMPreconditioned, SelfPlay, deis, diffusion_log_ratio, grids, lognormal_levels
from trimtab.studies.tasks.digits_generation import Sample, guided
from trimtab.studies.tools.digit_generation import BATCH, Images, Labels, Lesson, diffusion_model

LIKELIHOOD = 0.8
"""Share of the allowance for likelihood training; the rounds have the rest."""
EVALUATIONS = 10
"""For an image of the reference, of which a round draws as many as there are data."""


def denoise(model: EDMPreconditioned, labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
    """DDIM without guidance."""
    x = model.schedule.prior(len(labels), 1, 8, 8, generator=generator)
    return deis(guided(model, labels, 1.0), x, grids.karras(model.schedule, evaluations), order=0)


def tuned_diffusion(lesson: Lesson, *, rounds: int = 2) -> Sample:
    """A diffusion model, tuned in rounds within the same allowance."""
    model = diffusion_model(lesson, share=LIKELIHOOD).requires_grad_(True)
    generator = lesson.trial.generator(40)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    pool: list[TensorDataset] = []

    def log_ratio(model: nn.Module, reference: nn.Module, batch: TensorDataset) -> Tensor:
        images, labels = batch.tensors
        t = lognormal_levels(len(images), generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        weight = model.weight(t)  # type: ignore[operator]
        return diffusion_log_ratio(model, reference, images, t, noise, labels, weight=weight)  # type: ignore[arg-type]

    def sample(reference: nn.Module, count: int) -> TensorDataset:
        return TensorDataset(*pool[-1][torch.randint(len(pool[-1]), (count,), generator=generator)])

    beta = float(lesson.trial.setting.get("beta", 0.2))
    rule = SelfPlay(model, optimizer, log_ratio, sample, alpha=2.0, beta=beta)
    # Both groups forward and backward, and the reference on both; a round pays for its samples.
    left = int((1 - LIKELIHOOD) * lesson.allowance) // rounds - len(lesson.images) * EVALUATIONS
    steps = max(1, left // (8 * BATCH))
    for _ in range(rounds):
        rule.next_round()
        with torch.no_grad():
            drawn = denoise(rule.reference, lesson.labels, EVALUATIONS, generator)  # type: ignore[arg-type]
        pool.append(TensorDataset(drawn, lesson.labels))
        for images, labels in lesson.batches(steps, generator):
            rule.step(TensorDataset(images, labels))
    return torch.no_grad()(partial(denoise, model.eval()))
