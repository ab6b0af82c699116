"""The stochastically extended adversary: it picks a distribution each round, and the loss is drawn from that."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import non_negative, real_problem, tensor_problem
from trimtab.optim.domains import Domain


class SEAEnvironment:
    r"""Quadratic losses $f_t(x) = \frac12 \lVert x - c_t \rVert^2$ around centres that are a path plus noise.

    The noise $c_t - m_t$ is uniform on a sphere of radius `sigma`, and gradients differ from one another by the same
    vector wherever they are taken, so that both quantities that the regret depends on are known exactly. Losses are
    1-strongly convex and 1-smooth. From Sachs, Hadiji, van Erven and Guzmán, "Between Stochastic and Adversarial Online
    Convex Optimization", NeurIPS 2022.

    Args:
        means: (T, *batch, n) the adversary's path $m_t$; leading dimensions after the first are independent games.
        sigma: radius of the noise, at least 0.
        generator: draws the noise.
        noise: (T, *batch, n) the noise itself, instead of drawing it.

    Attributes:
        centers: (T, *batch, n).
        stochastic_variance: $\sigma_{1:T}^2 = \sum_t \max_x \mathbb{E} \lVert \nabla f_t(x) - \nabla F_t(x) \rVert^2$.
        adversarial_variation: (*batch,) $\Sigma_{1:T}^2 = \sum_{t \ge 2} \max_x \lVert \nabla F_t(x) -
            \nabla F_{t-1}(x) \rVert^2$.

    Raises:
        ValueError: `sigma` is negative or not finite, `means` or `noise` is not finite, or shapes do not fit.

    Example:
        >>> still = SEAEnvironment(torch.zeros(100, 3), sigma=0.5, generator=torch.Generator().manual_seed(0))
        >>> still.stochastic_variance, still.adversarial_variation.item()
        (25.0, 0.0)
        >>> round(still.loss(7, torch.zeros(3)).item(), 4)
        0.125
    """

    def __init__(
        self,
        means: Float[Tensor, "T *batch n"],
        sigma: float,
        *,
        generator: torch.Generator | None = None,
        noise: Float[Tensor, "T *batch n"] | None = None,
    ) -> None:
        if problem := tensor_problem(means=means, noise=noise):
            raise TypeError(problem)
        if means.dim() < 2:
            raise ValueError(f"means must have shape (T, *batch, n), got {tuple(means.shape)}")
        non_negative("sigma", sigma)
        if noise is None:
            normal = torch.randn(means.shape, dtype=means.dtype, device=means.device, generator=generator)
            noise = sigma * normal / normal.norm(dim=-1, keepdim=True)
        if noise.shape != means.shape:
            raise ValueError(f"noise must have shape {tuple(means.shape)}, got {tuple(noise.shape)}")
        if not (means.isfinite().all() and noise.isfinite().all()):
            raise ValueError("means and noise must be finite, got NaN or infinity")
        self.centers = means + noise
        self.stochastic_variance = len(means) * sigma**2
        self.adversarial_variation = means.diff(dim=0).square().sum((0, -1))

    def __len__(self) -> int:
        return len(self.centers)

    def loss(self, t: int, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
        """The loss of round `t`, counted from 0."""
        if problem := real_problem(x=x):
            raise TypeError(problem)
        return 0.5 * (x - self.centers[t]).square().sum(-1)

    def gradient(self, t: int, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """Its gradient."""
        return x - self.centers[t]

    def best_fixed(self, domain: Domain, rounds: int | None = None) -> Float[Tensor, "*batch n"]:
        """The point of a domain with the Euclidean mirror map that is best over the first `rounds`, all by default."""
        return domain.project(self.centers[:rounds].mean(0))
