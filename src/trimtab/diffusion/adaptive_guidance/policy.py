"""A guidance scale for every step, found by gradient descent through the sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.denoiser import DenoiserLike, levels, model_times, start
from trimtab.diffusion.guidance import Guidance, classifier_free_guidance
from trimtab.diffusion.prediction import convert
from trimtab.ops.arguments import integer, non_negative, number, positive, real_problem


class StepwiseGuidance(Guidance):
    """Guidance that knows which evaluation of a run it is at."""

    def __init__(self, denoiser: DenoiserLike, cond: Any, uncond: Any, calls: int) -> None:
        super().__init__(denoiser, cond, uncond)
        self.calls, self._call = calls, 0

    def reset(self) -> None:
        self._call = 0
        super().reset()

    def _current(self) -> int:
        if self._call >= self.calls:
            raise ValueError(
                f"times must ask for at most the {self.calls} evaluations that the guidance was made for; call reset() "
                f"before a new run, got evaluation {self._call + 1}"
            )
        return self._call


class PolicyGuidance(StepwiseGuidance):
    """Classifier-free guidance with a scale for each step of a run.

    Steps at a scale of 1 evaluate with the condition alone and those at 0 without it alone: they cost half.

    Args:
        denoiser: called `denoiser(x, t, cond)`.
        cond: the condition guided towards.
        uncond: the condition guided away from.
        scales: w for each evaluation of a run, such as those of `search_policy`.

    Raises:
        ValueError: for no scale, or one that is not finite; in use, for more evaluations than there are scales.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, CountNFE, ddim, grids, schedules
        >>> counted = CountNFE(AnalyticGMM.ring().denoiser(schedules.VPLinear()))
        >>> guided = PolicyGuidance(counted, torch.arange(8), scales=[4.0, 4.0, 1.0, 1.0])
        >>> x = ddim(guided, counted.schedule.prior(8, 2), grids.power(counted.schedule, 4))
        >>> counted.count
        6
    """

    def __init__(self, denoiser: DenoiserLike, cond: Any, uncond: Any = None, *, scales: Sequence[float]) -> None:
        self.scales = tuple(number("scales", scale) for scale in scales)
        if not self.scales:
            raise ValueError("scales must be at least one number, got none")
        super().__init__(denoiser, cond, uncond, len(self.scales))

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        scale = self.scales[self._current()]
        if scale == 0:
            value = self.unconditional(x, t)
        else:
            value = self.conditional(x, t)
            if scale != 1:
                value = classifier_free_guidance(value, self.unconditional(x, t), scale)
        self._call += 1
        return value


def policy_evaluations(scales: Sequence[float]) -> int:
    """What a run costs by a policy: one evaluation at a scale of 0 or 1, two at any other.

    Example:
        >>> policy_evaluations([7.5, 1.0, 0.0])
        4
    """
    return sum(1 if scale in (0, 1) else 2 for scale in scales)


def search_policy(
    denoiser: DenoiserLike,
    cond: Any,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    evaluations: int,
    uncond: Any = None,
    scale: float = 7.5,
    options: Sequence[float] | None = None,
    iterations: int = 100,
    lr: float = 0.1,
    cost_weight: float = 0.1,
    entropy_weight: float = 0.01,
    generator: torch.Generator | None = None,
) -> tuple[float, ...]:
    """Scales for each step of DDIM that come close to full guidance within so many evaluations.

    Each step has a soft choice among the options, with weights from a softmax. A mixture of guided noises is guidance
    at the mixture's scale, so that one run costs two evaluations a step whatever the options. By Adam through the whole
    run, the loss is the squared distance to the samples of full guidance, the expected evaluations above those allowed
    (times `cost_weight`) and the entropy of the choices (times `entropy_weight`). The most likely options are the
    policy; should it cost too much, the steps least decided for guidance do without.

    Args:
        denoiser: called `denoiser(x, t, cond)`; differentiable in x.
        cond: the condition guided towards, for the samples in `x`.
        x: noise at `times[0]`.
        times: falling times.
        evaluations: that a run may cost; at least one a step.
        uncond: the condition guided away from.
        scale: w, of the guidance to come close to.
        options: scales to choose from; None for 0, 1, w/2, w and 2w, as the authors have.
        iterations: steps of Adam.
        lr: its learning rate.
        cost_weight: of the evaluations above those allowed.
        entropy_weight: of the entropy, mean over steps.
        generator: draws where the soft choices start, near even ones.

    Returns:
        A scale for each step.

    Raises:
        ValueError: for fewer evaluations than steps, options without 1, or times that do not fall.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, degrade, grids, schedules
        >>> denoiser = degrade(AnalyticGMM.ring().denoiser(schedules.VPLinear()), class_blur=0.5)
        >>> noise, times = denoiser.schedule.prior(8, 2), grids.power(denoiser.schedule, 4)
        >>> scales = search_policy(denoiser, torch.arange(8), noise, times, evaluations=6, scale=4.0, iterations=5)
        >>> len(scales), policy_evaluations(scales) <= 6
        (4, True)
    """
    times = start(denoiser, x, times)
    steps = len(times) - 1
    scale = number("scale", scale)
    options = (0.0, 1.0, scale / 2, scale, 2 * scale) if options is None else options
    chosen = tuple(number("options", w) for w in options)
    if 1.0 not in chosen:
        raise ValueError(f"options must hold 1, the conditional model, got {chosen}")
    integer("evaluations", evaluations, least=steps)
    integer("iterations", iterations)
    positive("lr", lr)
    non_negative("cost_weight", cost_weight)
    non_negative("entropy_weight", entropy_weight)

    values = torch.tensor(chosen, dtype=torch.float64)
    costs = torch.tensor([policy_evaluations([w]) for w in chosen], dtype=torch.float64)
    with torch.no_grad():
        aim = _guided_ddim(denoiser, cond, uncond, x, times, [scale] * steps)
    logits = 1e-3 * torch.randn(steps, len(chosen), generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    with torch.enable_grad():
        for _ in range(iterations):
            shares = logits.softmax(dim=1)
            reached = _guided_ddim(denoiser, cond, uncond, x, times, list((shares @ values).to(x.device, x.dtype)))
            entropy = -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean()
            over = torch.relu((shares @ costs).sum() - evaluations)
            loss = (reached - aim).square().mean() + cost_weight * over + entropy_weight * entropy
            optimizer.zero_grad()
            (logits.grad,) = torch.autograd.grad(loss, [logits])  # and none for the network's parameters
            optimizer.step()
    return _within(logits.detach(), chosen, evaluations)


def _within(logits: Tensor, options: tuple[float, ...], evaluations: int) -> tuple[float, ...]:
    scales = [options[int(choice)] for choice in logits.argmax(dim=1)]
    lead = logits.max(dim=1).values - logits[:, options.index(1.0)]
    for step in lead.argsort().tolist():
        if policy_evaluations(scales) <= evaluations:
            break
        if scales[step] not in (0, 1):
            scales[step] = 1.0
    return tuple(scales)


def _guided_ddim(
    denoiser: DenoiserLike, cond: Any, uncond: Any, x: Tensor, times: Tensor, scales: Sequence[Tensor | float]
) -> Tensor:
    """DDIM with a scale per step, differentiable in the scales."""
    alpha, rho = (level.tolist() for level in levels(denoiser.schedule, times))
    model_t, pair = model_times(times, x), Guidance(denoiser, cond, uncond)
    for i, scale in enumerate(scales):
        with_cond, without = (
            convert(evaluate(x, model_t[i]), x, alpha[i], alpha[i] * rho[i], denoiser.prediction, "eps")
            for evaluate in (pair.conditional, pair.unconditional)
        )
        noise = with_cond + (scale - 1) * (with_cond - without)
        x = alpha[i + 1] * (x / alpha[i] + (rho[i + 1] - rho[i]) * noise)
    return x
