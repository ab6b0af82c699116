"""The model: its bound for training, predictions, and the ways in which it fills holes."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.generative.importance import effective_sample_size, importance_weights, log_mean_exp
from trimtab.generative.supnotmiwae.holes import decay_impute, obs_dropout
from trimtab.generative.supnotmiwae.prior import latent_log_prob
from trimtab.ops.arguments import class_indices, floating_tensor, in_range, integer, looked_at, positive, same_shape

_LEAST_LATENT_STD, _LEAST_STD = 1e-4, 1e-3
_FIRST_DECAY = 0.05


@dataclass(frozen=True)
class Fillings:
    """Series whose holes are filled in many ways.

    Attributes:
        samples: filled series, those of one imputation after those of another.
        weights: of the samples, summing to one over them.
    """

    samples: Float[Tensor, "samples batch steps features"]
    weights: Float[Tensor, "samples batch"]

    @property
    def mean(self) -> Float[Tensor, "batch steps features"]:
        """The expected series."""
        return torch.einsum("sb,sbtd->btd", self.weights, self.samples)

    @property
    def std(self) -> Float[Tensor, "batch steps features"]:
        """Its standard deviation: zero where a value was observed."""
        return torch.einsum("sb,sbtd->btd", self.weights, (self.samples - self.mean).square()).sqrt()


@dataclass(frozen=True)
class Prediction:
    """Class probabilities, and what they owe to the holes.

    Attributes:
        probs: averaged over the fillings.
        entropy: of `probs`, in nats.
        disagreement: the part of it that is there because fillings differ, the mutual information of class and filling.
    """

    probs: Float[Tensor, "batch classes"]
    entropy: Float[Tensor, " batch"]
    disagreement: Float[Tensor, " batch"]


class SupNotMIWAE(nn.Module):
    """A generative model for the holes and a classifier of what fills them, trained together.

    The networks are yours; each maps (batch, steps, in) to (batch, steps, out), and all but the missingness model are
    also given the mask `valid` (batch, steps) of the steps that a series has.

    Args:
        encoder: from 2 x features (values, zero where missing, and the mask) to 2 x latent dimensions.
        decoder: from the latent dimensions to 2 x features.
        classifier: from features to logits, (batch, classes).
        num_features: number of features.
        missingness: from features to a logit of being observed for each, (batch, steps, features); None takes values
            to be missing at random, which makes it supMIWAE.
        rate: share of the observed values that ObsDropout hides, in [0, 1); 0 is the naive combination.
        num_latents: K, latents per series.
        num_imputations: M, fillings per latent.
        length_scale: of the Gaussian process that is the latents' prior, in steps; None for independent steps.
        decay: blend what is generated with the last value observed.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> class Steps(torch.nn.Linear):
        ...     def forward(self, x, valid):
        ...         return super().forward(x)
        >>> class Pooled(Steps):
        ...     def forward(self, x, valid):
        ...         return super().forward(x, valid).mean(1)
        >>> missingness = torch.nn.Linear(3, 3)
        >>> model = SupNotMIWAE(Steps(6, 8), Steps(4, 6), Pooled(3, 2), num_features=3, missingness=missingness)
        >>> x, mask, y = torch.randn(5, 7, 3), torch.rand(5, 7, 3) < 0.5, torch.tensor([0, 1, 0, 1, 1])
        >>> model.loss(x, mask, y)["total"].backward()
        >>> model.predict(x, mask).probs.shape, model.impute(x, mask).mean.shape
        (torch.Size([5, 2]), torch.Size([5, 7, 3]))
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        classifier: nn.Module,
        num_features: int,
        *,
        missingness: nn.Module | None = None,
        rate: float = 0.3,
        num_latents: int = 10,
        num_imputations: int = 1,
        length_scale: float | None = 7.0,
        decay: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = integer("num_features", num_features)
        self.rate = in_range("rate", rate, 0, 1, "left")
        self.num_latents = integer("num_latents", num_latents)
        self.num_imputations = integer("num_imputations", num_imputations)
        self.length_scale = None if length_scale is None else positive("length_scale", length_scale)
        self.encoder, self.decoder, self.classifier, self.missingness = encoder, decoder, classifier, missingness
        self.decay = decay
        self.decay_weight = nn.Parameter(torch.zeros(num_features))
        self.decay_bias = nn.Parameter(torch.full((num_features,), _FIRST_DECAY))

    def loss(
        self,
        x: Float[Tensor, "batch steps features"],
        mask: Bool[Tensor, "batch steps features"],
        targets: Int[Tensor, " batch"] | None = None,
        *,
        valid: Bool[Tensor, "batch steps"] | None = None,
        times: Float[Tensor, " steps"] | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The negative bound of a batch, with ObsDropout in training mode.

        Args:
            x: series; what is not observed is not read, and may be NaN.
            mask: what is observed.
            targets: classes; None for the generative model alone (with rate 0, not-MIWAE).
            valid: steps that a series has; None for all.
            times: of the steps; None for 0, 1, 2, ….
            generator: draws latents, fillings and what is hidden.

        Returns:
            `total`, to be minimised, and detached for the record `classification` (cross-entropy, 0 without targets),
            `reconstruction` (negative log-density of what is observed) and `ess` (effective number of latents).

        Raises:
            TypeError: a dtype is wrong (`x` floating point, `mask` and `valid` bool, `targets` int64).
            ValueError: shapes do not fit, the batch is empty, or a target is none of the classes.
        """
        if targets is not None:
            class_indices("targets", targets)
            if targets.shape != x.shape[:1]:
                raise ValueError(f"targets must be {len(x)} labels, got shape {tuple(targets.shape)}")
        drawn = self._draw(x, mask, valid, times, generator, self.num_imputations, self.rate if self.training else 0.0)
        log_py = drawn.log_ratio.new_zeros(())
        if targets is not None:
            log_probs = self._log_probs(drawn)
            if looked_at(targets) and not bool(((targets >= 0) & (targets < log_probs.shape[-1])).all()):
                raise ValueError(f"targets must be in [0, {log_probs.shape[-1]}), got others")
            log_py = log_probs.gather(-1, targets.expand(log_probs.shape[:-1])[..., None])[..., 0]
        bound = log_mean_exp(drawn.log_ratio + drawn.log_ps + log_py, dim=1)
        return {
            "total": -bound.mean(),
            "classification": -log_py.detach().mean(),
            "reconstruction": -drawn.log_px.detach().mean(),
            "ess": effective_sample_size(drawn.log_ratio.detach(), dim=1).mean(),
        }

    @torch.no_grad()
    def predict(
        self,
        x: Float[Tensor, "batch steps features"],
        mask: Bool[Tensor, "batch steps features"],
        *,
        valid: Bool[Tensor, "batch steps"] | None = None,
        times: Float[Tensor, " steps"] | None = None,
        num_imputations: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Prediction:
        r"""Class probabilities, averaged over fillings of nothing but the real holes.

        Weights are proportional to $r_k\,p(s \mid \hat x_k)$, as the definition of $p(y \mid x^o, s)$ asks; the
        authors' release leaves the second factor out and averages over M the logarithms of probabilities.

        Raises:
            TypeError, ValueError: as `loss`.
        """
        drawn = self._draw(x, mask, valid, times, generator, num_imputations or self.num_imputations, 0.0)
        weights = importance_weights(drawn.log_ratio + drawn.log_ps, dim=1) / len(drawn.log_ps)
        log_probs = self._log_probs(drawn)
        probs = torch.einsum("mkb,mkbc->bc", weights, log_probs.exp())
        entropy = torch.special.entr(probs).sum(-1)
        within = torch.einsum("mkb,mkb->b", weights, torch.special.entr(log_probs.exp()).sum(-1))
        return Prediction(probs, entropy, (entropy - within).clamp_min(0))

    @torch.no_grad()
    def impute(
        self,
        x: Float[Tensor, "batch steps features"],
        mask: Bool[Tensor, "batch steps features"],
        *,
        valid: Bool[Tensor, "batch steps"] | None = None,
        times: Float[Tensor, " steps"] | None = None,
        num_imputations: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Fillings:
        """Weighted ways to fill the holes.

        Raises:
            TypeError, ValueError: as `loss`.
        """
        drawn = self._draw(x, mask, valid, times, generator, num_imputations or self.num_imputations, 0.0)
        weights = importance_weights(drawn.log_ratio + drawn.log_ps, dim=1) / len(drawn.log_ps)
        return Fillings(drawn.filled.flatten(0, 1), weights.flatten(0, 1))

    def _draw(
        self,
        x: Tensor,
        mask: Tensor,
        valid: Tensor | None,
        times: Tensor | None,
        generator: torch.Generator | None,
        num_imputations: int,
        rate: float,
    ) -> _Drawn:
        if not isinstance(num_imputations, numbers.Integral) or isinstance(num_imputations, bool):
            raise TypeError(f"num_imputations must be an integer, got {num_imputations!r}")
        if num_imputations < 1:
            raise ValueError(f"num_imputations must be at least 1, got {num_imputations}")
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a boolean tensor, got {type(mask).__name__}")
        if times is not None and not isinstance(times, Tensor):
            raise TypeError(f"times must be a tensor, got {type(times).__name__}")
        x = floating_tensor("x", x)
        if x.ndim != 3 or x.shape[-1] != self.num_features or not x.numel():
            raise ValueError(f"x must be of shape (batch, steps, {self.num_features}), got {tuple(x.shape)}")
        same_shape("mask", mask, "x", x)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        if mask.dtype != torch.bool or valid.dtype != torch.bool:
            raise TypeError(f"mask and valid must be bool, got {mask.dtype} and {valid.dtype}")
        if valid.shape != x.shape[:2]:
            raise ValueError(f"valid must be of shape {tuple(x.shape[:2])}, got {tuple(valid.shape)}")
        times = torch.arange(x.shape[1], dtype=x.dtype, device=x.device) if times is None else times
        if times.shape != x.shape[1:2]:
            raise ValueError(f"times must be of shape {tuple(x.shape[1:2])}, one a step, got {tuple(times.shape)}")
        mask = mask & valid[:, :, None]
        x = torch.where(mask, x, 0)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)

        mean, std = _gaussian(self.encoder(torch.cat([x, mask.to(x)], -1), valid), _LEAST_LATENT_STD)
        z = mean + std * noise(self.num_latents, *mean.shape)
        present = valid[:, :, None]
        log_qz = torch.where(present, _log_normal(z, mean, std), 0).sum((-2, -1))
        log_pz = latent_log_prob(z, valid, times, self.length_scale)
        decoded = self.decoder(z.flatten(0, 1), valid.repeat(self.num_latents, 1)).unflatten(0, z.shape[:2])
        centre, spread = _gaussian(decoded, _LEAST_STD)
        log_px = torch.where(mask, _log_normal(x, centre, spread), 0).sum((-2, -1))

        sample = centre + spread * noise(num_imputations, *centre.shape)
        visible, log_pm = mask.expand_as(sample), x.new_zeros(sample.shape[:3])
        if rate:
            visible, log_pm = obs_dropout(visible, rate, generator=generator)
        values = x.expand_as(sample)
        if self.decay:
            filled = decay_impute(values, visible, sample, times, self.decay_weight, self.decay_bias.clamp_min(0))
        else:
            filled = torch.where(visible, values, sample)
        log_ps = x.new_zeros(sample.shape[:3])
        if self.missingness is not None:
            found = -F.binary_cross_entropy_with_logits(self.missingness(filled), visible.to(x), reduction="none")
            log_ps = torch.where(present, found, 0).sum((-2, -1))
        return _Drawn(filled, valid, log_px, log_px + log_pz - log_qz + log_pm, log_ps)

    def _log_probs(self, drawn: _Drawn) -> Tensor:
        ways = drawn.filled.shape[:3]
        logits: Tensor = self.classifier(drawn.filled.flatten(0, 2), drawn.valid.repeat(ways[0] * ways[1], 1))
        log_probs: Tensor = F.log_softmax(logits, -1).unflatten(0, ways)
        return log_probs


@dataclass(frozen=True)
class _Drawn:
    """M x K fillings of a batch; `log_px` of K latents, `log_ratio` log r and `log_ps` of all fillings."""

    filled: Tensor
    valid: Tensor
    log_px: Tensor
    log_ratio: Tensor
    log_ps: Tensor


def _gaussian(raw: Tensor, least: float) -> tuple[Tensor, Tensor]:
    mean, spread = raw.chunk(2, -1)
    return mean, F.softplus(spread).mul_(1 - least).add_(least)


def _log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return ((x - mean) / std).square().add_(math.log(2 * math.pi)).mul_(-0.5).sub_(std.log())
