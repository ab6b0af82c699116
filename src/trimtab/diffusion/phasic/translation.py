"""Translation of source images by an adapted model, with their coarse structure held."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.denoiser import StepCallback, after_step, start
from trimtab.diffusion.phasic.content import ContentFused
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import NoiseSchedule
from trimtab.ops.arguments import in_range, integer, number, real_problem, same_shape


def low_pass(
    x: Float[Tensor, "batch channels height width"], factor: int
) -> Float[Tensor, "batch channels height width"]:
    """Means of squares of `factor` pixels a side: a projection, which keeps constant images.

    Example:
        >>> low_pass(torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]]), 2).flatten().tolist()
        [3.0, 3.0, 3.0, 3.0]
    """
    if problem := real_problem(x=x):
        raise TypeError(problem)
    integer("factor", factor)
    if x.ndim != 4 or x.shape[-1] % factor or x.shape[-2] % factor:
        raise ValueError(
            f"x must have shape (batch, channels, height, width), sides divisible by {factor}, got {tuple(x.shape)}"
        )
    return F.interpolate(F.avg_pool2d(x, factor), scale_factor=factor, mode="nearest")


def guide_structure(
    x: Float[Tensor, "batch channels height width"], guide: Float[Tensor, "batch channels height width"], factor: int
) -> Float[Tensor, "batch channels height width"]:
    """x with the coarse part of the guide in place of its own.

    Raises:
        ValueError: the shapes differ or are not divisible by `factor`.
    """
    same_shape("guide", guide, "x", x)
    return x - low_pass(x, factor) + low_pass(guide, factor)


@torch.no_grad()
def translate(
    denoiser: ContentFused,
    source: Float[Tensor, "batch channels height width"],
    times: Float[Tensor, " steps+1"],
    *,
    t_guide: float | None = 300.0,
    factor: int = 4,
    style_passes: int = 1,
    eta: float = 0.0,
    fuse: bool = True,
    clip: float | None = 1.0,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Images of the target domain with the content of source images.

    Args:
        denoiser: the adapted model, on a variance-preserving schedule whose times count steps.
        source: clean source images.
        times: falling times; the source is noised to the first. The paper goes from 600 in 25 steps.
        t_guide: structure is guided while the time is above it; None for never.
        factor: of the coarse structure.
        style_passes: how often the guide, a noised source at first, is made anew from the clean image that the model
            sees in it, for more of the target's style; the release makes none.
        eta: share of fresh noise in a step: 0 is DDIM, 1 the ancestral sampler (the release's).
        fuse: show the source to the model.
        clip: bound of clean predictions; None for none.
        generator: of all noise.
        callback: called after every step as `callback(step, time, x)`, with structure guided; a tensor that it returns
            replaces x.

    Raises:
        TypeError: `denoiser` lacks the form of one.
        ValueError: `times` do not fall, or an argument is out of its range.

    Example:
        >>> from torch import nn
        >>> from trimtab.diffusion import ContentFusion, Discrete
        >>> class White(nn.Module):
        ...     def encode(self, x, t):
        ...         return x, None
        ...
        ...     def decode(self, features, rest, t):
        ...         return torch.ones_like(features)
        >>> schedule = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
        >>> denoiser = ContentFused(White(), ContentFusion(1), schedule, prediction="x0")
        >>> white = translate(denoiser, torch.zeros(2, 1, 4, 4), torch.linspace(600, 0, 26))
        >>> bool((white - 1).abs().max() < 0.1)
        True
    """
    if problem := real_problem(source=source):
        raise TypeError(problem)
    times = start(denoiser, source, times)
    if not denoiser.schedule.t_min <= times[-1] < times[0] <= denoiser.schedule.t_max:
        raise ValueError(
            f"times must be from {denoiser.schedule.t_min:g} to {denoiser.schedule.t_max:g}, as the schedule's, "
            f"got from {times[-1]:g} to {times[0]:g}"
        )
    if clip is not None and not number("clip", clip) > 0:
        raise ValueError(f"clip must be positive, or None, got {clip}")
    in_range("eta", eta, 0, 1)
    integer("style_passes", style_passes, 0)
    if t_guide is not None:
        number("t_guide", t_guide)
        low_pass(source, factor)  # refuses a factor that does not fit before anything is done
    schedule = denoiser.schedule

    def noise() -> Tensor:
        return torch.randn(source.shape, generator=generator, dtype=source.dtype, device=source.device)

    def clean(x: Tensor, at: _Level) -> Tensor:
        t = torch.full((len(x),), at.time, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        said = denoiser(x, t, source, generator=generator) if fuse else denoiser(x, t)
        x0 = convert(said, x, at.alpha, at.sigma, denoiser.prediction, "x0")
        return x0 if clip is None else x0.clamp(-clip, clip)

    def step(x: Tensor, at: _Level, to: _Level, eta: float) -> Tensor:
        x0 = clean(x, at)
        fresh = eta * at.ancestral_std(to)
        x = to.alpha * x0 + max(to.sigma**2 - fresh**2, 0.0) ** 0.5 * (x - at.alpha * x0) / at.sigma
        return x + fresh * noise() if fresh else x

    def guide(at: _Level) -> Tensor:
        x = at.alpha * source + at.sigma * noise()
        for _ in range(style_passes):
            x = at.alpha * clean(x, at) + at.sigma * noise()
        return step(x, at, _Level.of(schedule, max(at.time - 1, schedule.t_min)), eta=1.0)

    levels = [_Level.of(schedule, t) for t in times.tolist()]
    x = levels[0].alpha * source + levels[0].sigma * noise()
    for i, (at, to) in enumerate(itertools.pairwise(levels)):
        x = step(x, at, to, eta)
        if t_guide is not None and to.time > t_guide:
            x = guide_structure(x, guide(to), factor)
        x = after_step(callback, i, to.time, x)
    return x


class _Level(NamedTuple):
    """A time of the schedule."""

    time: float
    alpha: float
    sigma: float

    @classmethod
    def of(cls, schedule: NoiseSchedule, time: float) -> _Level:
        t = torch.tensor(time, dtype=torch.float64)
        return cls(time, float(schedule.alpha(t)), float(schedule.sigma(t)))

    def ancestral_std(self, to: _Level) -> float:
        """Deviation of the state at a lower level, given this one and the clean image."""
        kept = 1 - (self.alpha / to.alpha) ** 2
        return float(max(kept, 0.0) ** 0.5 * to.sigma / self.sigma)
