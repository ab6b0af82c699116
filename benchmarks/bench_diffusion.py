"""Samplers over the model calls they make, and a step of the diffusers adapters over diffusers' own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import compared, medians
from trimtab.diffusion import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    Denoiser,
    Discrete,
    adaptive_projected_guidance,
    deis,
    deis_rk,
    grids,
    ipndm,
)
from trimtab.diffusion.denoiser import DenoiserLike

STEPS = 20
SCHEDULE = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))
SHAPE = (4, 3, 32, 32)


class SmallUNet(nn.Module):
    """Two levels of residual convolutions with a time embedding, at the small end of what is used."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.outer = nn.ModuleList(self._block(width) for _ in range(2))
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.inner = nn.ModuleList(self._block(2 * width) for _ in range(4))
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(width, 3, 3, padding=1)

    @staticmethod
    def _block(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        h = self.enter(x) + self.embed(t[:, None] / 1000)[:, :, None, None]
        for block in self.outer:
            h = h + block(h)
        deep = self.down(h)
        for block in self.inner:
            deep = deep + block(deep)
        return self.leave(h + self.up(deep))


class Timed:
    """A callable that adds up the seconds of its calls; one that is made in another's call counts there alone."""

    _inside = False

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.seconds = call, 0.0

    def __call__(self, *args: Any, **named: Any) -> Any:
        if Timed._inside:
            return self.call(*args, **named)
        Timed._inside, started = True, time.perf_counter()
        out = self.call(*args, **named)
        self.seconds += time.perf_counter() - started
        Timed._inside = False
        return out


def within(run: Callable[[], object], calls: Sequence[Timed], repeats: int) -> dict[str, float]:
    """Seconds of a run, and of the calls that it makes: of the run that has the median share of both.

    The calls are those of the run itself, so that they have its inputs, and a machine whose speed drifts counts once.
    """
    run()
    found = []
    for _ in range(repeats):
        for call in calls:
            call.seconds = 0.0
        started = time.perf_counter()
        run()
        whole = time.perf_counter() - started
        bare = sum(call.seconds for call in calls)
        found.append((whole / bare, whole, bare))
    _, whole, bare = sorted(found)[len(found) // 2]
    return {"ours": whole, "peer": bare}


def rows(quick: bool = False) -> Iterator[dict[str, object]]:
    """Milliseconds of a run of 20 steps on four 32 x 32 images, and microseconds of a step without any model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield from _overhead(width=8 if quick else 32, steps=4 if quick else STEPS, repeats=2 if quick else 9)
            yield from _step(repeats=3 if quick else 40)
            yield from _guidance(repeats=3 if quick else 40)
    finally:
        torch.set_num_threads(threads)


def _overhead(width: int, steps: int, repeats: int) -> Iterator[dict[str, object]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = SmallUNet(width).eval(), torch.randn(SHAPE)
    calls = Timed(model)
    denoiser = Denoiser(calls, SCHEDULE)
    times, label = grids.power(SCHEDULE, steps), torch.zeros(4)
    samplers: dict[str, tuple[Callable[[], object], int]] = {
        "DDIM (deis, order 0)": (lambda: deis(denoiser, x, times, order=0), steps),
        "deis, tAB order 3": (lambda: deis(denoiser, x, times), steps),
        "ipndm": (lambda: ipndm(denoiser, x, times), steps),
        "deis_rk, kutta3": (lambda: deis_rk(denoiser, x, times), 3 * steps),
        "deis with CFG": (lambda: deis(ClassifierFreeGuidance(denoiser, label), x, times), 2 * steps),
        "deis with APG": (lambda: deis(AdaptiveProjectedGuidance(denoiser, label), x, times), 2 * steps),
    }
    for name, (run, count) in samplers.items():
        seconds = within(run, [calls], repeats)
        yield compared(f"{name}, {steps} steps", seconds, 1.05, f"peer: the {count} model calls in it")


def _step(repeats: int) -> Iterator[dict[str, object]]:
    """All but the model: the prediction is there already."""
    try:
        import diffusers

        from trimtab.diffusion.diffusers import DEISScheduler
    except ImportError:
        return
    x = torch.randn(SHAPE)

    def no_model(x: Tensor, t: Tensor) -> Tensor:
        return prediction

    prediction = torch.randn(SHAPE)
    free: DenoiserLike = Denoiser(no_model, SCHEDULE)
    times = grids.power(SCHEDULE, STEPS)
    theirs, ours = diffusers.DEISMultistepScheduler(solver_order=3), DEISScheduler(solver_order=3)

    def scheduled(scheduler: object) -> Callable[[], None]:
        def run() -> None:
            sample = x
            scheduler.set_timesteps(STEPS)  # type: ignore[attr-defined]
            for t in scheduler.timesteps:  # type: ignore[attr-defined]
                sample = scheduler.step(prediction, t, sample).prev_sample  # type: ignore[attr-defined]

        return run

    seconds = medians(
        {"deis": lambda: deis(free, x, times, order=2), "ours": scheduled(ours), "theirs": scheduled(theirs)},
        repeats,
        warmup=2,
    )
    for name, what in (("deis", "deis, a step without the model"), ("ours", "DEISScheduler, a step")):
        ratio = seconds[name] / seconds["theirs"]
        yield {
            "what": what,
            "ours": 1e6 * seconds[name] / STEPS,
            "peer": 1e6 * seconds["theirs"] / STEPS,
            "ratio": ratio,
            "unit": "us",
            "aim": 1.0,
            "met": ratio <= 1.0,
            "note": "peer: diffusers.DEISMultistepScheduler, order 3; set-up of the run included in all",
        }


def _guidance(repeats: int) -> Iterator[dict[str, object]]:
    try:
        from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
    except ImportError:
        return
    cond, uncond, previous = torch.randn(3, *SHAPE)
    buffer = MomentumBuffer(0.5)
    seconds = medians(
        {
            "ours": lambda: adaptive_projected_guidance(cond, uncond, 7.5, momentum=0.5, previous=previous),
            "theirs": lambda: normalized_guidance(cond, uncond, 7.5, buffer, 0.0, 2.5, True),
        },
        repeats,
        warmup=2,
    )
    ratio = seconds["ours"] / seconds["theirs"]
    yield {
        "what": "adaptive_projected_guidance, a step",
        "ours": 1e6 * seconds["ours"],
        "peer": 1e6 * seconds["theirs"],
        "ratio": ratio,
        "unit": "us",
        "aim": 1.0,
        "met": ratio <= 1.0,
        "note": "peer: diffusers' normalized_guidance",
    }
