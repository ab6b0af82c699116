r"""The samplers that others are compared with: DDIM, Euler's method and DPM-Solver++.

All solve the probability-flow ODE, $dx/dt = f x + \frac{g^2}{2\sigma}\varepsilon$, from noise down to samples, with one
evaluation a step. DDIM and DPM-Solver++ solve its linear part exactly; DPM-Solver++ extrapolates the clean prediction
linearly in $\lambda = \log(\alpha/\sigma)$ from the last two, which is the usual choice for 10 to 20 evaluations under
guidance. Heun's method, the sampler of EDM, is `deis_rk(..., method="heun")`.

References: Jiaming Song, Chenlin Meng and Stefano Ermon, "Denoising Diffusion Implicit Models", ICLR 2021, arXiv
2010.02502. Cheng Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", 2022,
arXiv 2211.01095 (Algorithm 2).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.denoiser import (
    DenoiserLike,
    StepCallback,
    after_step,
    levels,
    model_times,
    start,
    state_and_noise,
)

# A run shorter than this ends on a step of first order, as DPM-Solver++'s authors recommend.
_SHORT = 15


@torch.no_grad()
def ddim(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Sample with DDIM, deterministically: the clean prediction, with the predicted noise put back.

    Args:
        denoiser: the model with its schedule, guided or not.
        x: noise at `times[0]`, such as `schedule.prior(...)`.
        times: falling times, such as `grids.power(schedule, 50)`.
        callback: called after every step as `callback(step, time, x)`; a tensor that it returns replaces x.

    Returns:
        The sample at `times[-1]`.

    Raises:
        ValueError: for times that do not fall, or alpha = 0.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, grids, schedules
        >>> point = AnalyticGMM.isotropic(torch.tensor([[0.5, -0.5]]), std=0.0).denoiser(schedules.VPLinear())
        >>> x = ddim(point, point.schedule.prior(4, 2), grids.power(point.schedule, 2))
        >>> bool(torch.allclose(x, point.mixture.means, atol=0.1))  # one data point: any number of steps is exact
        True
    """
    times = start(denoiser, x, times)
    alpha, sigma = _alpha_sigma(denoiser, times)
    model_t = model_times(times, x)
    for i, reached in enumerate(times[1:].tolist()):
        x, eps = state_and_noise(denoiser, x, model_t[i], alpha[i], sigma[i])
        kept = alpha[i + 1] / alpha[i]
        x = after_step(callback, i, reached, kept * x + (sigma[i + 1] - kept * sigma[i]) * eps)
    return x


@torch.no_grad()
def euler(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Sample with Euler's method in t, which does not solve the linear part; otherwise as `ddim`."""
    times, schedule = start(denoiser, x, times), denoiser.schedule
    alpha, sigma = _alpha_sigma(denoiser, times)
    drift, noise = schedule.f(times).tolist(), (schedule.g2(times) / (2 * schedule.sigma(times))).tolist()
    model_t = model_times(times, x)
    for i, (step, reached) in enumerate(zip(times.diff().tolist(), times[1:].tolist(), strict=True)):
        x, eps = state_and_noise(denoiser, x, model_t[i], alpha[i], sigma[i])
        x = after_step(callback, i, reached, (1 + step * drift[i]) * x + step * noise[i] * eps)
    return x


@torch.no_grad()
def dpm_solver(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Sample with DPM-Solver++(2M), the multistep form of second order; otherwise as `ddim`.

    The first step is of first order, and so is the last of fewer than 15.
    """
    times = start(denoiser, x, times)
    alpha, sigma = _alpha_sigma(denoiser, times)
    steps = -denoiser.schedule.rho(times).log().diff()
    gains, h = (-torch.expm1(-steps)).tolist(), steps.tolist()
    model_t, last = model_times(times, x), len(h) - 1
    previous: Tensor | None = None
    for i, reached in enumerate(times[1:].tolist()):
        x, eps = state_and_noise(denoiser, x, model_t[i], alpha[i], sigma[i])
        clean = extrapolated = (x - sigma[i] * eps) / alpha[i]
        if previous is not None and (i < last or len(h) >= _SHORT):
            extrapolated = clean + h[i] / (2 * h[i - 1]) * (clean - previous)
        x = sigma[i + 1] / sigma[i] * x + alpha[i + 1] * gains[i] * extrapolated
        x, previous = after_step(callback, i, reached, x), clean
    return x


def _alpha_sigma(denoiser: DenoiserLike, times: Tensor) -> tuple[list[float], list[float]]:
    alpha, rho = levels(denoiser.schedule, times)
    return alpha.tolist(), (alpha * rho).tolist()
