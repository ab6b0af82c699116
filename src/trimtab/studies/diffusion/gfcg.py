"""GFCG, alone and with autoguidance, against what it is compared with, at equal class accuracy.

The formula of the scale is a reconstruction from the paper's abstract and a short account of its method: no text of it
was available, and the verdict is on that reconstruction. The paper measures ImageNet with an EDM2 model; here the data
are a Gaussian mixture fitted to digits, so that distance and class are exact, and all are compared at the scale that
makes 99 % of the samples one of the class asked for, or, where a rule reaches that with none (classifier guidance does
not), at its most accurate. The model confuses classes evenly, which suits a method that guides from one class to
another. The guiding classifier is a small network trained on clean samples; the exact classifier judges. The weaker
model, GFCG's and autoguidance's, confuses classes half as much again. Its evaluations count as the model's; what a
classifier costs is not counted. Two claims say the same of 10 evaluations, five steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trimtab.diffusion import AnalyticGMM, Denoiser, GradientFreeClassifierGuidance
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import Guidance
from trimtab.studies.engine.study import Claim, Study, Trial
from trimtab.studies.tasks.guided_sampling import (
    GuidedModel,
    GuidedSampler,
    MakeGuidance,
    fewest_evaluations,
    many_evaluations,
)
from trimtab.studies.tools.guiding_classifiers import clean_classifier

Reference = Literal["model", "weaker model", "unconditional model"]


def guide(
    denoiser: GuidedModel,
    labels: Tensor,
    scale: float,
    *,
    classifier: Callable[[Tensor], Tensor],
    reference: Reference,
    constant: bool,
) -> DenoiserLike:
    """GFCG, or a part of it.

    Args:
        denoiser, labels, scale: of the task.
        classifier: of clean samples.
        reference: the model that speaks for the class guided away from; the unconditional one knows of no class.
        constant: whether the weight is 1 + s / 2, that of full confusion, for every sample at every step.
    """
    weaker: DenoiserLike | None = None
    if reference == "weaker model":
        weaker = denoiser.weaker
    elif reference == "unconditional model":
        plain = Guidance(denoiser, labels)
        weaker = Denoiser(lambda x, t, cond: plain.unconditional(x, t), denoiser.schedule, denoiser.prediction)
    weight = (lambda share: torch.full_like(share, 1 + scale / 2)) if constant else None
    return GradientFreeClassifierGuidance(
        denoiser, labels, classifier=classifier, scale=scale, weaker=weaker, weight=weight
    )


def prepare(trial: Trial, data: AnalyticGMM, *, reference: Reference = "model", constant: bool = False) -> MakeGuidance:
    """Train the classifier first."""
    return partial(guide, classifier=clean_classifier(trial, data), reference=reference, constant=constant)


def entrant(*, reference: Reference = "model", constant: bool = False) -> GuidedSampler:
    """GFCG, or a part of it."""
    return GuidedSampler(prepare=partial(prepare, reference=reference, constant=constant))


study = Study(
    paper="gfcg",
    entrants={"GFCG": entrant(), "GFCG with autoguidance": entrant(reference="weaker model")},
    controls={
        "reference class, constant weight": {many_evaluations: entrant(constant=True)},
        "adaptive weight, no reference class": {many_evaluations: entrant(reference="unconditional model")},
    },
    on=[many_evaluations, fewest_evaluations],
    headline=Claim("GFCG with autoguidance", below="autoguidance", on="frechet", at=many_evaluations),
    claims=[
        Claim("GFCG with autoguidance", beats="autoguidance", on="recall", by=-0.02, at=many_evaluations),
        Claim("GFCG", below="CFG", on="frechet", at=many_evaluations),
        Claim("GFCG", below="autoguidance", on="frechet", at=many_evaluations),
        Claim("GFCG", below="classifier guidance", on="frechet", at=many_evaluations),
        Claim("GFCG", below="reference class, constant weight", on="frechet", at=many_evaluations),
        Claim("GFCG", below="adaptive weight, no reference class", on="frechet", at=many_evaluations),
        Claim("GFCG with autoguidance", below="autoguidance", on="frechet", at=fewest_evaluations),
        Claim("GFCG", below="CFG", on="frechet", at=fewest_evaluations),
    ],
)
