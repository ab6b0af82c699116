"""Do kicks and a flat spectrum make better features of an averaged target, and keep them from collapsing?

A reconstruction: neither the paper's equations nor its authors' code was at hand; the weight of the kicks is a third
party's (0.1), that of the spectrum is searched. A first result compared the centroid of the views with the target's
centroid of the same views, in which nothing drew the views of a sample together, and was 5 points behind BYOL; now
every view is drawn to the target's centroid, as in the third party's code and in the abstract. Two views of each
sample, as all have here, where the paper takes more; a small CNN and 200 steps instead of ResNet-50 on ImageNet. The
target's decay goes from 0.95 to 1, the paper's longer training starts at 0.996; it was 0.99 in a first run, on the seed
of searches, after which it was lowered. BYOL chooses between 0.95 and 0.99. With two learning rates, of which nearly
all contestants chose the larger, MSBReg was 1.7 points ahead of BYOL, and not surely; with three, which all have now,
it is twice as far.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.ops.averaging import Teacher
from trimtab.semisup import MSBReg, brownian_loss, singular_value_loss
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.representation_learning import incomes, numerals
from trimtab.studies.tools.pretraining import Lesson, PreTraining
from trimtab.studies.tools.self_supervised import BYOL, TwoViews

LAMBDA_B = 0.1


class Particles(TwoViews):
    """Two views of each sample, drawn to the averaged network's centroid of the same two."""

    def __init__(
        self, lesson: Lesson, *, kicks: bool = True, spectrum: bool = True, predicts: bool = True, views: int = 2
    ) -> None:
        super().__init__(lesson)
        self.predictor = lesson.projector(64) if predicts else nn.Identity()
        self.teacher = Teacher(nn.Sequential(self.encoder, self.projector), 0.95, buffers="own")
        lambda_s = lesson.option("lambda_s", 0.03) if spectrum else 0.0
        self.criterion = MSBReg(LAMBDA_B if kicks else 0.0, lambda_s)
        self.views = views

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        views = [self.lesson.view(x, generator) for _ in range(self.views)]
        z = torch.stack([self.predictor(self.project(view)) for view in views], 1)
        z_target = torch.stack([self.teacher(view) for view in views], 1)
        value: Tensor = self.criterion(z, z_target, generator=generator)
        return value

    def update(self, share: float) -> None:
        decay = 1 - 0.05 * (1 + math.cos(math.pi * share)) / 2
        self.teacher.update(nn.Sequential(self.encoder, self.projector), decay)


class RegularizedBYOL(BYOL):
    """BYOL, with the two dispersing terms on its predictions."""

    def loss(self, x: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        first, second = (self.lesson.view(x, generator) for _ in range(2))
        z = torch.stack([self.predictor(self.project(view)) for view in (first, second)], 1)
        unit = nn.functional.normalize(z, dim=2)
        spectrum = torch.stack([singular_value_loss(view) for view in unit.unbind(1)]).mean()
        terms = LAMBDA_B * brownian_loss(z, generator=generator) + self.lesson.option("lambda_s", 0.03) * spectrum
        return self.compare(first, second, index) + terms


rates = {"lr": (1e-3, 4e-3, 1.6e-2)}
both = {**rates, "lambda_s": (0.01, 0.1)}

study = Study(
    paper="msbreg",
    entrants={"MSBReg": PreTraining(learner=Particles, search=both)},
    controls={
        "no kicks": {numerals: PreTraining(learner=partial(Particles, kicks=False), search=both)},
        "no spectrum": {numerals: PreTraining(learner=partial(Particles, spectrum=False), search=rates)},
        "BYOL + kicks + spectrum": {numerals: PreTraining(learner=RegularizedBYOL, search=both)},
        "MSBReg, no predictor": {numerals: PreTraining(learner=partial(Particles, predicts=False), search=rates)},
        "centroid alone, no predictor": {
            numerals: PreTraining(learner=partial(Particles, kicks=False, spectrum=False, predicts=False), search=rates)
        },
    },
    on=[numerals, incomes],
    headline=Claim("MSBReg", beats="BYOL", on="probe", by=0.01, at=numerals),
    claims=[
        Claim("MSBReg", beats="BYOL", on="few_labels", by=0.01, at=numerals),
        Claim("MSBReg", beats="no kicks", on="probe", at=numerals),
        Claim("MSBReg", beats="no spectrum", on="probe", at=numerals),
        Claim("MSBReg, no predictor", beats="centroid alone, no predictor", on="rank", times=1.5, at=numerals),
        Claim("MSBReg, no predictor", beats="centroid alone, no predictor", on="probe", by=0.02, at=numerals),
        Claim("BYOL + kicks + spectrum", beats="BYOL", on="probe", at=numerals),
        Claim("MSBReg", beats="VICReg", on="probe", at=numerals),
        Claim("MSBReg", beats="BYOL", on="probe", at=incomes),
    ],
)
