"""Consistency training as it was before iCT, with iCT's parts one by one, and samples of a consistency function."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.diffusion import (
    ClassifierFreeGuidance,
    ConsistencyPreconditioned,
    ImprovedConsistencyTraining,
    consistency_sample,
    doubling_levels,
    lognormal_shares,
    neighbours,
    noise_levels,
    pseudo_huber,
)
from trimtab.diffusion.ict import level_pairs
from trimtab.ops.averaging import frozen_copy, move_average
from trimtab.studies.tools.digit_generation import Images, Labels, Lesson, train

MOST_LEVELS = 80
"""iCT's intervals at last; its 1280 belong to 400,000 steps."""

BatchLoss = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Maps samples, their classes and a source of randomness to a scalar."""


def times_of(evaluations: int) -> Tensor:
    """Where a consistency function is evaluated, and the end: two-step sampling is at 1.2, more from 3 to 0.3.

    1.2 is the paper's 0.821 for data of standard deviation 0.5, in the scale of ours.
    """
    middle = torch.tensor([1.2]) if evaluations == 2 else torch.logspace(0.5, -0.5, max(0, evaluations - 1))
    return torch.cat([torch.tensor([80.0]), middle[: evaluations - 1], torch.tensor([0.002])])


def generate(
    function: ConsistencyPreconditioned,
    labels: Tensor | None,
    shape: tuple[int, ...],
    evaluations: int,
    seed: torch.Generator,
) -> Tensor:
    """Samples of the classes asked for, in so many evaluations."""
    x = function.schedule.prior(*shape, generator=seed)
    given = function if labels is None else ClassifierFreeGuidance(function, labels, scale=1.0)
    return consistency_sample(given, x, times_of(evaluations), generator=seed)


def consistency_sampler(
    lesson: Lesson, function: ConsistencyPreconditioned, loss: BatchLoss, steps: int
) -> Callable[[Labels, int, torch.Generator], Images]:
    """A consistency function of the lesson's images, trained by a loss, as what makes images of classes."""
    trained = train(lesson, function, loss, steps, optimizer=lambda p: torch.optim.RAdam(p, lr=lesson.lr))

    def sample(labels: Labels, evaluations: int, generator: torch.Generator) -> Images:
        return generate(trained, labels, (len(labels), *lesson.images.shape[1:]), evaluations, generator)

    return sample


def ict_loss(function: ConsistencyPreconditioned, steps: int) -> BatchLoss:
    """iCT's loss."""
    return counted(ImprovedConsistencyTraining(function, steps, s1=MOST_LEVELS))


def counted(training: ImprovedConsistencyTraining) -> BatchLoss:
    """A loss of batch and step as one of the batch alone, which counts the steps."""
    count = itertools.count()
    return lambda x0, labels, generator: training(
        x0, next(count), *([labels] if labels.numel() else []), generator=generator
    )


@dataclass(frozen=True)
class Recipe:
    """Consistency training with some of iCT's parts; the defaults are those of Consistency Models.

    Attributes:
        moving_teacher: the teacher is an average of the student, at a rate of exp(s0 log 0.9 / N).
        huber: the pseudo-Huber distance in place of the squared one.
        lognormal: levels from a lognormal in place of uniform ones.
        doubling: the number of levels doubles in stages (10 to 80) in place of growing as a root (2 to 80).
        weighted: neighbours weigh one over their distance in noise level, or alike.
    """

    moving_teacher: bool = True
    huber: bool = False
    lognormal: bool = False
    doubling: bool = False
    weighted: bool = False

    def levels(self, step: int, steps: int) -> int:
        """How many noise levels there are at a step."""
        if self.doubling:
            return doubling_levels(step, steps, 10, MOST_LEVELS)
        return math.ceil(math.sqrt(step / steps * ((MOST_LEVELS + 1) ** 2 - 4) + 4) - 1) + 1

    def loss(self, function: ConsistencyPreconditioned, steps: int) -> BatchLoss:
        """The loss of a batch; the teacher follows before each but the first."""
        count, teacher = itertools.count(), frozen_copy(function)
        s0 = 10 if self.doubling else 2

        def of_batch(x0: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
            step = next(count)
            levels = noise_levels(function.schedule, max(2, self.levels(step, steps)))
            if self.moving_teacher and step:
                move_average(teacher, function, math.exp(s0 * math.log(0.9) / len(levels)))
            shares = lognormal_shares(levels) if self.lognormal else torch.ones(len(levels) - 1)
            index = torch.multinomial(shares, len(x0), replacement=True, generator=generator)
            low, high = level_pairs(levels, index, x0)
            noise = torch.randn(x0.shape, generator=generator)
            student, target = neighbours(
                function,
                x0,
                noise,
                low,
                high,
                *([labels] if labels.numel() else []),
                teacher=teacher if self.moving_teacher else None,
            )
            c = 0.00054 * math.sqrt(x0[0].numel())
            away = pseudo_huber(student, target, c) if self.huber else (student - target).square().flatten(1).sum(1)
            return (away / (high - low) if self.weighted else away).mean()

        return of_batch
