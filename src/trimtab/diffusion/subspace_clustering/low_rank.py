"""The denoiser of a mixture of low-rank Gaussians as a network, and its training."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from trimtab.diffusion.prediction import Prediction
from trimtab.diffusion.schedules import EDM, NoiseSchedule
from trimtab.ops.arguments import finite_tensor, floating_tensor, integer, one_of, positive, real_problem

Gating = Literal["soft", "hard"]


def low_rank_denoise(
    x: Float[Tensor, "*restarts batch dim"],
    bases: Float[Tensor, "*restarts components dim rank"],
    alpha: Float[Tensor, "*restarts batch"] | float,
    sigma: Float[Tensor, "*restarts batch"] | float,
    *,
    gating: Gating = "soft",
    gate: Float[Tensor, "*restarts batch dim"] | None = None,
) -> Float[Tensor, "*restarts batch dim"]:
    """The posterior mean of a mixture of low-rank Gaussians of one rank and equal weights, differentiable in the bases.

    Args:
        x: noisy samples.
        bases: orthonormal columns of each component; leading dimensions hold several models side by side.
        alpha: factor on the data.
        sigma: standard deviation of the noise, positive.
        gating: `soft` weighs components by their posterior, `hard` takes the one with the longest projection.
        gate: samples that decide among components in place of `x`: with the clean ones and hard gating, the loss is
            that of the paper's theorem on several subspaces.

    Raises:
        TypeError: `x` or `bases` is no tensor, or an argument is complex.
        ValueError: for an unknown `gating`, `alpha` a number that is not finite, or `sigma` one that is not positive.

    Example:
        >>> axes = torch.eye(2)[:, :, None]  # two lines in the plane
        >>> low_rank_denoise(torch.tensor([[2.0, 0.1]]), axes, 1.0, 0.1, gating="hard").round(decimals=2)
        tensor([[1.9800, 0.0000]])
    """
    if not isinstance(x, Tensor) or not isinstance(bases, Tensor):
        raise TypeError(f"x and bases must be tensors, got {type(x).__name__} and {type(bases).__name__}")
    if problem := real_problem(x=x, bases=bases, alpha=alpha, sigma=sigma, gate=gate):
        raise TypeError(problem)
    if isinstance(alpha, Real) and not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if not isinstance(sigma, Tensor) and not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    one_of("gating", gating, get_args(Gating))
    alpha, sigma = (torch.as_tensor(level, dtype=x.dtype, device=x.device) for level in (alpha, sigma))
    coords = torch.einsum("...bn,...knr->...bkr", x, bases)
    seen = coords if gate is None else torch.einsum("...bn,...knr->...bkr", gate, bases)
    lengths = seen.square().sum(-1)
    if gating == "hard":
        weights = nn.functional.one_hot(lengths.argmax(-1), bases.shape[-3]).to(x.dtype)
    else:
        # The rank's factor is the same for all components and drops out.
        scale = alpha**2 / (2 * sigma**2 * (alpha**2 + sigma**2))
        weights = (lengths * scale[..., None]).softmax(-1)
    projected = torch.einsum("...bkr,...knr->...bn", coords * weights[..., None], bases)
    return (alpha / (alpha**2 + sigma**2))[..., None] * projected


class LowRankDenoiser(nn.Module):
    """A denoiser of the form of `low_rank_denoise` with trainable bases, kept orthonormal by Householder reflections.

    It has the form that samplers expect, `denoiser(x, t)` with a schedule, and predicts the clean sample.

    Args:
        dim: of the data.
        rank: of every subspace, at most `dim`.
        components: number of subspaces.
        schedule: the noise schedule.
        gating: see `low_rank_denoise`.

    Example:
        >>> from trimtab.diffusion import EDM
        >>> denoiser = LowRankDenoiser(6, rank=2, components=3, schedule=EDM())
        >>> denoiser(torch.randn(4, 6), torch.ones(4)).shape
        torch.Size([4, 6])
        >>> denoiser.bases.shape
        torch.Size([3, 6, 2])
    """

    prediction: Prediction = "x0"
    bases: Float[Tensor, "components dim rank"]

    def __init__(
        self, dim: int, rank: int, components: int, schedule: NoiseSchedule, *, gating: Gating = "soft"
    ) -> None:
        super().__init__()
        integer("dim", dim)
        integer("rank", rank, 1, dim)
        integer("components", components)
        one_of("gating", gating, get_args(Gating))
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        self.schedule, self.gating = schedule, gating
        self.bases = nn.Parameter(torch.randn(components, dim, rank))
        parametrizations.orthogonal(self, "bases", orthogonal_map="householder")

    def forward(self, x: Tensor, t: Tensor, *, gate: Tensor | None = None) -> Tensor:
        """The clean sample of `x` (batch, dim) at times `t` (batch,)."""
        if x.ndim != 2 or x.shape[1] != self.bases.shape[1]:
            raise ValueError(f"x must have shape (batch, {self.bases.shape[1]}), got {tuple(x.shape)}")
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return low_rank_denoise(x, self.bases, alpha.to(x.dtype), sigma.to(x.dtype), gating=self.gating, gate=gate)


class LowRankFit(NamedTuple):
    """What `fit_low_rank` found.

    Attributes:
        bases: (components, dim, rank) orthonormal columns of the start with the least loss.
        losses: (starts,) mean loss of each start over the last tenth of its steps.
    """

    bases: Float[Tensor, "components dim rank"]
    losses: Float[Tensor, " starts"]


@torch.enable_grad()
def fit_low_rank(
    x0: Float[Tensor, "n dim"],
    rank: int,
    components: int,
    *,
    schedule: NoiseSchedule | None = None,
    gating: Gating = "soft",
    gate_on_clean: bool = False,
    n_init: int = 10,
    starts: Float[Tensor, "starts components dim rank"] | None = None,
    steps: int = 200,
    lr: float = 0.1,
    draws: int = 2,
    generator: torch.Generator | None = None,
) -> LowRankFit:
    """Trains low-rank denoisers by the diffusion loss, from several starts side by side, and keeps the best.

    Every step sees all samples with fresh noise, at levels uniform in log sigma / alpha over the schedule, and takes a
    step of Adam, whose rate falls linearly to zero; bases are brought back to orthonormal columns by a QR
    decomposition. The loss, the mean squared distance to the clean samples, has many local minima where there are
    several subspaces.

    Args:
        x0: clean samples.
        rank: of every subspace.
        components: number of subspaces.
        schedule: from whose `t_min` to whose `t_max` noise is drawn; by default `EDM(t_min=0.05, t_max=1.0)`.
        gating: see `low_rank_denoise`.
        gate_on_clean: decide among components by the clean samples, as the paper's theorem does.
        n_init: number of random starts.
        starts: bases to start from besides.
        steps: of Adam.
        lr: its first rate.
        draws: noisy copies of each sample in a step.
        generator: of starts and noise.

    Raises:
        ValueError: an argument is out of its range, there are no samples, or they are not finite.

    Example:
        >>> line = torch.tensor([[0.6, 0.8]])
        >>> x0 = torch.tensor([[1.0], [-0.5], [2.0]]) * line
        >>> found = fit_low_rank(x0, rank=1, components=1, generator=torch.Generator().manual_seed(0))
        >>> bool((found.bases[0].T @ line.T).abs() > 0.999)
        True
    """
    x0 = floating_tensor("x0", finite_tensor("x0", x0, ndim=2))
    if len(x0) == 0:
        raise ValueError("x0 must have at least one sample, got none")
    integer("rank", rank, 1, x0.shape[1])
    integer("components", components)
    integer("n_init", n_init, 0 if starts is not None else 1)
    integer("steps", steps)
    integer("draws", draws)
    positive("lr", lr)
    schedule = schedule or EDM(t_min=0.05, t_max=1.0)
    shape = (components, x0.shape[1], rank)
    free = torch.randn(n_init, *shape, generator=generator, dtype=x0.dtype).to(x0.device)
    if starts is not None:
        if starts.shape[1:] != shape:
            raise ValueError(
                f"starts must have shape (starts, {', '.join(map(str, shape))}), got {tuple(starts.shape)}"
            )
        free = torch.cat([free, starts.to(x0)])
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, steps)
    clean = x0.repeat(draws, 1)
    low, high = (float(schedule.log_snr(torch.tensor(t).double())) for t in (schedule.t_max, schedule.t_min))
    losses = torch.zeros(len(free), dtype=x0.dtype, device=x0.device)
    for step in range(steps):
        snr = low + (high - low) * torch.rand(len(clean), generator=generator, dtype=torch.float64)
        t = schedule.t_of_log_snr(snr)
        alpha, sigma = schedule.alpha(t).to(x0), schedule.sigma(t).to(x0)
        noise = torch.randn(clean.shape, generator=generator, dtype=x0.dtype).to(x0.device)
        noisy = alpha[:, None] * clean + sigma[:, None] * noise
        stacked = noisy.expand(len(free), -1, -1)
        gate = clean.expand(len(free), -1, -1) if gate_on_clean else None
        out = low_rank_denoise(stacked, torch.linalg.qr(free).Q, alpha, sigma, gating=gating, gate=gate)
        loss = (out - clean).square().sum(-1).mean(-1)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        decay.step()
        if step >= steps - max(1, steps // 10):
            losses += loss.detach() / max(1, steps // 10)
    bases = torch.linalg.qr(free.detach()).Q
    return LowRankFit(bases[losses.argmin()], losses)
