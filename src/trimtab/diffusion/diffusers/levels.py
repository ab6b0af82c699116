"""The noise levels of diffusers' models: betas, their rescaling to zero terminal SNR, and the kinds of prediction."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from trimtab.diffusion.prediction import Prediction
from trimtab.ops.arguments import one_of

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["linspace", "leading", "trailing", "quadratic"]

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


def betas(
    num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str, trained_betas: list[float] | None
) -> Tensor:
    """The betas of diffusers' usual settings, in float64."""
    one_of("beta_schedule", beta_schedule, get_args(BetaSchedule))
    if trained_betas is not None:
        return torch.as_tensor(trained_betas, dtype=torch.float64)
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    time = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    alpha2 = torch.cos((time + 0.008) / 1.008 * (math.pi / 2)) ** 2
    return (1 - alpha2[1:] / alpha2[:-1]).clamp(max=0.999)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last time is pure noise, by Algorithm 1 of Lin et al., 2024 (arXiv 2305.08891).

    The root of alpha^2 is shifted to end at 0 and stretched to begin where it did. The very last level is kept just
    above 0, at most 2^-24 as in diffusers and below the level before it, so that it has a finite noise level.
    """
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    alpha2 = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    alpha2[-1] = min(2.0**-24, float(alpha2[-2]) / 4)
    return 1 - torch.cat([alpha2[:1], alpha2[1:] / alpha2[:-1]])
