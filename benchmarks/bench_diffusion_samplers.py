"""Samplers over the model calls they make, and a step over diffusers' and k-diffusion's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.bench_diffusion import SCHEDULE, SHAPE, SmallUNet, Timed, within
from benchmarks.timing import compared, medians
from trimtab.diffusion import (
    EDM,
    VE,
    ContentFused,
    ContentFusion,
    Denoiser,
    DualFast,
    LayerSkipping,
    VPLinear,
    ddim,
    deis,
    deis_rk,
    dpm_solver,
    grids,
    predictor_corrector,
    translate,
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
            yield from _translation(width=8 if quick else 32, steps=4 if quick else STEPS, repeats=2 if quick else 9)
            yield from _step(repeats=3 if quick else 40)
            yield from _step_of_k_diffusion(repeats=3 if quick else 40)
    finally:
        torch.set_num_threads(threads)


def _overhead(width: int, steps: int, repeats: int) -> Iterator[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = SmallUNet(width).eval(), torch.randn(SHAPE)
    calls, draws = Timed(model), Timed(torch.randn)
    vp, ve = Denoiser(calls, VPLinear()), Denoiser(calls, VE())
    times, geometric = grids.power(vp.schedule, steps), grids.log_snr(ve.schedule, steps)
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "ddim": (lambda: ddim(vp, x, times), steps),
        "dpm_solver": (lambda: dpm_solver(vp, x, times), steps),
        "ddim with DualFast": (lambda: ddim(DualFast(vp), x, times), steps),
        "predictor_corrector": (lambda: predictor_corrector(ve, x, geometric), 2 * steps),
    }
    for name, (run, count) in runs.items():
        seconds = within(run, [calls], repeats)
        yield compared(f"{name}, {steps} steps", seconds, 1.05, f"peer: the {count} model calls in it")
    with mock.patch.object(torch, "randn", draws):
        seconds = within(runs["predictor_corrector"][0], [calls, draws], repeats)
    yield compared(f"predictor_corrector, {steps} steps", seconds, 1.05, "peer: the model calls and the noise in it")
    halved, model_t = LayerSkipping(vp, model.inner, [(0, 1, 2, 3)] * steps), model_times(times[:-1], x)
    seconds = medians(
        {"ours": lambda: ddim(halved, x, times), "peer": lambda: [model(x, t) for t in model_t]}, repeats, warmup=1
    )
    note = f"peer: the {steps} calls of the whole model alone"
    yield compared(f"ddim without the inner blocks, {steps} steps", seconds, 0.9, note)


class _Halves(nn.Module):
    """The U-Net, told apart where it is deepest, as a denoiser that content is fused into takes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = SmallUNet(width)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net.enter(x) + self.net.embed(t[:, None] / 1000)[:, :, None, None]
        for block in self.net.outer:
            h = h + block(h)
        return self.net.down(h), h

    def decode(self, features: Tensor, rest: Tensor, t: Tensor) -> Tensor:
        for block in self.net.inner:
            features = features + block(features)
        return self.net.leave(rest + self.net.up(features))


def _translation(width: int, steps: int, repeats: int) -> Iterator[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, source = ContentFused(_Halves(width), ContentFusion(2 * width), SCHEDULE).eval(), torch.randn(SHAPE)
    times = torch.linspace(600.0, 0.0, steps + 1)
    # Structure is guided down to half of the way, by a guide that takes two evaluations.
    guided = int((times[1:] > 300).sum())
    count = steps + 2 * guided
    with mock.patch.object(model, "forward", Timed(model.forward)) as calls:
        seconds = within(lambda: translate(model, source, times), [calls], repeats)
        yield compared(f"phasic translation, {steps} steps", seconds, 1.05, f"peer: the {count} model calls in it")
        with mock.patch.object(torch, "randn", Timed(torch.randn)) as draws:
            seconds = within(lambda: translate(model, source, times), [calls, draws], repeats)
        yield compared(f"phasic translation, {steps} steps", seconds, 1.05, "peer: the model calls and the noise in it")


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


def _step_of_k_diffusion(repeats: int) -> Iterator[dict[str, object]]:
    """As before, beside k-diffusion's loops at the same noise levels and as many evaluations."""
    try:
        from k_diffusion import sampling  # type: ignore[import-not-found]
    except ImportError:
        return
    x, clean = torch.randn(SHAPE), torch.randn(SHAPE)

    def no_model(x: Tensor, t: Tensor) -> Tensor:
        return clean

    free: DenoiserLike = Denoiser(no_model, EDM(), "x0")
    times = grids.karras(free.schedule, STEPS)
    sigmas = times.float()
    pairs: dict[str, tuple[Callable[[], object], str]] = {
        "ddim": (lambda: ddim(free, x, times), "sample_euler"),
        "dpm_solver": (lambda: dpm_solver(free, x, times), "sample_dpmpp_2m"),
        "deis_rk, heun": (lambda: deis_rk(free, x, times, method="heun"), "sample_heun"),
        "deis, rhoAB order 3": (lambda: deis(free, x, times, variable="rho"), "sample_lms"),
    }
    for name, (ours, peer) in pairs.items():
        loop = getattr(sampling, peer)
        seconds = medians(
            {"ours": ours, "peer": lambda loop=loop: loop(no_model, x, sigmas, disable=True)}, repeats, warmup=2
        )
        yield compared(
            f"{name}, a step without the model",
            {who: held / STEPS for who, held in seconds.items()},
            1.0,
            f"peer: k-diffusion's {peer}",
            unit="us",
        )
