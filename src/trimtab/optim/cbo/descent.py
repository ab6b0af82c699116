"""Consensus-based optimization: particles that walk towards their consensus point."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import integer, non_negative, one_of, positive, tensor_problem
from trimtab.optim.cbo.particles import (
    ConsensusResult,
    Energy,
    check_energies,
    check_particles,
    normal,
    result,
    weighted_mean,
)

Noise = Literal["isotropic", "anisotropic"]


def cbo_step(
    particles: Float[Tensor, "*runs n d"],
    consensus: Float[Tensor, "*runs d"],
    xi: Float[Tensor, "*runs n d"] | None,
    *,
    lam: float = 1.0,
    sigma: float = 1.6,
    dt: float = 0.01,
    noise: Noise = "isotropic",
) -> Float[Tensor, "*runs n d"]:
    """One Euler-Maruyama step of all particles towards their consensus point, without the gradient drift.

    Args:
        particles: (*runs, n, d).
        consensus: (*runs, d), the consensus point of these particles.
        xi: standard normal numbers like the particles; None for no noise.
        lam: rate of contraction.
        sigma: strength of the noise.
        dt: length of the step.
        noise: "isotropic" or "anisotropic".

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `lam`, `sigma` or `dt` is negative or not finite, or the shapes do not fit.

    Example:
        >>> cbo_step(torch.tensor([[2.0], [4.0]]), torch.tensor([0.0]), None, dt=0.25)
        tensor([[1.5000],
                [3.0000]])
    """
    if problem := tensor_problem(particles=particles, consensus=consensus, xi=xi):
        raise TypeError(problem)
    if not (0 <= lam < math.inf and 0 <= sigma < math.inf and 0 <= dt < math.inf):
        raise ValueError(f"lam, sigma and dt must be at least 0 and finite, got {lam}, {sigma} and {dt}")
    if consensus.shape != (*particles.shape[:-2], particles.shape[-1]):
        raise ValueError(
            f"consensus must be a point of particles {tuple(particles.shape)}, got shape {tuple(consensus.shape)}"
        )
    drift = particles - consensus.unsqueeze(-2)
    if xi is None or sigma == 0:
        return particles.sub(drift, alpha=lam * dt)
    spread = drift if noise == "anisotropic" else torch.linalg.vector_norm(drift, dim=-1, keepdim=True)
    moved = torch.addcmul(particles, spread, xi.to(particles), value=sigma * math.sqrt(dt))
    return moved.sub_(drift, alpha=lam * dt)


class CBO:
    """Minimises a function of vectors by consensus among particles.

    Several runs at once, each with particles of its own, are a matter of a leading axis. The spread of the noise
    decides how far particles explore: isotropic noise grows with the dimension, so that from about ten dimensions on
    anisotropic noise, with a larger `sigma`, is the better choice.

    Args:
        particles: (*runs, n, d), where the particles start; copied.
        alpha: how strongly the consensus point leans to the best particles, positive.
        lam: rate at which particles contract towards it, at least 0.
        sigma: strength of the noise, at least 0.
        dt: length of a step, positive.
        noise: "isotropic" or "anisotropic".
        gradient_drift: weight of each particle's own gradient step, at least 0; above 0 the function must be
            differentiable by autograd, and act on each particle alone.
        generator: where the noise is drawn from, on the particles' device.

    Attributes:
        particles: where they are now.

    Raises:
        TypeError: the particles are not floating point numbers of single or double precision.
        ValueError: an argument is out of its range, or there is no particle.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> start = 4 + torch.randn(200, 2, generator=generator)
        >>> rastrigin = lambda x: (x**2 + 2.5 * (1 - torch.cos(2 * torch.pi * x))).sum(-1)
        >>> result = CBO(start, alpha=1e3, generator=generator).minimize(rastrigin, steps=500)
        >>> bool(result.x.abs().max() < 0.1), result.n_evals
        (True, 100201)
    """

    def __init__(
        self,
        particles: Float[Tensor, "*runs n d"],
        *,
        alpha: float = 100.0,
        lam: float = 1.0,
        sigma: float = 1.6,
        dt: float = 0.01,
        noise: Noise = "isotropic",
        gradient_drift: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.alpha, self.dt = positive("alpha", alpha), positive("dt", dt)
        self.lam, self.sigma = non_negative("lam", lam), non_negative("sigma", sigma)
        self.gradient_drift = non_negative("gradient_drift", gradient_drift)
        self.noise: Noise = one_of("noise", noise, get_args(Noise))
        check_particles(particles)
        self.particles = particles.detach().clone()
        self.generator = generator

    @torch.no_grad()
    def step(self, f: Energy, xi: Float[Tensor, "*runs n d"] | None = None) -> Float[Tensor, "*runs d"]:
        """Moves all particles once.

        Args:
            f: maps particles (*runs, n, d) to energies (*runs, n).
            xi: the standard normal numbers of the step; drawn if not given.

        Returns:
            The consensus point of the particles before they moved, (*runs, d).

        Raises:
            ValueError: the energies' shape does not fit, or one of them is not finite; no particle has moved then.
        """
        energies, gradient = self._evaluate(f)
        consensus = weighted_mean(self.particles, energies, self.alpha)
        if xi is None and self.sigma > 0:
            xi = normal(self.particles, self.generator)
        moved = cbo_step(self.particles, consensus, xi, lam=self.lam, sigma=self.sigma, dt=self.dt, noise=self.noise)
        self.particles = moved if gradient is None else moved.sub_(gradient, alpha=self.gradient_drift * self.dt)
        return consensus

    def _evaluate(self, f: Energy) -> tuple[Tensor, Tensor | None]:
        if not self.gradient_drift:
            return check_energies("f", self.particles, f(self.particles)), None
        with torch.enable_grad():
            leaves = self.particles.detach().requires_grad_()
            energies = check_energies("f", leaves, f(leaves))
            (gradient,) = torch.autograd.grad(energies.sum(), leaves)
        return energies.detach(), gradient

    @torch.no_grad()
    def minimize(self, f: Energy, steps: int) -> ConsensusResult:
        """Takes a number of steps, and the consensus point after them.

        Args:
            f: maps particles (*runs, n, d) to energies (*runs, n).
            steps: at least 0.

        Raises:
            ValueError: `steps` is negative, or the energies are not as they should be.
        """
        integer("steps", steps, 0)
        path = [self.step(f) for _ in range(steps)]
        path.append(weighted_mean(self.particles, check_energies("f", self.particles, f(self.particles)), self.alpha))
        return result(f, path, n_evals=(steps + 1) * self.particles.shape[-2] + 1)
