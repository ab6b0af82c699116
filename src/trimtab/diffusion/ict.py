r"""iCT: consistency training straight from data, without a moving-average teacher and without a learned distance.

For one- and two-step generators when there is no diffusion model to distil. The teacher is the student itself without
gradient, the distance pseudo-Huber, noise levels are drawn from a discretised lognormal, and their number doubles in
stages of the training:

$$
\mathcal{L} = \mathbb{E}\ \frac{1}{\sigma_{i+1} - \sigma_i}
\Bigl( \sqrt{\|f_\theta(x + \sigma_{i+1} z, \sigma_{i+1}) - \mathrm{sg} f_\theta(x + \sigma_i z, \sigma_i)\|^2 + c^2}
- c \Bigr),
$$

$$
p(i) \propto \operatorname{erf}\frac{\log\sigma_{i+1} - P_m}{\sqrt2 P_s}
- \operatorname{erf}\frac{\log\sigma_i - P_m}{\sqrt2 P_s}, \qquad
N(k) = \min\bigl(s_0 2^{\lfloor k/K' \rfloor}, s_1\bigr) + 1, \quad
K' = \Bigl\lfloor \frac{K}{\log_2\lfloor s_1/s_0\rfloor + 1} \Bigr\rfloor .
$$

Reference: Yang Song and Prafulla Dhariwal, "Improved Techniques for Training Consistency Models", ICLR 2024, arXiv
2310.14189.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from trimtab.diffusion.consistency import Distance, neighbours, noise_levels, pseudo_huber
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.schedules import EDM
from trimtab.ops.arguments import integer, looked_at, number, positive, real_problem


def doubling_levels(step: int, total_steps: int, s0: int = 10, s1: int = 1280) -> int:
    """N(k), how many noise levels there are at a step: s0 + 1 at first, doubled in equal stages up to s1 + 1.

    Args:
        step: k, from 0.
        total_steps: K.
        s0: intervals at first.
        s1: intervals at last, at least `s0`.

    Raises:
        ValueError: `step` is outside [0, total_steps), or `s1` is below `s0`.

    Example:
        >>> [doubling_levels(50_000 * stage, 400_000) for stage in range(8)]
        [11, 21, 41, 81, 161, 321, 641, 1281]
    """
    integer("step", step, 0, integer("total_steps", total_steps) - 1)
    integer("s1", s1, integer("s0", s0))
    stage = max(1, math.floor(total_steps / (math.log2(s1 // s0) + 1)))
    return int(min(s0 * 2 ** (step // stage), s1)) + 1


def lognormal_shares(
    levels: Float[Tensor, " levels"], mean: float = -1.1, std: float = 2.0
) -> Float64[Tensor, " levels-1"]:
    """The probability of each pair of neighbouring levels: that a lognormal level falls between them.

    Args:
        levels: rising noise levels.
        mean, std: of the logarithm.

    Raises:
        TypeError: `levels` is no real tensor.
        ValueError: `std` is not positive, or `levels` are fewer than 2 or do not rise from above 0.

    Example:
        >>> lognormal_shares(torch.tensor([0.1, 1.0, 10.0]), mean=0.0, std=1.0)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    number("mean", mean)
    if not isinstance(levels, Tensor):
        raise TypeError(f"levels must be a tensor, got {type(levels).__name__}")
    if levels.is_complex():
        raise TypeError(f"levels must be real, got {levels.dtype}")
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(f"levels must be a vector of at least 2, got shape {tuple(levels.shape)}")
    if looked_at(levels) and not bool((levels.diff() > 0).all() & (levels[0] > 0)):
        raise ValueError("levels must rise from above 0, got others")
    below = torch.erf((levels.double().log() - mean) / (math.sqrt(2) * positive("std", std)))
    shares = below.diff()
    return shares / shares.sum()


class ImprovedConsistencyTraining:
    """The loss of iCT, for the user's own loop: `loss = training(x0, step, cond)`.

    It holds no state beyond its arguments: what a step needs to know is its number. For evaluation, average the weights
    (the authors' rate is 0.99993); the average is no teacher.

    Args:
        function: a consistency function on the EDM schedule, such as `ConsistencyPreconditioned(network)`, called
            `function(x, t, ...)`.
        total_steps: K, the length of the training.
        s0, s1: intervals of the discretisation at first and at last. 1280 belongs to 400,000 steps; short trainings
            need fewer.
        p_mean, p_std: of the logarithm of the noise levels.
        c: scale of the pseudo-Huber distance; None is 0.00054 times the root of the dimension.
        distance: another distance per sample, called `distance(a, b, c)`.

    Raises:
        TypeError: `function` is not on the EDM schedule, whose time is the noise level.
        ValueError: a number is out of its range.

    Example:
        >>> from trimtab.diffusion import ConsistencyPreconditioned
        >>> from trimtab.nets import DenoisingMLP
        >>> function = ConsistencyPreconditioned(DenoisingMLP(2, hidden=16))
        >>> training = ImprovedConsistencyTraining(function, total_steps=100, s1=40)
        >>> loss = training(torch.randn(8, 2), step=0)
        >>> loss.backward()
    """

    def __init__(
        self,
        function: DenoiserLike,
        total_steps: int,
        *,
        s0: int = 10,
        s1: int = 1280,
        p_mean: float = -1.1,
        p_std: float = 2.0,
        c: float | None = None,
        distance: Distance = pseudo_huber,
    ) -> None:
        if not isinstance(getattr(function, "schedule", None), EDM):
            raise TypeError(
                "function must be on the EDM schedule, such as ConsistencyPreconditioned, "
                f"got {type(function).__name__}"
            )
        doubling_levels(0, total_steps, s0, s1)  # refuses what does not fit
        self.function, self.total_steps, self.s0, self.s1 = function, total_steps, s0, s1
        self.p_mean, self.p_std = number("p_mean", p_mean), positive("p_std", p_std)
        self.c = None if c is None else positive("c", c)
        self.distance = distance

    def levels(self, step: int) -> Float64[Tensor, " levels"]:
        """The rising noise levels at a step."""
        return noise_levels(self.function.schedule, doubling_levels(step, self.total_steps, self.s0, self.s1))  # type: ignore[arg-type]

    def draw(
        self, levels: Float[Tensor, " levels"], count: int, generator: torch.Generator | None = None
    ) -> Int[Tensor, " count"]:
        """The lower index of so many pairs of neighbouring levels; `generator` is on the CPU."""
        if count < 1:
            raise ValueError("x0 must have at least one sample, got none")
        shares = lognormal_shares(levels, self.p_mean, self.p_std)
        return torch.multinomial(shares, count, replacement=True, generator=generator)

    def __call__(
        self,
        x0: Float[Tensor, "batch ..."],
        step: int,
        *further: Any,
        noise: Float[Tensor, "batch ..."] | None = None,
        index: Int[Tensor, " batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            x0: clean samples.
            step: k, from 0.
            *further: what the function takes beside x and t, such as a class.
            noise: what is drawn where it is not given: standard normal, of the shape of `x0`.
            index: likewise: lower indices of pairs of levels, below `len(levels(step)) - 1`.
            generator: decides the draws, on the CPU.

        Raises:
            ValueError: `step` is out of its range, or a shape does not fit.
        """
        if problem := real_problem(x0=x0):
            raise TypeError(problem)
        levels = self.levels(step)
        low, high = level_pairs(levels, self.draw(levels, len(x0), generator) if index is None else index, x0)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device) if noise is None else noise
        student, target = neighbours(self.function, x0, noise, low, high, *further)
        c = 0.00054 * math.sqrt(x0[0].numel()) if self.c is None else self.c
        return (self.distance(student, target, c) / (high - low)).mean()


def level_pairs(levels: Float[Tensor, " levels"], index: Int[Tensor, " batch"], x0: Tensor) -> tuple[Tensor, Tensor]:
    """The two neighbouring levels of each sample, as the function takes them.

    Raises:
        TypeError: `index` is no tensor of integers, or `x0` not floating point.
        ValueError: `index` is not one per sample, or outside the pairs of levels.
    """
    if not isinstance(index, Tensor):
        raise TypeError(f"index must be a tensor, got {type(index).__name__}")
    if index.is_floating_point():
        raise TypeError(f"index must be integers, got {index.dtype}")
    if not x0.is_floating_point():
        raise TypeError(f"x0 must be floating point, got {x0.dtype}")
    if index.shape != x0.shape[:1]:
        raise ValueError(f"index must have shape ({len(x0)},), one per sample, got {tuple(index.shape)}")
    if looked_at(index) and not bool(((index >= 0) & (index < len(levels) - 1)).all()):
        raise ValueError(f"index must be in [0, {len(levels) - 1}), got from {int(index.min())} to {int(index.max())}")
    kind = torch.promote_types(x0.dtype, torch.float32)
    return levels[index].to(x0.device, kind), levels[index + 1].to(x0.device, kind)
