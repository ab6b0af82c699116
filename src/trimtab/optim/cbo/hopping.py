"""Consensus hopping: particles drawn anew around each consensus point, and the proximal step that it follows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import finite_tensor, integer, positive, tensor_problem
from trimtab.optim.cbo.particles import (
    ConsensusResult,
    Energy,
    check_energies,
    check_particles,
    normal,
    result,
    weighted_mean,
)


class ConsensusHopping:
    """Minimises a function of vectors by jumping from one consensus point to the next.

    Its steps are those of gradient descent with a learning rate of about `alpha * sigma**2`, on a function smoothed
    over a width of `sigma`, and disturbed by noise that falls with the number of particles.

    Args:
        start: (*runs, d), around which the first particles are drawn; copied.
        n_particles: number of particles, at least 1.
        alpha: how strongly the consensus point leans to the best particles, positive.
        sigma: standard deviation of the particles around the consensus point, positive; or a function that gives it for
            each step 0, 1, …, such as `lambda step: 0.7 * 0.98 ** (step // 100)`.
        generator: where the particles are drawn from, on the start's device.

    Attributes:
        center: the latest consensus point.

    Raises:
        TypeError: the start is not of floating point numbers of single or double precision.
        ValueError: an argument is out of its range.

    Example:
        >>> hopping = ConsensusHopping(
        ...     torch.tensor([3.0, -2.0]), alpha=10.0, sigma=0.3, generator=torch.Generator().manual_seed(0)
        ... )
        >>> result = hopping.minimize(lambda x: x.square().sum(-1), steps=20)
        >>> bool(result.x.norm() < 0.1)
        True
    """

    def __init__(
        self,
        start: Float[Tensor, "*runs d"],
        *,
        n_particles: int = 200,
        alpha: float = 100.0,
        sigma: float | Callable[[int], float] = 0.7,
        generator: torch.Generator | None = None,
    ) -> None:
        if problem := tensor_problem(start=start):
            raise TypeError(problem)
        positive("alpha", alpha)
        if not callable(sigma):
            positive("sigma", sigma)
        integer("n_particles", n_particles)
        check_particles(start.unsqueeze(-2), "start")
        self.center = start.detach().clone()
        self.n_particles, self.alpha, self.sigma = n_particles, alpha, sigma
        self.generator = generator
        self.steps = 0

    @torch.no_grad()
    def step(self, f: Energy, xi: Float[Tensor, "*runs n d"] | None = None) -> Float[Tensor, "*runs d"]:
        """Draws particles around the consensus point and moves it to theirs.

        Args:
            f: maps particles (*runs, n, d) to energies (*runs, n).
            xi: the standard normal numbers of the step; drawn if not given.

        Returns:
            The new consensus point, (*runs, d).

        Raises:
            ValueError: the energies' shape does not fit, or one of them is not finite; nothing has moved then.
        """
        sigma = self.sigma(self.steps) if callable(self.sigma) else self.sigma
        around = self.center.unsqueeze(-2)
        before = None if self.generator is None else self.generator.get_state()
        try:
            if xi is None:
                xi = normal(around.expand(*around.shape[:-2], self.n_particles, -1), self.generator)
            particles = torch.add(around, xi.to(around), alpha=sigma)
            self.center = weighted_mean(particles, check_energies("f", particles, f(particles)), self.alpha)
        except Exception:  # a refused step draws nothing
            if self.generator is not None and before is not None:
                self.generator.set_state(before)
            raise
        self.steps += 1
        return self.center

    @torch.no_grad()
    def minimize(self, f: Energy, steps: int) -> ConsensusResult:
        """Takes a number of steps.

        Args:
            f: maps particles (*runs, n, d) to energies (*runs, n).
            steps: at least 0.

        Raises:
            ValueError: `steps` is negative, or the energies are not as they should be.
        """
        integer("steps", steps, 0)
        path = [self.center, *(self.step(f) for _ in range(steps))]
        return result(f, path, n_evals=steps * self.n_particles + 1)


def minimizing_movement_step(
    f: Callable[[Float[Tensor, " d"]], Float[Tensor, ""]],
    x: Float[Tensor, " d"],
    tau: float,
    *,
    max_iter: int = 200,
) -> Float[Tensor, " d"]:
    """The step that consensus hopping follows with `tau = alpha * sigma**2`: `argmin_z f(z) + |z - x|^2 / (2 tau)`.

    Found by L-BFGS from `x`; where the sum is not convex, it is the minimum reached from there.

    Args:
        f: maps a vector to a scalar, differentiable by autograd.
        x: (d,).
        tau: positive.
        max_iter: most iterations of L-BFGS.

    Raises:
        TypeError: `x` is no floating-point vector, or `max_iter` no integer.
        ValueError: `tau` is not positive, `max_iter` is below 1, or `x`, or the value where the search ended, is not
            finite.

    Example:
        >>> minimizing_movement_step(lambda z: 0.5 * z.square().sum(), torch.tensor([3.0]), tau=0.5)
        tensor([2.])
    """
    positive("tau", tau)
    if integer("max_iter", max_iter) < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if finite_tensor("x", x, ndim=1, floating=True) is not x:
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    z = x.detach().clone().requires_grad_()
    accuracy = torch.finfo(x.dtype).eps
    search = torch.optim.LBFGS(
        [z], max_iter=max_iter, tolerance_grad=accuracy, tolerance_change=accuracy**2, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        with torch.enable_grad():
            value = f(z) + (z - x.detach()).square().sum() / (2 * tau)
            value.backward()
        return value.detach()

    search.step(closure)
    if not closure().isfinite():
        raise ValueError("f must be finite where the search for its minimum ends, got NaN or infinity")
    return z.detach()
