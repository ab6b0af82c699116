"""The prior of latent series: independent steps, or a Gaussian process in time."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.ops.arguments import positive, real_problem


def cauchy_kernel(times: Float[Tensor, " steps"], length_scale: float) -> Float[Tensor, "steps steps"]:
    r"""Covariances $1.005 / (1 + (t - t')^2 / \ell^2)$ of a smooth latent process, and 0.001 more on the diagonal.

    Example:
        >>> cauchy_kernel(torch.tensor([0.0, 7.0]), length_scale=7.0)
        tensor([[1.0060, 0.5025],
                [0.5025, 1.0060]])
    """
    if problem := real_problem(times=times):
        raise TypeError(problem)
    gap = (times[:, None] - times[None, :]) / positive("length_scale", length_scale)
    return 1.005 / (1 + gap.square()) + 1e-3 * torch.eye(len(times), dtype=times.dtype, device=times.device)


def latent_log_prob(
    z: Float[Tensor, "*samples batch steps dim"],
    valid: Bool[Tensor, "batch steps"],
    times: Float[Tensor, " steps"],
    length_scale: float | None = None,
) -> Float[Tensor, "*samples batch"]:
    """Log-density of latent series under the prior, steps past a series' end left out.

    Args:
        z: latents; each of their dimensions is an independent process.
        valid: which steps a series has.
        times: of the steps.
        length_scale: of a Gaussian process with Cauchy's kernel; None for independent standard normal steps.

    Example:
        >>> latent_log_prob(torch.zeros(1, 2, 1), torch.ones(1, 2, dtype=torch.bool), torch.arange(2.0))
        tensor([-1.8379])
    """
    if problem := real_problem(z=z, valid=valid, times=times):
        raise TypeError(problem)
    z = torch.where(valid[:, :, None], z, 0)
    constant = valid.sum(1) * z.shape[-1] * math.log(2 * math.pi)
    if length_scale is None:
        return -0.5 * (z.square().sum((-2, -1)) + constant)
    both = valid[:, :, None] & valid[:, None, :]
    identity = torch.eye(len(times), dtype=z.dtype, device=z.device)
    factor = torch.linalg.cholesky(torch.where(both, cauchy_kernel(times, length_scale).to(z), identity))
    whitened: Tensor = torch.linalg.solve_triangular(factor, z, upper=False)
    half_log_det: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (whitened.square().sum((-2, -1)) + constant) - z.shape[-1] * half_log_det
