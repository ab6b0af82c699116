"""What the student of each stage is to say, and its error to that."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import classifier_free_guidance
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.scale_conditioning import per_sample_scale
from trimtab.diffusion.schedules import NoiseSchedule, per_sample
from trimtab.ops.arguments import real_problem, same_shape


def truncated_snr(schedule: NoiseSchedule, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The paper's weight of the squared error of a clean prediction, max(alpha^2 / sigma^2, 1).

    Example:
        >>> from trimtab.diffusion import EDM
        >>> truncated_snr(EDM(), torch.tensor([0.5, 2.0]))
        tensor([4., 1.])
    """
    if problem := real_problem(t=t):
        raise TypeError(problem)
    return schedule.rho(t).pow(-2).clamp_min(1)


@torch.no_grad()
def guided_clean_sample(
    teacher: DenoiserLike,
    z: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    cond: Any,
    scale: Float[Tensor, " batch"] | float,
    uncond: Any = None,
) -> Float[Tensor, "batch ..."]:
    """The clean prediction of classifier-free guidance, at a scale per sample; two evaluations of the teacher.

    Args:
        teacher: called `teacher(z, t, cond)`.
        z: noisy samples.
        t: their times.
        cond: the condition guided towards.
        scale: w, one number or one per sample.
        uncond: the condition guided away from.
    """
    w = per_sample(per_sample_scale(scale, z), z)
    return classifier_free_guidance(_clean(teacher, z, t, cond), _clean(teacher, z, t, uncond), w)  # type: ignore[arg-type]


def guidance_matching_loss(
    student: DenoiserLike,
    teacher: DenoiserLike,
    x0: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch ..."],
    cond: Any,
    scale: Float[Tensor, " batch"],
    uncond: Any = None,
) -> Tensor:
    """Stage one: the student's error to the guided teacher, a mean over numbers and samples.

    Args:
        student: called `student(z, t, cond, scale)`.
        teacher: called `teacher(z, t, cond)`; it gets no gradients.
        x0: clean samples.
        t: times to train at.
        noise: standard normal, of the shape of `x0`.
        cond: the samples' conditions.
        scale: guidance scale of each sample.
        uncond: the condition that the teacher is guided away from.

    Raises:
        TypeError: a tensor is complex or a NumPy array.
        ValueError: `noise` has not the shape of `x0`.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, EDM
        >>> exact = AnalyticGMM.isotropic(torch.eye(2), 0.1, labels=torch.arange(2)).denoiser(EDM())
        >>> class Unguided:
        ...     schedule, prediction = exact.schedule, exact.prediction
        ...     def __call__(self, z, t, cond, scale): return exact(z, t, cond)
        >>> batch = torch.eye(2), torch.ones(2), torch.ones(2, 2), torch.arange(2)
        >>> guidance_matching_loss(Unguided(), exact, *batch, torch.ones(2))  # at scale 1 there is nothing to learn
        tensor(0.)
    """
    if problem := real_problem(x0=x0, t=t, noise=noise):
        raise TypeError(problem)
    same_shape("noise", noise, "x0", x0)
    z = student.schedule.add_noise(x0, noise, t)
    return _weighted_error(student, z, t, cond, scale, guided_clean_sample(teacher, z, t, cond, scale, uncond))


@torch.no_grad()
def progressive_target(
    teacher: DenoiserLike,
    z: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    middle: Float[Tensor, " batch"],
    end: Float[Tensor, " batch"],
    *further: Any,
) -> Float[Tensor, "batch ..."]:
    """The clean sample with which one DDIM step, from t to `end`, does what two of the teacher's do over `middle`.

    Where `middle` is `end`, it is the teacher's own prediction.

    Args:
        teacher: called `teacher(z, t, *further)`.
        z: noisy samples at `t`.
        t, middle, end: falling times; sigma may be zero at `end`, if `middle` is above it.
        *further: what the teacher is told beside, such as the condition and the scale.
    """
    here, half, there = (_levels(teacher.schedule, time, z) for time in (t, middle, end))
    halfway = _ddim(z, _clean(teacher, z, t, *further), here, half)
    z_end = _ddim(halfway, _clean(teacher, halfway, middle, *further), half, there)
    ratio = there[1] / here[1]
    target: Tensor = (z_end - ratio * z) / (there[0] - ratio * here[0])
    return target


def progressive_loss(
    student: DenoiserLike,
    teacher: DenoiserLike,
    x0: Float[Tensor, "batch ..."],
    t: Float[Tensor, " batch"],
    middle: Float[Tensor, " batch"],
    end: Float[Tensor, " batch"],
    noise: Float[Tensor, "batch ..."],
    cond: Any,
    scale: Float[Tensor, " batch"],
) -> Tensor:
    """Stage two: the student's error to `progressive_target`, weighted as in stage one.

    Student and teacher are called `(z, t, cond, scale)`; the teacher gets no gradients.

    Raises:
        ValueError: `noise` has not the shape of `x0`.
    """
    same_shape("noise", noise, "x0", x0)
    z = student.schedule.add_noise(x0, noise, t)
    return _weighted_error(student, z, t, cond, scale, progressive_target(teacher, z, t, middle, end, cond, scale))


def _clean(denoiser: DenoiserLike, z: Tensor, t: Tensor, *further: Any) -> Tensor:
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    value: Any = denoiser(z, t, *further)
    return convert(value, z, alpha, sigma, denoiser.prediction, "x0")


def _weighted_error(student: DenoiserLike, z: Tensor, t: Tensor, cond: Any, scale: Tensor, wanted: Tensor) -> Tensor:
    error = (_clean(student, z, t, cond, scale) - wanted).square().flatten(1).mean(1)
    return (truncated_snr(student.schedule, t) * error).mean()


def _levels(schedule: NoiseSchedule, t: Tensor, z: Tensor) -> tuple[Any, Any]:
    return per_sample(schedule.alpha(t), z), per_sample(schedule.sigma(t), z)


def _ddim(z: Tensor, clean: Tensor, here: tuple[Any, Any], there: tuple[Any, Any]) -> Tensor:
    moved: Tensor = there[0] * clean + there[1] / here[1] * (z - here[0] * clean)
    return moved
