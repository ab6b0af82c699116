"""Samplers to compare with, and the time grids that they may choose from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trimtab.diffusion import deis, grids
from trimtab.diffusion.denoiser import DenoiserLike, model_times, predict, start, state_and_noise
from trimtab.diffusion.schedules import NoiseSchedule

Sampler = Callable[[DenoiserLike, Tensor, Tensor], Tensor]
"""Maps a denoiser, noise and falling times to samples."""

GRIDS: Mapping[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "uniform": functools.partial(grids.power, p=1.0),
    "quadratic": grids.power,
    "karras": grids.karras,
    "log-SNR": grids.log_snr,
}


def ddim(denoiser: DenoiserLike, x: Tensor, times: Tensor) -> Tensor:
    """DDIM."""
    return deis(denoiser, x, times, order=0)


@torch.no_grad()
def euler(denoiser: DenoiserLike, x: Tensor, times: Tensor) -> Tensor:
    """Euler's method in t on the probability-flow ODE, dx/dt = f x + g^2 / (2 sigma) eps: no exponential integrator."""
    times, schedule = start(denoiser, x, times), denoiser.schedule
    alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    drift, noise = schedule.f(times).tolist(), (schedule.g2(times) / (2 * schedule.sigma(times))).tolist()
    model_t = model_times(times, x)
    for i, step in enumerate(times.diff().tolist()):
        x, eps = state_and_noise(denoiser, x, model_t[i], alpha[i], sigma[i])
        x = x + step * (drift[i] * x + noise[i] * eps)
    return x


@torch.no_grad()
def dpm_solver(denoiser: DenoiserLike, x: Tensor, times: Tensor) -> Tensor:
    """DPM-Solver++ (2M) as diffusers has it, at these times, for a variance-preserving schedule.

    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022, arXiv
    2211.01095.
    """
    from diffusers import DPMSolverMultistepScheduler

    times = start(denoiser, x, times)
    steps = len(times) - 1
    scheduler = DPMSolverMultistepScheduler(prediction_type="sample", final_sigmas_type="sigma_min")
    scheduler.set_timesteps(steps)
    # Its own times are integers; these levels take their place.
    scheduler.sigmas, scheduler.timesteps = denoiser.schedule.rho(times), torch.arange(steps, 0, -1)
    scheduler.set_begin_index(0)
    for label, t in zip(scheduler.timesteps, model_times(times[:-1], x), strict=True):
        x = scheduler.step(predict(denoiser, x, t, "x0"), label, x).prev_sample
    return x
