"""DDIM, DPM-Solver++ and predictor-corrector over the model calls they make, and a step over diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.bench_diffusion import SHAPE, SmallUNet
from benchmarks.timing import medians
from trimtab.diffusion import (
    VE,
    Denoiser,
    DualFast,
    LayerSkipping,
    VPLinear,
    ddim,
    dpm_solver,
    grids,
    predictor_corrector,
)
from trimtab.diffusion.denoiser import DenoiserLike, model_times

STEPS = 20


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a run of 20 steps on four 32 x 32 images, and microseconds of a step without any model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield from _overhead(width=8 if quick else 32, steps=4 if quick else STEPS, repeats=2 if quick else 9)
            yield from _step(repeats=3 if quick else 40)
    finally:
        torch.set_num_threads(threads)


def _overhead(width: int, steps: int, repeats: int) -> Iterator[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = SmallUNet(width).eval(), torch.randn(SHAPE)
    vp, ve = Denoiser(model, VPLinear()), Denoiser(model, VE())
    times, geometric = grids.power(vp.schedule, steps), grids.log_snr(ve.schedule, steps)
    model_t = model_times(times[:-1], x)

    def bare(calls: int) -> Callable[[], object]:
        return lambda: [model(x, model_t[i % steps]) for i in range(calls)]

    halved = LayerSkipping(vp, model.inner, [(0, 1, 2, 3)] * steps)
    runs: dict[str, tuple[Callable[[], object], int, float]] = {
        "ddim": (lambda: ddim(vp, x, times), steps, 1.05),
        "dpm_solver": (lambda: dpm_solver(vp, x, times), steps, 1.05),
        "ddim with DualFast": (lambda: ddim(DualFast(vp), x, times), steps, 1.05),
        "predictor_corrector": (lambda: predictor_corrector(ve, x, geometric), 2 * steps, 1.05),
        "ddim without the inner blocks": (lambda: ddim(halved, x, times), steps, 0.9),
    }
    for name, (run, calls, aim) in runs.items():
        seconds = medians({"ours": run, "bare": bare(calls)}, repeats, warmup=1)
        ratio = seconds["ours"] / seconds["bare"]
        yield {
            "what": f"{name}, {steps} steps",
            "ours": 1e3 * seconds["ours"],
            "peer": 1e3 * seconds["bare"],
            "ratio": ratio,
            "unit": "ms",
            "aim": aim,
            "met": ratio <= aim,
            "note": f"peer: the {calls} model calls alone",
        }


def _step(repeats: int) -> Iterator[dict[str, object]]:
    """All but the model: the prediction is there already."""
    try:
        import diffusers
    except ImportError:
        return
    x, prediction = torch.randn(SHAPE), torch.randn(SHAPE)

    def no_model(x: Tensor, t: Tensor) -> Tensor:
        return prediction

    free: DenoiserLike = Denoiser(no_model, VPLinear())
    exploding: DenoiserLike = Denoiser(no_model, VE(), "score")
    times, geometric = grids.power(free.schedule, STEPS), grids.log_snr(exploding.schedule, STEPS)
    sde = diffusers.ScoreSdeVeScheduler()

    def scheduled(scheduler: object) -> Callable[[], None]:
        def run() -> None:
            sample = x
            scheduler.set_timesteps(STEPS)  # type: ignore[attr-defined]
            for t in scheduler.timesteps:  # type: ignore[attr-defined]
                sample = scheduler.step(prediction, t, sample).prev_sample  # type: ignore[attr-defined]

        return run

    def predicted_and_corrected() -> None:
        sample = x
        sde.set_timesteps(STEPS)
        sde.set_sigmas(STEPS)
        for t in sde.timesteps:
            sample = sde.step_correct(prediction, sample).prev_sample
            sample = sde.step_pred(prediction, t, sample).prev_sample

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object], str]] = {
        "ddim": (lambda: ddim(free, x, times), scheduled(diffusers.DDIMScheduler()), "DDIMScheduler"),
        "dpm_solver": (
            lambda: dpm_solver(free, x, times),
            scheduled(diffusers.DPMSolverMultistepScheduler()),
            "DPMSolverMultistepScheduler",
        ),
        "predictor_corrector": (
            lambda: predictor_corrector(exploding, x, geometric),
            predicted_and_corrected,
            "ScoreSdeVeScheduler",
        ),
    }
    for name, (ours, theirs, peer) in pairs.items():
        seconds = medians({"ours": ours, "theirs": theirs}, repeats, warmup=2)
        ratio = seconds["ours"] / seconds["theirs"]
        yield {
            "what": f"{name}, a step without the model",
            "ours": 1e6 * seconds["ours"] / STEPS,
            "peer": 1e6 * seconds["theirs"] / STEPS,
            "ratio": ratio,
            "unit": "us",
            "aim": 1.0,
            "met": ratio <= 1.0,
            "note": f"peer: diffusers.{peer}; set-up of the run included in both",
        }
