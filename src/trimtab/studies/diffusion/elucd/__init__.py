"""EluCD step by step: a classifier of clean samples as guide at equal class accuracy, and how calibrated it is.

The paper measures FID of ImageNet models with ResNets as guides; here the data are a Gaussian mixture fitted to digits,
so that distance and class are exact, the guide is a small network trained on clean samples, and the exact classifier
judges. All are compared at the scale that makes 90 % of the samples one of the class asked for, or, where a guide
reaches that with none, at its most accurate; and at 50 evaluations of the model: guidance by a classifier takes one a
step, classifier-free guidance two. The classifier's cost is not counted. The baseline called classifier guidance has a
network of the same size that was trained on noisy samples. The controls add the parts one by one, in the paper's order.
Scales began at 1 once, where guidance by a classifier had passed the accuracy already; now smaller ones are tried until
one falls short of it. One claim says the same of 10 evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from trimtab.diffusion import AnalyticGMM, ClassifierGuidance, OffTheShelfGuidance, smooth_activations
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.studies.diffusion.elucd.calibration import METRICS, calibration
from trimtab.studies.engine.study import Claim, Experiment, Study, Task, Trial
from trimtab.studies.tasks.guided_sampling import (
    GuidedSampler,
    MakeGuidance,
    moderate_accuracy,
    moderate_accuracy_fewest,
)
from trimtab.studies.tools.guiding_classifiers import clean_classifier


def on_noisy_samples(trial: Trial, data: AnalyticGMM) -> MakeGuidance:
    """The classifier reads what it never saw."""
    classifier = clean_classifier(trial, data)

    def guide(denoiser: DenoiserLike, labels: Tensor, scale: float) -> DenoiserLike:
        return ClassifierGuidance(denoiser, labels, classifier=lambda x, t: classifier(x), scale=scale)

    return guide


def on_predictions(
    trial: Trial, data: AnalyticGMM, *, smooth: bool = True, marginal_temperature: float = 0.5, gamma: float = 0.3
) -> MakeGuidance:
    """EluCD with its authors' settings for DDPM, or a part of it."""
    network = clean_classifier(trial, data)
    classifier = smooth_activations(network, beta=3.0) if smooth else network

    def guide(denoiser: DenoiserLike, labels: Tensor, scale: float) -> DenoiserLike:
        return OffTheShelfGuidance(
            denoiser,
            labels,
            classifier=classifier,
            scale=scale,
            marginal_temperature=marginal_temperature,
            gamma=gamma,
        )

    return guide


def entrant(prepare: Callable[[Trial, AnalyticGMM], MakeGuidance]) -> GuidedSampler:
    """Guidance by a classifier; gradients at predictions are long, so that scales are small."""
    return GuidedSampler(prepare=prepare, largest=1.5)


def part(prepare: Callable[[Trial, AnalyticGMM], MakeGuidance]) -> Mapping[Task[Any], GuidedSampler]:
    """A part of it, where there are many evaluations."""
    return {moderate_accuracy: entrant(prepare)}


calibrated = Experiment(
    "calibration",
    arms={
        "noisy samples": partial(calibration, reads="noisy"),
        "denoised predictions": partial(calibration, reads="denoised"),
        "denoised predictions, softplus": partial(calibration, reads="denoised", smooth=True),
    },
    metrics=METRICS,
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    cost=1.0,
)

study = Study(
    paper="elucd",
    entrants={"EluCD": entrant(on_predictions)},
    controls={
        "noisy samples": part(on_noisy_samples),
        "denoised predictions": part(partial(on_predictions, smooth=False, marginal_temperature=1.0, gamma=0.0)),
        "and softplus": part(partial(on_predictions, marginal_temperature=1.0, gamma=0.0)),
        "and temperatures": part(partial(on_predictions, gamma=0.0)),
    },
    on=[moderate_accuracy, moderate_accuracy_fewest],
    experiments=[calibrated],
    headline=Claim("EluCD", below="CFG", on="frechet", at=moderate_accuracy),
    claims=[
        Claim("EluCD", below="classifier guidance", on="frechet", at=moderate_accuracy),
        Claim("EluCD", below="CFG", on="frechet", at=moderate_accuracy_fewest),
        Claim("denoised predictions", below="noisy samples", on="frechet", at=moderate_accuracy),
        Claim("and softplus", below="denoised predictions", on="frechet", at=moderate_accuracy),
        Claim("and temperatures", below="and softplus", on="frechet", at=moderate_accuracy),
        Claim("EluCD", below="and temperatures", on="frechet", at=moderate_accuracy),
        Claim("denoised predictions", below="noisy samples", on="calibration_error", at=calibrated),
        Claim("denoised predictions, softplus", below="denoised predictions", on="calibration_error", at=calibrated),
    ],
)
