"""The paper's stochastic sampler."""

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


@torch.no_grad()
def stochastic_ddim(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    r"""Sample with the paper's stochastic sampler: two steps down with one evaluation, then one back up by noise.

    The model makes steps of twice the length, from every time; so it is one that `GuidedDistillation` trained after
    `halve(stochastic=True)`, whose `sampling_times` are the `times` here. The last step is a single DDIM step.

    Args:
        denoiser: the model with its schedule, such as `DistilledGuidance(student, cond, scale)`; one evaluation a step.
        x: noise at `times[0]`.
        times: falling times.
        generator: decides the noise.
        callback: called after every step as `callback(step, time, x)`; a tensor that it returns replaces x.

    Returns:
        The sample at `times[-1]`.

    Raises:
        ValueError: for times that do not fall, or alpha = 0.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, VPLinear, grids
        >>> point = AnalyticGMM.isotropic(torch.tensor([[0.5, -0.5]]), std=0.0).denoiser(VPLinear())
        >>> x = stochastic_ddim(point, point.schedule.prior(4, 2), grids.power(point.schedule, 4))
        >>> bool(torch.allclose(x, point.mixture.means, atol=0.1))
        True
    """
    times = start(denoiser, x, times)
    factors, noise_levels = levels(denoiser.schedule, times)
    alpha, sigma = factors.tolist(), (factors * noise_levels).tolist()
    model_t, last = model_times(times, x), len(times) - 1
    for i in range(last):
        x, eps = state_and_noise(denoiser, x, model_t[i], alpha[i], sigma[i])
        clean, low = (x - sigma[i] * eps) / alpha[i], min(i + 2, last)
        x = alpha[low] * clean + sigma[low] * eps
        if low > i + 1:
            kept = alpha[i + 1] / alpha[low]
            added = max(sigma[i + 1] ** 2 - (kept * sigma[low]) ** 2, 0.0) ** 0.5
            x = kept * x + added * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = after_step(callback, i, times[i + 1].item(), x)
    return x
