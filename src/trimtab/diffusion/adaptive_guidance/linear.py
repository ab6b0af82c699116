"""LinearAG: unconditional predictions from a linear combination of the predictions before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trimtab.diffusion.adaptive_guidance.policy import StepwiseGuidance
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.guidance import Guidance, classifier_free_guidance
from trimtab.diffusion.prediction import convert
from trimtab.diffusion.schedules import per_sample
from trimtab.ops.arguments import number, one_of, real_problem, same_shape

Choice = Literal["guided", "estimated", "conditional"]


def record_guidance(
    denoiser: DenoiserLike,
    cond: Any,
    sample: Callable[[DenoiserLike], Tensor],
    *,
    uncond: Any = None,
    scale: float = 7.5,
) -> tuple[Float[Tensor, "calls batch ..."], Float[Tensor, "calls batch ..."]]:
    """The noises that a run with classifier-free guidance predicts, with the condition and without it.

    Args:
        denoiser: called `denoiser(x, t, cond)`.
        cond: the condition guided towards.
        sample: runs a sampler on the denoiser it is given; the runs that follow must be by the same one.
        uncond: the condition guided away from.
        scale: w.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, ddim, grids, schedules
        >>> model = AnalyticGMM.ring().denoiser(schedules.VPLinear())
        >>> noise, times = model.schedule.prior(8, 2), grids.power(model.schedule, 5)
        >>> cond, uncond = record_guidance(model, torch.arange(8), lambda guided: ddim(guided, noise, times), scale=3.0)
        >>> cond.shape
        torch.Size([5, 8, 2])
    """
    recorder = _Recorder(denoiser, cond, uncond, number("scale", scale))
    sample(recorder)
    if not recorder.noises:
        raise ValueError("sample must evaluate the denoiser it is given, got no evaluation")
    with_cond, without = zip(*recorder.noises, strict=True)
    return torch.stack(with_cond), torch.stack(without)


class _Recorder(Guidance):
    def __init__(self, denoiser: DenoiserLike, cond: Any, uncond: Any, scale: float) -> None:
        super().__init__(denoiser, cond, uncond)
        self.scale = scale
        self.noises: list[tuple[Tensor, Tensor]] = []

    def reset(self) -> None:
        self.noises.clear()
        super().reset()

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        cond, uncond = self.conditional(x, t), self.unconditional(x, t)
        (alpha, sigma), kind = self.schedule.alpha_sigma(per_sample(t, x)), self.prediction
        first, second = (convert(value, x, alpha, sigma, kind, "eps").detach() for value in (cond, uncond))
        self.noises.append((first, second))
        return classifier_free_guidance(cond, uncond, self.scale)


def fit_linear_guidance(
    cond: Float[Tensor, "calls batch ..."], uncond: Float[Tensor, "calls batch ..."]
) -> Float64[Tensor, "calls 2*calls"]:
    """Coefficients of the unconditional noise of each call, by least squares over all samples and all their numbers.

    Row t holds those of the conditional noises, up to call t, and then those of the unconditional ones, before call t;
    the rest is 0. One coefficient serves all pixels. Where past noises are nearly dependent, as those of neighbouring
    steps are, the smallest coefficients are taken.

    Args:
        cond: recorded noises with the condition, first call first; 200 samples do for images.
        uncond: those without it.

    Raises:
        TypeError: if the noises are no tensors, or complex.
        ValueError: if the shapes differ or hold nothing, or a noise is not finite.

    Example:
        >>> noises = torch.randn(2, 3, 50, 4)
        >>> table = fit_linear_guidance(noises[0], 0.5 * noises[0])
        >>> table[0].round(decimals=4).tolist()
        [0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if not isinstance(cond, Tensor) or not isinstance(uncond, Tensor):
        raise TypeError(f"cond and uncond must be tensors, got {type(cond).__name__} and {type(uncond).__name__}")
    if problem := real_problem(cond=cond, uncond=uncond):
        raise TypeError(problem)
    same_shape("uncond", uncond, "cond", cond)
    if cond.ndim < 2 or cond.numel() == 0:
        raise ValueError(f"cond must have shape (calls, batch, ...) and hold something, got {tuple(cond.shape)}")
    if not bool(torch.isfinite(cond).all() & torch.isfinite(uncond).all()):
        raise ValueError("cond and uncond must be finite, got NaN or infinity")
    calls = len(cond)
    noises = torch.cat([cond, uncond]).double().flatten(1)
    gram = noises @ noises.T
    table = torch.zeros(calls, 2 * calls, dtype=torch.float64, device=cond.device)
    for call in range(calls):
        known = torch.cat([torch.arange(call + 1), calls + torch.arange(call)]).to(cond.device)
        inverse = torch.linalg.pinv(gram[known][:, known], rtol=1e-12, hermitian=True)
        table[call, known] = inverse @ gram[known, calls + call]
    return table


class LinearAG(StepwiseGuidance):
    """Classifier-free guidance with estimates in the place of some unconditional predictions.

    Estimates count as predictions in the estimates that follow. The runs must be by the sampler, at the times and the
    scale of the recorded ones, and guide away from the same condition. It is for samplers of one evaluation a step:
    those of several, such as `deis_rk`, build up the estimates' errors within a step, and samples miss the condition.

    Args:
        denoiser: called `denoiser(x, t, cond)`.
        cond: the condition guided towards.
        uncond: the condition guided away from.
        coefficients: those of `fit_linear_guidance`.
        scale: w.
        policy: for each call `guided` (two evaluations), `estimated` (one, and an estimate) or `conditional` (one);
            None for the authors', guided and estimated by turns in the first half and conditional in the second.

    Raises:
        ValueError: for coefficients that are no such table, or a policy of another length; in use, for more calls than
            were recorded.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, CountNFE, ddim, grids, schedules
        >>> model = AnalyticGMM.ring().denoiser(schedules.VPLinear())
        >>> noise, times = model.schedule.prior(64, 2), grids.power(model.schedule, 20)
        >>> labels, counted = torch.arange(64) % 8, CountNFE(model)
        >>> recorded = record_guidance(model, labels, lambda guided: ddim(guided, noise, times), scale=3.0)
        >>> guided = LinearAG(counted, labels, coefficients=fit_linear_guidance(*recorded), scale=3.0)
        >>> x = ddim(guided, noise, times)
        >>> counted.count
        25
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cond: Any,
        uncond: Any = None,
        *,
        coefficients: Float[Tensor, "calls 2*calls"],
        scale: float = 7.5,
        policy: Sequence[Choice] | None = None,
    ) -> None:
        if not isinstance(coefficients, Tensor) or not bool(torch.isfinite(coefficients).all()):
            raise ValueError("coefficients must be a finite tensor, such as that of fit_linear_guidance, got another")
        calls = len(coefficients)
        if coefficients.ndim != 2 or coefficients.shape[1] != 2 * calls or calls == 0:
            raise ValueError(f"coefficients must have shape (calls, 2 calls), got {tuple(coefficients.shape)}")
        super().__init__(denoiser, cond, uncond, calls)
        self.coefficients, self.scale = coefficients, number("scale", scale)
        half = calls // 2
        by_turns: list[Choice] = ["guided", "estimated"]
        alone: list[Choice] = ["conditional"]
        authors = (by_turns * calls)[:half] + alone * (calls - half)
        self.policy: tuple[Choice, ...] = tuple(authors if policy is None else policy)
        for choice in self.policy:
            one_of("policy", choice, get_args(Choice))
        if len(self.policy) != calls:
            raise ValueError(f"policy must have {calls} choices, one a call, got {len(self.policy)}")
        self._cond: list[Tensor] = []
        self._uncond: list[Tensor] = []

    def reset(self) -> None:
        self._cond, self._uncond = [], []
        super().reset()

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        call = self._current()
        cond = self.conditional(x, t)
        choice = "conditional" if self.scale == 1 else self.policy[call]
        if choice == "conditional" and "estimated" not in self.policy[call:]:
            self._call += 1  # nobody asks for what was before
            return cond
        if self._cond and self._cond[0].shape != x.shape:
            raise ValueError(
                f"x must keep the shape {tuple(self._cond[0].shape)} within a run, got {tuple(x.shape)}; call reset() "
                "before a new run"
            )
        (alpha, sigma), kind = self.schedule.alpha_sigma(per_sample(t, x)), self.prediction
        noises = [*self._cond, convert(cond, x, alpha, sigma, kind, "eps")]
        if choice == "guided":
            uncond = self.unconditional(x, t)
            without = convert(uncond, x, alpha, sigma, kind, "eps")
        else:
            without = self._estimate(call, noises)
            uncond = convert(without, x, alpha, sigma, "eps", kind)
        self._cond, self._uncond, self._call = noises, [*self._uncond, without], call + 1
        return cond if choice == "conditional" else classifier_free_guidance(cond, uncond, self.scale)

    def _estimate(self, call: int, cond: list[Tensor]) -> Tensor:
        row = self.coefficients[call].tolist()
        weights = [*row[: call + 1], *row[self.calls : self.calls + call]]
        out = torch.zeros_like(cond[0])
        for weight, noise in zip(weights, [*cond, *self._uncond], strict=True):
            out.add_(noise, alpha=weight)
        return out
