"""Particles and their energies: the mean that they are drawn to, and what they must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import positive, tensor_problem

Energy = Callable[[Float[Tensor, "*runs n d"]], Float[Tensor, "*runs n"]]


@dataclass(frozen=True)
class ConsensusResult:
    """Where a minimisation ended.

    Attributes:
        x: (*runs, d), the last consensus point.
        fun: (*runs,), its value.
        path: (steps + 1, *runs, d), all consensus points; of consensus hopping, the start comes first.
        n_evals: values of the function taken in each run; gradients are not counted.
    """

    x: Float[Tensor, "*runs d"]
    fun: Float[Tensor, "*runs"]
    path: Float[Tensor, "points *runs d"]
    n_evals: int


def consensus_point(
    particles: Float[Tensor, "*runs n d"], energies: Float[Tensor, "*runs n"], alpha: float
) -> Float[Tensor, "*runs d"]:
    """The mean of the particles with weights `exp(-alpha * energies)`, computed in float64.

    Args:
        particles: (*runs, n, d).
        energies: (*runs, n), finite.
        alpha: positive: small for the plain mean, large for the best particle.

    Raises:
        ValueError: `alpha` is not positive, a shape does not fit, or an energy is not finite.

    Example:
        >>> consensus_point(torch.tensor([[0.0], [1.0]]), torch.tensor([7.0, 7.0]), alpha=100.0)
        tensor([0.5000])
    """
    positive("alpha", alpha)
    check_particles(particles)
    check_energies("energies", particles, energies)
    return weighted_mean(particles, energies, alpha)


def weighted_mean(particles: Tensor, energies: Tensor, alpha: float) -> Tensor:
    """`consensus_point` without its checks."""
    excess = energies.double()
    excess = excess - excess.amin(-1, keepdim=True)
    weights = torch.softmax(excess.mul_(-alpha), -1).to(particles.dtype)
    return (weights.unsqueeze(-2) @ particles).squeeze(-2)


def normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in the shape of a tensor."""
    # Single precision is fine enough for a random walk, and drawn several times as fast as double.
    return torch.randn(like.shape, dtype=torch.float32, device=like.device, generator=generator).to(like.dtype)


def result(f: Energy, path: list[Tensor], n_evals: int) -> ConsensusResult:
    """What a minimisation gives back, from its consensus points."""
    x = path[-1]
    return ConsensusResult(x, f(x.unsqueeze(-2)).squeeze(-1), torch.stack(path), n_evals)


def check_particles(particles: Tensor, name: str = "particles") -> None:
    """Refuses what are no particles: (*runs, n, d), finite numbers of single or double precision."""
    if problem := tensor_problem(particles=particles):
        raise TypeError(problem)
    if particles.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be of float32 or float64, got {particles.dtype}")
    if particles.dim() < 2 or 0 in particles.shape:
        raise ValueError(f"{name} must have shape (*runs, n, d) with n and d at least 1, got {tuple(particles.shape)}")
    if not particles.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_energies(name: str, particles: Tensor, energies: Tensor) -> Tensor:
    """Refuses energies that are not one finite number a particle, and gives them back."""
    if problem := tensor_problem(energies=energies):
        raise TypeError(problem)
    if energies.shape != particles.shape[:-1]:
        raise ValueError(
            f"{name} must hold one energy for each particle, shape {tuple(particles.shape[:-1])}, "
            f"got {tuple(energies.shape)}"
        )
    if not math.isfinite(float(energies.detach().sum())):  # one quick look at all of them; a sum may also overflow
        finite = energies.isfinite()
        if not finite.all():
            raise ValueError(
                f"{name} must be finite, got {int((~finite).sum())} of {finite.numel()} energies that are not"
            )
    return energies
