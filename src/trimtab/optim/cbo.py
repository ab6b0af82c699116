r"""Consensus-based optimization: particles that move towards their softmin-weighted mean, from function values alone.

For functions with many local minima or without a gradient, in up to some hundred dimensions, where hundreds of values
at once are cheap. On average the consensus point follows a noisy gradient step, at a distance at which small barriers
no longer show.

Particles $x^1, \dots, x^N$ contract towards the consensus point $v$, with noise as wide as their distance from it
(isotropic: its norm in every direction; anisotropic: each coordinate its own):

$$
v_\alpha = \frac{\sum_i e^{-\alpha f(x^i)}\, x^i}{\sum_i e^{-\alpha f(x^i)}}, \qquad
x^i \leftarrow x^i - \lambda\, \Delta t\, (x^i - v_\alpha) - \gamma\, \Delta t\, \nabla f(x^i)
+ \sigma \sqrt{\Delta t}\; \lVert x^i - v_\alpha \rVert\, \xi^i
$$

Consensus hopping draws all particles anew around the consensus point, $x^i = v_\alpha + \sigma \xi^i$. With infinitely
many of them its step is $-\alpha \sigma^2$ times an average of $\nabla f$, and on a quadratic exactly the minimizing
movement (proximal) step $\arg\min_z f(z) + \lVert z - v \rVert^2 / (2 \alpha \sigma^2)$.

Reference: Konstantin Riedl, Timo Klock, Carina Geldhauser, Massimo Fornasier, "Gradient is All You Need?", 2023,
arXiv 2306.09778.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

Noise = Literal["isotropic", "anisotropic"]
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
    _check_positive("consensus_point", alpha=alpha)
    _check_particles(particles)
    _check_energies("energies", particles, energies)
    return _consensus(particles, energies, alpha)


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

    Example:
        >>> cbo_step(torch.tensor([[2.0], [4.0]]), torch.tensor([0.0]), None, dt=0.25)
        tensor([[1.5000],
                [3.0000]])
    """
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
        _check_positive("CBO", alpha=alpha, dt=dt)
        _check_not_negative("CBO", lam=lam, sigma=sigma, gradient_drift=gradient_drift)
        if noise not in get_args(Noise):
            raise ValueError(f"CBO: noise must be one of {', '.join(get_args(Noise))}, got {noise!r}")
        _check_particles(particles)
        if not particles.isfinite().all():
            raise ValueError("CBO: particles must be finite")
        self.particles = particles.detach().clone()
        self.alpha, self.lam, self.sigma, self.dt = alpha, lam, sigma, dt
        self.noise: Noise = noise
        self.gradient_drift = gradient_drift
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
        consensus = _consensus(self.particles, energies, self.alpha)
        if xi is None and self.sigma > 0:
            xi = _normal(self.particles, self.generator)
        moved = cbo_step(self.particles, consensus, xi, lam=self.lam, sigma=self.sigma, dt=self.dt, noise=self.noise)
        self.particles = moved if gradient is None else moved.sub_(gradient, alpha=self.gradient_drift * self.dt)
        return consensus

    def _evaluate(self, f: Energy) -> tuple[Tensor, Tensor | None]:
        if not self.gradient_drift:
            return _check_energies("f", self.particles, f(self.particles)), None
        with torch.enable_grad():
            leaves = self.particles.detach().requires_grad_()
            energies = _check_energies("f", leaves, f(leaves))
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
        _check_not_negative("minimize", steps=steps)
        path = [self.step(f) for _ in range(steps)]
        path.append(_consensus(self.particles, _check_energies("f", self.particles, f(self.particles)), self.alpha))
        return _result(f, path, n_evals=(steps + 1) * self.particles.shape[-2] + 1)


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
        _check_positive("ConsensusHopping", alpha=alpha, **({} if callable(sigma) else {"sigma": sigma}))
        if n_particles < 1:
            raise ValueError(f"ConsensusHopping: n_particles must be at least 1, got {n_particles}")
        _check_particles(start.unsqueeze(-2), "start")
        if not start.isfinite().all():
            raise ValueError("ConsensusHopping: start must be finite")
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
        if xi is None:
            xi = _normal(around.expand(*around.shape[:-2], self.n_particles, -1), self.generator)
        particles = torch.add(around, xi.to(around), alpha=sigma)
        self.center = _consensus(particles, _check_energies("f", particles, f(particles)), self.alpha)
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
        _check_not_negative("minimize", steps=steps)
        path = [self.center, *(self.step(f) for _ in range(steps))]
        return _result(f, path, n_evals=steps * self.n_particles + 1)


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
        ValueError: `tau` is not positive, or the value is not finite where the search ended.

    Example:
        >>> minimizing_movement_step(lambda z: 0.5 * z.square().sum(), torch.tensor([3.0]), tau=0.5)
        tensor([2.])
    """
    _check_positive("minimizing_movement_step", tau=tau)
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
        raise ValueError("minimizing_movement_step: f is not finite where the search for its minimum ended")
    return z.detach()


class ParticleLoss:
    """The loss of a model as a function of particles, each of which is a vector of all its trainable parameters.

    The model runs on all particles at once (`torch.func.functional_call` under `vmap`) and is itself left as it is.
    Layers that change their buffers in training, such as batch normalisation, must be in evaluation mode.

    Args:
        model: the model; parameters that need no gradient stay fixed.
        criterion: maps the model's output and the target to a scalar.
        chunk_size: number of particles to run at once; None for all of them.

    Raises:
        ValueError: the model has no trainable parameter.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> loss = ParticleLoss(model, torch.nn.functional.mse_loss)
        >>> cbo = CBO(loss.start(50, spread=1.0, generator=torch.Generator().manual_seed(0)), alpha=50.0)
        >>> x, y = torch.randn(32, 2), torch.randn(32, 1)
        >>> consensus = cbo.step(lambda particles: loss(particles, x, y))
        >>> loss.load(consensus)
        >>> bool(torch.nn.utils.parameters_to_vector(model.parameters()).equal(consensus))
        True
    """

    def __init__(
        self, model: nn.Module, criterion: Callable[[Any, Any], Tensor], *, chunk_size: int | None = None
    ) -> None:
        self.params = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("ParticleLoss: model has no trainable parameter")
        self.model, self.criterion, self.chunk_size = model, criterion, chunk_size

    def start(
        self, n_particles: int, *, spread: float, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n d"]:
        """Particles drawn around the model's parameters, each coordinate with standard deviation `spread`."""
        if n_particles < 1:
            raise ValueError(f"ParticleLoss: n_particles must be at least 1, got {n_particles}")
        _check_not_negative("ParticleLoss", spread=spread)
        center = nn.utils.parameters_to_vector(self.params.values()).detach().expand(n_particles, -1)
        return torch.add(center, _normal(center, generator), alpha=spread)

    def __call__(self, particles: Float[Tensor, "n d"], x: Any, target: Any) -> Float[Tensor, " n"]:
        """The loss of each particle on the same batch."""

        def loss(vector: Tensor) -> Tensor:
            return self.criterion(torch.func.functional_call(self.model, self._split(vector), (x,)), target)

        losses: Tensor = torch.vmap(loss, chunk_size=self.chunk_size)(particles)
        return losses

    def load(self, vector: Float[Tensor, " d"]) -> None:
        """Writes a vector, such as the consensus point, into the model's trainable parameters."""
        with torch.no_grad():
            for p, value in zip(self.params.values(), self._split(vector).values(), strict=True):
                p.copy_(value)

    def _split(self, vector: Tensor) -> dict[str, Tensor]:
        sizes = [p.numel() for p in self.params.values()]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"particles must have {sum(sizes)} coordinates, got shape {tuple(vector.shape)}")
        parts = vector.split(sizes)
        return {name: part.view_as(p) for (name, p), part in zip(self.params.items(), parts, strict=True)}


def _consensus(particles: Tensor, energies: Tensor, alpha: float) -> Tensor:
    excess = energies.double()
    excess = excess - excess.amin(-1, keepdim=True)
    weights = torch.softmax(excess.mul_(-alpha), -1).to(particles.dtype)
    return (weights.unsqueeze(-2) @ particles).squeeze(-2)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    # Single precision is fine enough for a random walk, and drawn several times as fast as double.
    return torch.randn(like.shape, dtype=torch.float32, device=like.device, generator=generator).to(like.dtype)


def _result(f: Energy, path: list[Tensor], n_evals: int) -> ConsensusResult:
    x = path[-1]
    return ConsensusResult(x, f(x.unsqueeze(-2)).squeeze(-1), torch.stack(path), n_evals)


def _check_particles(particles: Tensor, name: str = "particles") -> None:
    if particles.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be of float32 or float64, got {particles.dtype}")
    if particles.dim() < 2 or 0 in particles.shape:
        raise ValueError(f"{name} must have shape (*runs, n, d) with n and d at least 1, got {tuple(particles.shape)}")


def _check_energies(name: str, particles: Tensor, energies: Tensor) -> Tensor:
    if energies.shape != particles.shape[:-1]:
        raise ValueError(
            f"{name} must hold one energy for each particle, shape {tuple(particles.shape[:-1])}, "
            f"got {tuple(energies.shape)}"
        )
    if not math.isfinite(float(energies.detach().sum())):  # one quick look at all of them; a sum may also overflow
        finite = energies.isfinite()
        if not finite.all():
            raise ValueError(f"{name} must be finite, but {int((~finite).sum())} of {finite.numel()} energies are not")
    return energies


def _check_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{owner}: {name} must be a positive number, got {value!r}")


def _check_not_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{owner}: {name} must be a number of at least 0, got {value!r}")
