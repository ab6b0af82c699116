r"""sLCT: consistency training that survives the outliers of latent spaces.

For one- and two-step generators in the latent space of an autoencoder, where a few latents have impulsive values and
iCT's distance, which grows without bound, follows them. To iCT it adds a Cauchy distance whose scale shrinks as the
discretisation grows finer, a denoising term at small noise, optimal-transport pairing of data and noise, and layer
norms without a scale:

$$
\rho_c(r) = \log\Bigl(1 + \frac{\|r\|^2}{2c^2}\Bigr), \qquad c_k = e^{-1.18\log(N(k) - 1) - 0.72},
$$

$$
\mathcal{L} = \mathbb{E}\ \frac{
\rho_{c_k}\bigl(f_\theta(x_{i+1}, \sigma_{i+1}) - \mathrm{sg} f_\theta(x_i, \sigma_i)\bigr)}{\sigma_{i+1} - \sigma_i}
+ \lambda\, \mathbb{E}_{i + 1 \le N/4}\
\Bigl(\frac{1}{\sigma_{i+1}^2} + \frac{1}{\sigma_d^2}\Bigr) \frac{1}{d} \|f_\theta(x_{i+1}, \sigma_{i+1}) - x\|^2 .
$$

$c_k$ is a size per number: the authors take the mean of squares where iCT takes the sum, so that here, where the norm
goes over all d numbers, it is multiplied by $\sqrt d$. A path moves each number by about 0.5, the standard deviation,
in $N - 1$ intervals, which is what $e^{-0.72}(N - 1)^{-1.18}$ says. A scale far below the size of the differences is
no small matter: the distance then rewards a function that stands still at most levels and jumps at a few.

The form of the terms, the quarter and the weight of 5 are those of the authors' training code, as it was some months
before the paper's last version; the paper's text was not at hand for the constants of $c_k$. Those of the code, -1.15
and -0.85, give a scale within 7 % of this one at 11 to 641 levels; at the first 11 levels the code has 3.45 in its
place, which makes the distance a square.

Reference: Quan Dao, Khanh Doan, Di Liu, Trung Le and Dimitris Metaxas, "Improved Training Technique for Latent
Consistency Models", ICLR 2025, arXiv 2502.01441.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.diffusion.consistency import Distance, cauchy, neighbours
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.ict import ImprovedConsistencyTraining, level_pairs
from trimtab.diffusion.immiscible import assign_noise
from trimtab.ops.arguments import in_range, integer, non_negative, number, positive, real_problem


def adaptive_scale(levels: int, slope: float = -1.18, offset: float = -0.72) -> float:
    """c per number for so many noise levels: exp(slope log(levels - 1) + offset), smaller as neighbours come closer.

    Raises:
        ValueError: `levels` is below 2.

    Example:
        >>> round(adaptive_scale(11), 5)
        0.03216
    """
    integer("levels", levels, 2)
    return math.exp(number("slope", slope) * math.log(levels - 1) + number("offset", offset))


class NonScalingLayerNorm(nn.Module):
    """Layer normalisation with a learnt shift and no learnt scale, so that no feature can be amplified.

    Args:
        dim: features, the last dimension of the input.
        eps: added to the variance.

    Raises:
        ValueError: `dim` or `eps` is not positive.

    Example:
        >>> NonScalingLayerNorm(2)(torch.tensor([[-3.0, 3.0]])).round(decimals=3)
        tensor([[-1.,  1.]], grad_fn=<RoundBackward1>)
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(integer("dim", dim)))
        self.eps = positive("eps", eps)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        bias = self.bias.to(x.dtype)  # the kernel has no gradient for two types, as autocast would give it
        return nn.functional.layer_norm(x, self.bias.shape, bias=bias, eps=self.eps)


def transport_pairing(x0: Float[Tensor, "batch ..."], noise: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Noise paired with the batch by optimal transport of squared distances."""
    return assign_noise(x0, noise, metric="sqeuclidean")


class LatentConsistencyTraining(ImprovedConsistencyTraining):
    """The loss of sLCT, for the user's own loop: `loss = training(z0, step, cond)`.

    Latents should be scaled to the standard deviation that the function takes as that of its data, and the network
    should have `NonScalingLayerNorm`. With `distance=pseudo_huber`, a fixed `scale`, no denoising term and no pairing
    it is iCT.

    Args:
        function: a consistency function on the EDM schedule.
        total_steps: K, the length of the training.
        s0, s1: intervals of the discretisation at first and at last.
        p_mean, p_std: of the logarithm of the noise levels.
        distance: per sample, called `distance(a, b, c)`.
        scale: c from the number of levels; None is `adaptive_scale` times the root of the dimension.
        diffusion_weight: of the denoising term.
        diffusion_share: the share of the levels, from the least noisy, at which the denoising term acts.
        sigma_data: standard deviation of the latents, by which the denoising term is weighted as in EDM.
        assign: pairs a batch with its noise, called `assign(x0, noise)`; None leaves it to chance.

    Raises:
        TypeError: `function` is not on the EDM schedule.
        ValueError: a number is out of its range.

    Example:
        >>> from trimtab.diffusion import ConsistencyPreconditioned
        >>> from trimtab.nets import DenoisingMLP
        >>> function = ConsistencyPreconditioned(DenoisingMLP(4, hidden=16, norm=NonScalingLayerNorm))
        >>> training = LatentConsistencyTraining(function, total_steps=100, s1=40)
        >>> loss = training(0.5 * torch.randn(8, 4), step=0)
        >>> loss.backward()
    """

    def __init__(
        self,
        function: DenoiserLike,
        total_steps: int,
        *,
        s0: int = 10,
        s1: int = 640,
        p_mean: float = -1.1,
        p_std: float = 2.0,
        distance: Distance = cauchy,
        scale: Callable[[int], float] | None = None,
        diffusion_weight: float = 5.0,
        diffusion_share: float = 0.25,
        sigma_data: float = 0.5,
        assign: Callable[[Tensor, Tensor], Tensor] | None = transport_pairing,
    ) -> None:
        super().__init__(function, total_steps, s0=s0, s1=s1, p_mean=p_mean, p_std=p_std, distance=distance)
        self.scale = scale
        self.diffusion_weight = non_negative("diffusion_weight", diffusion_weight)
        self.diffusion_share = in_range("diffusion_share", diffusion_share, 0, 1)
        self.sigma_data = positive("sigma_data", sigma_data)
        self.assign = assign

    def __call__(
        self,
        x0: Float[Tensor, "batch ..."],
        step: int,
        *further: Any,
        noise: Float[Tensor, "batch ..."] | None = None,
        index: Int[Tensor, " batch"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch; arguments and errors are those of iCT. Noise that is given is paired, too."""
        if problem := real_problem(x0=x0):
            raise TypeError(problem)
        levels = self.levels(step)
        index = self.draw(levels, len(x0), generator) if index is None else index
        low, high = level_pairs(levels, index, x0)
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device) if noise is None else noise
        noise = noise if self.assign is None else self.assign(x0, noise)
        student, target = neighbours(self.function, x0, noise, low, high, *further)
        c = self.scale(len(levels)) if self.scale else adaptive_scale(len(levels)) * math.sqrt(x0[0].numel())
        loss = (self.distance(student, target, c) / (high - low)).mean()
        # The student is at the index above; counted from 1, as in the paper, that is index + 2.
        last = len(levels) - int((1 - self.diffusion_share) * len(levels))
        early = (index + 2 <= last).to(x0.device)
        errors = (high**-2 + self.sigma_data**-2) * (student - x0).square().flatten(1).mean(1)
        return loss + self.diffusion_weight * (errors * early).sum() / early.sum().clamp_min(1)
