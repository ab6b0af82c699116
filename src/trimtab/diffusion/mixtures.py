r"""Gaussian mixtures with everything exact: denoiser, score, likelihood and class posterior at every noise level.

Samplers and guidance can be judged on them without a trained network. For components $\pi_k, \mu_k, C_k$ the noisy
density is $\sum_k \pi_k N(\alpha\mu_k, \alpha^2 C_k + \sigma^2 I)$, and with its responsibilities $r_k(x)$

$$
E[x_0 \mid x] = \sum_k r_k \left(\mu_k + \alpha C_k (\alpha^2 C_k + \sigma^2 I)^{-1}(x - \alpha\mu_k)\right).
$$
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.diffusion.prediction import PREDICTIONS, Prediction, convert
from trimtab.diffusion.schedules import NoiseSchedule
from trimtab.ops.arguments import (
    in_range,
    integer,
    looked_at,
    non_negative,
    one_of,
    positive,
    real_problem,
    tensor,
)

Level = Tensor | float
Condition = Int[Tensor, " batch"] | int | None


class AnalyticGMM:
    """A Gaussian mixture diffused to any level (alpha, sigma).

    Covariances that are low-rank plus a multiple of the identity are recognised and cost accordingly less.

    Args:
        weights: positive, of any sum, shape `(components,)`.
        means: shape `(components, dim)`.
        covs: symmetric, positive semi-definite, shape `(components, dim, dim)`.
        labels: class of each component, for conditional sampling.

    Raises:
        TypeError: for what is no tensor, or neither float32 nor float64; for labels that are no integers.
        ValueError: for shapes that do not agree, weights that are not positive, covariances that are not symmetric
            positive semi-definite, negative labels, or anything not finite.

    Example:
        >>> mixture = AnalyticGMM(torch.ones(2), torch.tensor([[-1.0], [1.0]]), 0.01 * torch.ones(2, 1, 1))
        >>> mixture.posterior_mean(torch.tensor([[0.7]]), alpha=1.0, sigma=0.1)
        tensor([[0.8500]])
    """

    def __init__(
        self,
        weights: Float[Tensor, " components"],
        means: Float[Tensor, "components dim"],
        covs: Float[Tensor, "components dim dim"],
        labels: Int[Tensor, " components"] | None = None,
    ) -> None:
        if not all(isinstance(part, Tensor) for part in (weights, means, covs)):
            raise TypeError("weights, means and covs must be tensors, got others")
        if means.dtype not in (torch.float32, torch.float64) or covs.dtype != means.dtype:
            raise TypeError(f"means and covs must be float32 or both float64, got {means.dtype} and {covs.dtype}")
        if means.ndim != 2:
            raise ValueError(f"means must have shape (components, dim), got {tuple(means.shape)}")
        count, dim = means.shape
        if weights.shape != (count,) or not bool((weights > 0).all() & torch.isfinite(weights).all()):
            raise ValueError(f"weights must be {count} positive numbers, got shape {tuple(weights.shape)}")
        if covs.shape != (count, dim, dim):
            raise ValueError(f"covs must have shape {(count, dim, dim)}, got {tuple(covs.shape)}")
        if not bool(torch.isfinite(means).all() & torch.isfinite(covs).all()):
            raise ValueError("means and covs must be finite, got NaN or infinity")
        if labels is not None and labels.shape != (count,):
            raise ValueError(f"labels must have shape {(count,)}, got {tuple(labels.shape)}")
        if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels is not None and bool((labels < 0).any()):
            raise ValueError(f"labels must be at least 0, got {int(labels.min())}")
        if not torch.allclose(covs, covs.mT, atol=1e-6 * float(covs.abs().amax())):
            raise ValueError("covs must be symmetric, got entries that differ from their transposes")
        values, vectors = torch.linalg.eigh(covs)
        tolerance = 1e-6 * values.abs().amax()
        if bool((values < -tolerance).any()):
            raise ValueError(f"covs must be positive semi-definite, got an eigenvalue of {values.min().item():g}")
        values = values.clamp_min(0)
        self.log_weights = torch.log(weights / weights.sum())
        self.means, self.covs, self.labels = means, covs, labels
        # Squares of long vectors cancel: where the means are far from the origin, offsets count from their centre.
        centre = means.mean(0)
        extent = (means - centre).norm(dim=1).amax() + values.amax().clamp_min(0).sqrt()
        self._centre: Tensor | None = centre if centre.norm() > 10 * extent else None
        self._offsets: Tensor = means if self._centre is None else means - centre
        # C = floor I + U diag(extra) U^T, with only as many columns as some component needs.
        self.floor: Tensor = values[:, 0]
        extra = values - self.floor[:, None]
        rank = int((extra > 1e-9 * values[:, -1:] + tolerance * 1e-3).sum(1).max())
        self.extra: Tensor = extra[:, dim - rank :]
        self.basis: Tensor = vectors[:, :, dim - rank :]

    @classmethod
    def isotropic(
        cls,
        means: Float[Tensor, "components dim"],
        std: float,
        weights: Float[Tensor, " components"] | None = None,
        labels: Int[Tensor, " components"] | None = None,
    ) -> AnalyticGMM:
        """Components of one standard deviation in every direction.

        Raises:
            TypeError: `means` is no tensor.
            ValueError: `std` is negative or not finite, or `means` is no matrix.
        """
        if not isinstance(means, Tensor):
            raise TypeError(f"means must be a tensor, got {type(means).__name__}")
        non_negative("std", std)
        count, dim = tensor("means", means, ndim=2).shape
        covs = (std**2 * torch.eye(dim, dtype=means.dtype)).expand(count, dim, dim)
        return cls(means.new_ones(count) if weights is None else weights, means, covs, labels)

    @classmethod
    def ring(
        cls, modes: int = 8, radius: float = 1.0, std: float = 0.1, *, dtype: torch.dtype | None = None
    ) -> AnalyticGMM:
        """Modes on a circle in the plane, each a class of its own."""
        integer("modes", modes)
        positive("radius", radius)
        angle = torch.arange(modes, dtype=dtype or torch.get_default_dtype()) * (2 * math.pi / modes)
        means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return cls.isotropic(means, std, labels=torch.arange(modes))

    @property
    def dim(self) -> int:
        """Dimension of the data."""
        return self.means.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def mean(self) -> Float[Tensor, " dim"]:
        """The mean of the data."""
        return self.log_weights.exp() @ self.means

    @property
    def cov(self) -> Float[Tensor, "dim dim"]:
        """The covariance of the data."""
        weights, centred = self.log_weights.exp(), self.means - self.mean
        return torch.einsum("k,kde->de", weights, self.covs) + (centred.T * weights) @ centred

    def posterior_mean(
        self, x: Float[Tensor, "batch dim"], alpha: Level, sigma: Level, cond: Condition = None, *, blur: float = 0.0
    ) -> Float[Tensor, "batch dim"]:
        """E[x0 | x], and of the class where `cond` is given.

        Args:
            x: noisy samples.
            alpha: factor on the data, a number or of shape `(batch,)`.
            sigma: standard deviation of the noise, likewise.
            cond: class per sample, or one for all; None for the whole mixture.
            blur: share of the class's weight spread evenly over all classes, in [0, 1]: a model that confuses them.

        Raises:
            ValueError: `blur` is out of its range, or a shape does not fit.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        in_range("blur", blur, 0, 1)
        alpha, sigma, x = self._read(alpha, sigma, x)
        square, coords = self._coordinates(x, alpha)
        weights = self._responsibilities(x, square, coords, alpha, sigma, cond, blur)
        # alpha C (alpha^2 C + sigma^2 I)^-1 has the factor `gain` along an eigenvector.
        floor, along = self._apply(lambda value: alpha * value / (alpha**2 * value + sigma**2))
        return weights @ self.means + self._sum(weights, floor, along, x, alpha, coords)

    def score(
        self, x: Float[Tensor, "batch dim"], alpha: Level = 1.0, sigma: Level = 0.0, cond: Condition = None
    ) -> Float[Tensor, "batch dim"]:
        """The gradient of `log_prob`."""
        alpha, sigma, x = self._read(alpha, sigma, x)
        square, coords = self._coordinates(x, alpha)
        weights = self._responsibilities(x, square, coords, alpha, sigma, cond, 0.0)
        floor, along = self._apply(lambda value: -1 / (alpha**2 * value + sigma**2))
        return self._sum(weights, floor, along, x, alpha, coords)

    def log_prob(
        self, x: Float[Tensor, "batch dim"], alpha: Level = 1.0, sigma: Level = 0.0, cond: Condition = None
    ) -> Float[Tensor, " batch"]:
        """log p(x) at a noise level, of the class where `cond` is given; the clean density by default."""
        alpha, sigma, x = self._read(alpha, sigma, x)
        joint = self._log_joint(*self._coordinates(x, alpha), alpha, sigma)
        joint = joint + self._log_prior(x, cond, 0.0)
        return joint.logsumexp(dim=1)

    def class_log_posterior(
        self, x: Float[Tensor, "batch dim"], alpha: Level = 1.0, sigma: Level = 0.0
    ) -> Float[Tensor, "batch classes"]:
        """log p(class | x): the exact classifier; differentiable in `x` for classifier guidance."""
        if self.labels is None:
            raise ValueError("labels must be given to the mixture to have a class posterior, got None")
        alpha, sigma, x = self._read(alpha, sigma, x)
        joint = self._log_joint(*self._coordinates(x, alpha), alpha, sigma) + self.log_weights
        members = self.labels == torch.arange(self.num_classes, device=self.labels.device)[:, None]
        by_class = torch.where(members, joint[:, None, :], -torch.inf).logsumexp(dim=2)
        return by_class.log_softmax(dim=1)

    def sample(
        self, count: int, *, cond: Condition = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch dim"]:
        """Exact samples of the data, of the class where `cond` is given."""
        integer("count", count, 0)
        blank = self.means.new_zeros(count, self.dim)
        prior = self._log_prior(blank, cond, 0.0).exp().expand(count, -1)
        component = torch.multinomial(prior, 1, generator=generator)[:, 0]
        noise = torch.randn(count, self.dim, generator=generator, dtype=blank.dtype)
        inner = torch.randn(count, self.extra.shape[1], generator=generator, dtype=blank.dtype)
        spread = torch.einsum("br,bdr->bd", inner * self.extra[component].sqrt(), self.basis[component])
        return self.means[component] + self.floor[component, None].sqrt() * noise + spread

    def denoiser(self, schedule: NoiseSchedule, prediction: Prediction = "x0") -> MixtureDenoiser:
        """The exact denoiser on a schedule."""
        return MixtureDenoiser(self, schedule, prediction)

    def to(self, dtype: torch.dtype) -> AnalyticGMM:
        """The same mixture in another precision."""
        weights = self.log_weights.exp()
        return AnalyticGMM(weights.to(dtype), self.means.to(dtype), self.covs.to(dtype), self.labels)

    def _read(self, alpha: Level, sigma: Level, x: Tensor) -> tuple[Level, Level, Tensor]:
        """Levels in a shape that multiplies samples, and the samples from the centre of the means."""
        if problem := real_problem(x=x, alpha=alpha, sigma=sigma):
            raise TypeError(problem)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must have shape (batch, {self.dim}), got {tuple(x.shape)}")
        if not isinstance(alpha, Tensor) and not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha}")
        if not isinstance(sigma, Tensor) and not 0 <= sigma < math.inf:
            raise ValueError(f"sigma must be at least 0 and finite, got {sigma}")
        if not isinstance(sigma, Tensor) and sigma == 0 and bool((self.floor == 0).any()):
            raise ValueError("sigma must be positive where a covariance is singular, since no density is there, got 0")
        alpha, sigma = _column(alpha, x), _column(sigma, x)
        return alpha, sigma, x if self._centre is None else x - alpha * self._centre

    def _coordinates(self, x: Tensor, alpha: Level) -> tuple[Tensor, Tensor]:
        """Of the offsets x - alpha mu_k: squared lengths (batch, components), and coordinates (…, rank) in the bases.

        The offsets themselves, of size batch x components x dim, are never made.
        """
        means = self._offsets
        square = (x**2).sum(1, keepdim=True) - 2 * alpha * (x @ means.T) + alpha**2 * (means**2).sum(1)
        count, dim, rank = self.basis.shape
        flat = self.basis.permute(1, 0, 2).reshape(dim, count * rank)
        centres = torch.einsum("kd,kdr->kr", means, self.basis).reshape(1, count * rank)
        return square.clamp_min(0), (x @ flat - alpha * centres).reshape(len(x), count, rank)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """A function of the eigenvalues: for the floor (batch or 1, components), for the rest with ranks behind."""
        rank = self.extra.shape[1]
        values = torch.cat([self.floor[:, None], self.floor[:, None] + self.extra], dim=1)
        out = function(values.flatten()).reshape(-1, len(self.floor), rank + 1)
        return out[..., 0], out[..., 1:]

    def _sum(self, weights: Tensor, floor: Tensor, along: Tensor, x: Tensor, alpha: Level, coords: Tensor) -> Tensor:
        """sum_k weights_k M_k (x - alpha mu_k) for the matrices with the eigenvalues `floor` and `along`."""
        plain = weights * floor
        inner = plain.sum(1, keepdim=True) * x - alpha * (plain @ self._offsets)
        outer = weights[:, :, None] * (along - floor[:, :, None]) * coords
        return inner + outer.flatten(1) @ self.basis.permute(0, 2, 1).reshape(-1, self.dim)

    def _log_joint(self, square: Tensor, coords: Tensor, alpha: Level, sigma: Level) -> Tensor:
        floor, along = self._apply(lambda value: alpha**2 * value + sigma**2)
        distance = square / floor + (coords**2 * (1 / along - 1 / floor[:, :, None])).sum(-1)
        log_det = along.log().sum(-1) + (self.dim - along.shape[-1]) * floor.log()
        return -0.5 * (distance + log_det + self.dim * math.log(2 * math.pi))

    def _log_prior(self, x: Tensor, cond: Condition, blur: float) -> Tensor:
        if cond is None:
            return self.log_weights[None]
        if self.labels is None:
            raise ValueError("cond must be None for a mixture without labels, got one")
        cond = torch.as_tensor(cond).reshape(-1, 1)
        if cond.is_floating_point() or cond.dtype == torch.bool:
            raise TypeError(f"cond must be integers, got {cond.dtype}")
        if cond.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"cond must be one class or one per sample ({x.shape[0]}), got {cond.shape[0]}")
        if looked_at(cond) and not bool((self.labels == cond).any(1).all()):
            raise ValueError(f"cond must be classes of the mixture, of which the largest is {self.num_classes - 1}")
        share = (1 - blur) * (self.labels == cond) + blur / self.num_classes
        return (self.log_weights + share.to(x.dtype).log()).log_softmax(dim=1)

    def _responsibilities(
        self, x: Tensor, square: Tensor, coords: Tensor, alpha: Level, sigma: Level, cond: Condition, blur: float
    ) -> Tensor:
        joint = self._log_joint(square, coords, alpha, sigma) + self._log_prior(x, cond, blur)
        return joint.softmax(dim=1)


@dataclass(frozen=True)
class MixtureDenoiser:
    """The denoiser of a mixture, exact or made worse by `degrade`; called `(x, t, cond=None)`.

    Attributes:
        mixture: the data.
        schedule: the noise schedule.
        prediction: the kind of prediction returned.
        shrink: pull of the clean prediction to the data's mean, times sigma^2 / (alpha^2 + sigma^2).
        class_blur: share of the condition's weight spread over all classes.
    """

    mixture: AnalyticGMM
    schedule: NoiseSchedule
    prediction: Prediction = "x0"
    shrink: float = 0.0
    class_blur: float = 0.0

    def __post_init__(self) -> None:
        one_of("prediction", self.prediction, PREDICTIONS)
        in_range("shrink", self.shrink, 0, 1)
        in_range("class_blur", self.class_blur, 0, 1)

    def __call__(self, x: Tensor, t: Tensor, /, cond: Condition = None) -> Tensor:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x0 = self.mixture.posterior_mean(x, alpha, sigma, cond, blur=self.class_blur)
        if self.shrink:
            pull = _column(self.shrink * sigma**2 / (alpha**2 + sigma**2), x)
            x0 = x0 + pull * (self.mixture.mean - x0)
        return convert(x0, x, alpha, sigma, "x0", self.prediction)


def degrade(denoiser: MixtureDenoiser, *, shrink: float = 0.0, class_blur: float = 0.0) -> MixtureDenoiser:
    """A reproducibly imperfect model, which guidance and error correction need to have anything to do.

    Args:
        denoiser: an exact denoiser.
        shrink: pulls the clean prediction to the data's mean, the more the noisier the input, as an under-trained
            network does; 0 to 1.
        class_blur: the conditional model weighs class c by (1 - class_blur) 1[y = c] + class_blur / C, as a network
            that follows its condition only loosely; 0 to 1.

    Raises:
        TypeError: `denoiser` is not that of a mixture.
        ValueError: a share is outside [0, 1].

    Example:
        >>> from trimtab.diffusion.schedules import VPLinear
        >>> weak = degrade(AnalyticGMM.ring().denoiser(VPLinear()), shrink=0.3, class_blur=0.5)
        >>> weak(torch.zeros(2, 2), torch.full((2,), 0.5), torch.tensor([0, 3])).shape
        torch.Size([2, 2])
    """
    if not isinstance(denoiser, MixtureDenoiser):
        raise TypeError(f"denoiser must be a mixture's, mixture.denoiser(schedule), got {type(denoiser).__name__}")
    return replace(denoiser, shrink=shrink, class_blur=class_blur)


def _column(level: Level, x: Tensor) -> Tensor | float:
    if isinstance(level, Tensor) and level.ndim == 1:
        return level.to(x.dtype)[:, None]
    return level
