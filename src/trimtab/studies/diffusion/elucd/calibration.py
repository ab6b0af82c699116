"""How well calibrated a classifier of clean samples is on what it reads while it guides."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trimtab.diffusion import VPLinear, smooth_activations
from trimtab.losses import expected_calibration_error
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.guiding_classifiers import clean_classifier
from trimtab.studies.tools.mixtures import mixture

METRICS = {
    "calibration_error": Metric("expected calibration error, mean over time", best="min"),
    "accuracy": Metric("accuracy, mean over time (%)", percent=True),
}


@torch.no_grad()
def calibration(trial: Trial, reads: Literal["noisy", "denoised"], smooth: bool = False) -> Result:
    """Calibration and accuracy at noise levels over the whole run, of labelled samples of the data.

    The denoised prediction is that of the exact model without a condition, since one with it would give the label away.
    """
    data, schedule = mixture(trial.pick(smoke="ring8", laptop="digits", paper="digits")), VPLinear()
    network = clean_classifier(trial, data)
    classifier = smooth_activations(network, beta=3.0) if smooth else network
    model = data.denoiser(schedule)
    count = trial.pick(smoke=200, laptop=2000, paper=10_000)
    x0 = data.sample(count, generator=trial.generator())
    labels = data.class_log_posterior(x0).argmax(1)
    times = torch.linspace(0.02, 0.98, trial.pick(smoke=4, laptop=17, paper=33), dtype=torch.float64)

    errors, accuracies = [], []
    for time in times:
        t = time.expand(count)
        noise = torch.randn(x0.shape, generator=trial.generator(1), dtype=x0.dtype)
        x: Tensor = schedule.add_noise(x0, noise, t)
        probabilities = classifier(model(x, t) if reads == "denoised" else x).softmax(1)
        errors.append(expected_calibration_error(probabilities, labels))
        accuracies.append(float((probabilities.argmax(1) == labels).double().mean()))
    return Result(
        {"calibration_error": sum(errors) / len(errors), "accuracy": sum(accuracies) / len(accuracies)},
        {"calibration_error": Curve(times.tolist(), errors, x_label="time")},
    )
