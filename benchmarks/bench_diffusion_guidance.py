"""Guidance rules over the calls they make, and the evaluations that adaptive guidance makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.bench_diffusion import SCHEDULE, SHAPE, SmallUNet
from benchmarks.timing import medians
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
    fit_linear_guidance,
    grids,
    record_guidance,
    smooth_activations,
)
from trimtab.diffusion.denoiser import model_times
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
    smooth = smooth_activations(classifier)
    times = grids.power(SCHEDULE, steps, t_min=1.0)
    model_t, labels = model_times(times[:-1], x), torch.arange(4)
    denoiser = Denoiser(lambda x, t, cond: model(x, t), SCHEDULE)

    def bare(calls: int, each: Callable[[], object] = lambda: None) -> Callable[[], object]:
        return lambda: [(model(x, model_t[i % steps]), i < steps and each()) for i in range(calls)]

    recorded = record_guidance(denoiser, labels, lambda guided: ddim(guided, x, times))
    linear = LinearAG(denoiser, labels, coefficients=fit_linear_guidance(*recorded))
    linear_calls = steps + (steps // 2 + 1) // 2
    runs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "DDIM with CFG++": (lambda: ddim(CFGPlusPlus(denoiser, labels), x, times), bare(2 * steps)),
        "DDIM inversion with CFG++": (lambda: ddim_invert(CFGPlusPlus(denoiser, labels), x, times), bare(2 * steps)),
        "DDIM with AG that never stops": (
            lambda: ddim(AdaptiveGuidance(denoiser, labels, threshold=2.0), x, times),
            bare(2 * steps),
        ),
        "DDIM with LinearAG": (lambda: ddim(linear, x, times), bare(linear_calls)),
        "DDIM with GFCG": (
            lambda: ddim(GradientFreeClassifierGuidance(denoiser, labels, classifier=classifier), x, times),
            bare(2 * steps, lambda: classifier(x)),
        ),
        "DDIM with EluCD": (
            lambda: ddim(OffTheShelfGuidance(denoiser, labels, classifier=smooth), x, times),
            bare(steps, lambda: class_gradient(smooth, x, labels)),
        ),
    }
    for name, (run, calls) in runs.items():
        seconds = medians({"ours": run, "bare": calls}, repeats, warmup=1)
        ratio = seconds["ours"] / seconds["bare"]
        yield {
            "what": f"{name}, {steps} steps",
            "ours": 1e3 * seconds["ours"],
            "peer": 1e3 * seconds["bare"],
            "ratio": ratio,
            "unit": "ms",
            "aim": 1.05,
            "met": ratio <= 1.05,
            "note": "peer: the calls of model and classifier alone",
        }


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
