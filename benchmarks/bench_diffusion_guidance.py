"""Guidance rules over the calls they make, and the evaluations that adaptive guidance makes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.bench_diffusion import SCHEDULE, SHAPE, SmallUNet, Timed, within
from benchmarks.timing import compared
from trimtab.diffusion import (
    AdaptiveGuidance,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    CountNFE,
    Denoiser,
    GradientFreeClassifierGuidance,
    LinearAG,
    OffTheShelfGuidance,
    VPLinear,
    ddim,
    ddim_invert,
    degrade,
    elucd,
    fit_linear_guidance,
    grids,
    record_guidance,
    smooth_activations,
)
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import class_gradient
from trimtab.studies.tools.mixtures import mixture


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a run on four 32 x 32 images, and evaluations of a run on a mixture fitted to digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield from _overhead(width=8 if quick else 32, steps=4 if quick else 20, repeats=2 if quick else 9)
            yield from _evaluations(samples=20 if quick else 500)
    finally:
        torch.set_num_threads(threads)


def _overhead(width: int, steps: int, repeats: int) -> Iterator[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = SmallUNet(width).eval(), torch.randn(SHAPE)
        classifier = nn.Sequential(
            nn.Hardtanh(-3, 3),  # what an untrained model calls clean is so large that a softplus underflows, slowly
            nn.Conv2d(3, width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * width, 10),
        ).eval()
    calls, judged, gradient = Timed(model), Timed(classifier), Timed(class_gradient)
    smooth = smooth_activations(classifier)
    times, labels = grids.power(SCHEDULE, steps, t_min=1.0), torch.arange(4)
    denoiser = Denoiser(lambda x, t, cond: calls(x, t), SCHEDULE)
    recorded = record_guidance(denoiser, labels, lambda guided: ddim(guided, x, times))
    linear = LinearAG(denoiser, labels, coefficients=fit_linear_guidance(*recorded))
    rules: dict[str, DenoiserLike] = {
        "CFG++": CFGPlusPlus(denoiser, labels),
        "AG that never stops": AdaptiveGuidance(denoiser, labels, threshold=2.0),
        "LinearAG": linear,
        "GFCG": GradientFreeClassifierGuidance(denoiser, labels, classifier=judged),
        "EluCD": OffTheShelfGuidance(denoiser, labels, classifier=smooth),
    }
    runs = {f"DDIM with {name}": partial(ddim, rule, x, times) for name, rule in rules.items()}
    runs["DDIM inversion with CFG++"] = partial(ddim_invert, rules["CFG++"], x, times)
    with mock.patch.object(elucd, "class_gradient", gradient):
        for name, run in runs.items():
            seconds = within(run, [calls, judged, gradient], repeats)
            note = "peer: the calls of model and classifier in it"
            yield compared(f"{name}, {steps} steps", seconds, 1.05, note)


def _evaluations(samples: int) -> Iterator[dict[str, object]]:
    """AG at its authors' threshold: what it costs, and how far from full guidance it ends."""
    data, schedule = mixture("digits"), VPLinear()
    counted = CountNFE(degrade(data.denoiser(schedule), class_blur=0.5))
    generator = torch.Generator().manual_seed(0)
    noise = schedule.prior(samples, data.dim, generator=generator, dtype=torch.float64)
    labels, times = torch.arange(samples) % 10, grids.power(schedule, 25)

    def accuracy(x: Tensor) -> float:
        return float((data.class_log_posterior(x).argmax(1) == labels).double().mean())

    full = ddim(ClassifierFreeGuidance(counted, labels, scale=4.5), noise, times)
    peer = counted.per_sample
    x = ddim(AdaptiveGuidance(counted, labels, scale=4.5), noise, times)
    ratio = counted.per_sample / peer
    away = (x - full).square().mean().sqrt().item()
    yield {
        "what": "AG at a threshold of 0.999, 25 steps",
        "ours": counted.per_sample,
        "peer": peer,
        "ratio": ratio,
        "unit": "evaluations",
        "aim": 0.75,
        "met": ratio <= 0.75,
        "note": f"peer: CFG; RMSE to it {away:.2g}, accuracy {accuracy(x):.3f} and {accuracy(full):.3f}",
    }
