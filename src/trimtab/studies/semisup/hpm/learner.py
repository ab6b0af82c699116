"""HPM on the encoder that all use, and how well it knows which patches are hard."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.ops.patch_masks import patch_grid, spread_patches
from trimtab.semisup import HPM, hard_patch_mask, patchify
from trimtab.studies.engine.study import Result, Trial
from trimtab.studies.tasks.representation_learning import numerals
from trimtab.studies.tools.pretraining import DIM, Lesson, PreTraining, pretrain
from trimtab.studies.tools.self_supervised import GREY, PATCH

Guess = Literal["HPM", "contrast", "noise"]


class MaskedNetwork(nn.Module):
    """The encoder, which sees grey in place of hidden patches, and two decoders of the same form on its features."""

    def __init__(self, lesson: Lesson) -> None:
        super().__init__()
        height, width = lesson.x.shape[2:]
        self.grid = patch_grid(height, width, PATCH)
        self.encoder = lesson.encoder()
        patches, pixels = self.grid[0] * self.grid[1], lesson.x.shape[1] * PATCH**2
        self.pixels = self._decoder(patches * pixels)
        self.losses = self._decoder(patches)
        self.form = (patches, pixels)

    def _decoder(self, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Linear(DIM, 256), nn.ReLU(), nn.Linear(256, outputs))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = spread_patches(mask.view(len(x), *self.grid), *x.shape[2:])
        features = self.encoder(x.masked_fill(hidden, GREY))
        return self.pixels(features).view(len(x), *self.form), self.losses(features)


class HardPatches(nn.Module):
    """HPM as the task asks for; the teacher follows faster than the authors', for training is shorter."""

    def __init__(self, lesson: Lesson, *, ramped: bool = True, **options: Any) -> None:
        super().__init__()
        steps_per_epoch = max(1, len(lesson.x) // lesson.batch_size)
        epochs = math.ceil(lesson.steps / steps_per_epoch)
        ratio = lesson.option("ratio", 0.5)
        self.rule = HPM(
            MaskedNetwork(lesson), PATCH, epochs, mask_ratio=ratio, decay=(0.98, 0.99), decay_epochs=epochs, **options
        )
        self.epochs, self.steps_per_epoch, self.steps, self.ramped = epochs, steps_per_epoch, 0, ramped

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        self.rule.set_epoch(self.steps // self.steps_per_epoch if self.ramped else self.epochs - 1)
        return self.rule.loss(x, generator=generator)["total"]

    def update(self, share: float) -> None:
        self.rule.update()
        self.steps += 1

    def encode(self, x: Tensor) -> Tensor:
        features: Tensor = self.rule.model.encoder(x)  # type: ignore[operator]
        return features


def ranking(trial: Trial, guess: Guess, **options: Any) -> Result:
    """How well a guess from the whole image ranks the losses of a test image's hidden patches."""
    trial = replace(trial, setting={"lr": 2e-3, "ratio": 0.5})
    data = numerals.samples(trial)
    steps = trial.pick(smoke=10, laptop=200, paper=10_000)
    lesson = Lesson(data.x, (), steps, min(96, len(data.x)), trial.setting, trial.seed)

    def build(lesson: Lesson) -> HardPatches:
        return HardPatches(lesson, **options)

    rule = pretrain(PreTraining(learner=build), lesson, trial).learner.rule
    x = data.x_test[:2_000]
    generator = trial.generator(11)
    patches = patchify(x, PATCH)
    with torch.no_grad():
        mask = hard_patch_mask(torch.zeros(patches.shape[:2]), 0.5, 0.0, generator=generator)
        losses = rule.patch_losses(x, rule.model(x, mask)[0])[mask].view(len(x), -1)
        if guess == "HPM":
            guessed = rule.model(x, torch.zeros_like(mask))[1]
        elif guess == "contrast":
            guessed = patches.var(2, unbiased=False)
        else:
            guessed = torch.rand(mask.shape, generator=generator)
    found = rank_correlation(guessed[mask].view(len(x), -1), losses)
    return Result({"correlation": found.mean().item()})


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, of each row; equal values share their mean rank."""
    ranks = [_mean_ranks(part.double()) for part in (a, b)]
    centred = [part - part.mean(1, keepdim=True) for part in ranks]
    lengths = (centred[0].square().sum(1) * centred[1].square().sum(1)).sqrt()
    return (centred[0] * centred[1]).sum(1) / lengths.clamp(min=1e-12)


def _mean_ranks(x: Tensor) -> Tensor:
    below = (x[:, None] < x[:, :, None]).sum(2)
    same = (x[:, None] == x[:, :, None]).sum(2)
    return below + (same - 1) / 2
