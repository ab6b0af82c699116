r"""Score-based generation through stochastic differential equations: predictor-corrector sampling and exact likelihood.

For any trained diffusion model, whatever it predicts: `predictor_corrector` samples by the reverse SDE, a step down in
noise and then Langevin steps at the same noise, which mend what the step did wrong; `log_likelihood` is the density of
clean samples under the model; `inpaint` fills in what is missing. Samplers that solve the ODE are `deis` and its kin.

Noising is $dx = f x\,dt + g\,dw$. Its reverse, and the ODE with the same distribution at every time, need the score
$s = \nabla\log p_t$ alone:

$$
dx = (f x - g^2 s)\,dt + g\,d\bar w, \qquad dx = (f x - \tfrac12 g^2 s)\,dt .
$$

A step from time s to t < s has $a = \alpha_s/\alpha_t$ and $G^2 = \sigma_s^2 - a^2\sigma_t^2$, the noise that the
forward process adds between them. The predictors, and the corrector with its signal-to-noise ratio r, are

$$
\begin{aligned}
\text{reverse diffusion:}\quad & x \leftarrow (2 - a)\,x + G^2 s + G z \\
\text{ancestral:}\quad & x \leftarrow (x + G^2 s)/a + G z
    \quad\text{(where } \alpha \text{ is constant: } G\,\tfrac{\sigma_t}{\sigma_s} z\text{)} \\
\text{Euler-Maruyama:}\quad & x \leftarrow x + (f x - g^2 s)(t - s) + g\sqrt{s - t}\,z \\
\text{Langevin:}\quad & x \leftarrow x + \epsilon s + \sqrt{2\epsilon}\,z,
    \qquad \epsilon = 2 a^2 \left(r\,\lVert z\rVert / \lVert s\rVert\right)^2 .
\end{aligned}
$$

For the variance-preserving SDE $a^2 = 1 - \beta_i$ of DDPM; here it is taken from the schedule itself, on any times,
where the authors' release has $\beta_i = \beta(t_i)/N$ on equal ones. As in the release, a step corrects first and then
predicts, and the last prediction adds no noise.

Reference: Yang Song, Jascha Sohl-Dickstein, Diederik P. Kingma, Abhishek Kumar, Stefano Ermon and Ben Poole,
"Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021, arXiv 2011.13456.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.diffusion.denoiser import (
    DenoiserLike,
    StepCallback,
    after_step,
    form_problem,
    levels,
    model_times,
    predict,
    reset,
    start,
)
from trimtab.diffusion.schedules import NoiseSchedule
from trimtab.ops.arguments import finite_tensor, integer, one_of, positive, same_shape

Predictor = Literal["reverse_diffusion", "ancestral", "euler_maruyama"]
Divergence = Literal["hutchinson", "exact"]


@torch.no_grad()
def predictor_corrector(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    predictor: Predictor | None = "reverse_diffusion",
    corrections: int = 1,
    snr: float = 0.16,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Sample by the reverse SDE, with Langevin corrections.

    Args:
        denoiser: the model with its schedule, guided or not; evaluated `1 + corrections` times per step.
        x: noise at `times[0]`.
        times: falling times; the SDE wants many, 100 or more.
        predictor: `reverse_diffusion`, `ancestral` or `euler_maruyama`; None only corrects, at every time in turn.
        corrections: Langevin steps before each prediction; 0 only predicts.
        snr: r, the corrector's signal-to-noise ratio; the authors use 0.16 for variance-exploding and 0.01 for
            variance-preserving schedules.
        per_sample: whether each sample has a step size of its own. The authors take the average of norms over the
            batch, so that a sample depends on the others.
        generator: decides the noise; on the device of `x`.
        callback: called after every step as `callback(step, time, x)`; a tensor that it returns replaces x.

    Returns:
        The sample at `times[-1]`, without the last prediction's noise.

    Raises:
        ValueError: for an unknown `predictor`, neither predictor nor corrections, `snr` that is not positive, or
            times that do not fall or at which alpha or sigma is 0.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, grids, schedules
        >>> ring = AnalyticGMM.ring(8, radius=1.0, std=0.1).denoiser(schedules.VE(sigma_max=10.0))
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = ring.schedule.prior(500, 2, generator=generator)
        >>> x = predictor_corrector(ring, noise, grids.log_snr(ring.schedule, 100), generator=generator)
        >>> round(x.norm(dim=1).mean().item(), 1)
        1.0
    """
    times = start(denoiser, x, times)
    if predictor is not None:
        one_of("predictor", predictor, get_args(Predictor))
    if integer("corrections", corrections, 0) == 0 and predictor is None:
        raise ValueError("corrections must be at least 1 without a predictor, got 0")
    positive("snr", snr)
    schedule, steps = denoiser.schedule, len(times) - 1
    alpha, rho = levels(schedule, times)
    kept = (alpha[:-1] / alpha[1:]).tolist()
    # sigma_s^2 - a^2 sigma_t^2 without the cancellation
    added = (alpha[:-1].square() * (rho[:-1] - rho[1:]) * (rho[:-1] + rho[1:])).tolist()
    drift, g2 = schedule.f(times).tolist(), schedule.g2(times).tolist()
    model_t = model_times(times[:-1], x)

    def step(x: Tensor, i: int) -> Tensor:
        mean: Tensor
        for _ in range(corrections):
            x = _langevin(x, score(x, i), normal(x), kept[i] ** 2, snr, per_sample)
        if predictor is None:
            return x
        s = score(x, i)
        if predictor == "euler_maruyama":
            h = (times[i + 1] - times[i]).item()
            mean, spread = x + (drift[i] * x - g2[i] * s) * h, math.sqrt(-g2[i] * h)
        elif predictor == "ancestral":
            mean, spread = (x + added[i] * s) / kept[i], math.sqrt(added[i])
            if kept[i] == 1:
                spread *= (rho[i + 1] / rho[i]).item()
        else:
            mean, spread = (2 - kept[i]) * x + added[i] * s, math.sqrt(added[i])
        return mean if i == steps - 1 else mean + spread * normal(x)

    def score(x: Tensor, i: int) -> Tensor:
        return predict(denoiser, x, model_t[i], "score").to(x.dtype)

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    for i, reached in enumerate(times[1:].tolist()):
        x = after_step(callback, i, reached, step(x, i))
    return x


def _langevin(x: Tensor, score: Tensor, noise: Tensor, factor: float, snr: float, per_sample: bool) -> Tensor:
    """A step of the corrector."""
    push, want = score.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1)
    if not per_sample:
        push, want = push.mean(), want.mean()
    size = 2 * factor * (snr * want / push.clamp_min(torch.finfo(push.dtype).tiny)) ** 2
    size = size.reshape((-1,) + (1,) * (x.ndim - 1))
    moved: Tensor = x + size * score + (2 * size).sqrt() * noise
    return moved


def known_region(
    schedule: NoiseSchedule,
    data: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "batch ..."],
    *,
    generator: torch.Generator | None = None,
) -> Callable[[int, float, Tensor], Tensor]:
    """A callback that holds a run to what is known, for any sampler: known numbers, noised to the time reached.

    Args:
        schedule: of the denoiser.
        data: the samples, of which only the known numbers are read.
        mask: where they are known.
        generator: decides the noise.

    Raises:
        TypeError: if `data` is no real tensor, or `mask` not a boolean one.
        ValueError: if its shape is not that of `data`.

    Example:
        >>> from trimtab.diffusion import EDM
        >>> hold = known_region(EDM(), torch.tensor([[5.0, 0.0]]), torch.tensor([[True, False]]))
        >>> hold(0, 0.0, torch.tensor([[1.0, 2.0]]))
        tensor([[5., 2.]])
    """
    if not isinstance(data, Tensor) or not isinstance(mask, Tensor):
        raise TypeError(f"data and mask must be tensors, got {type(data).__name__} and {type(mask).__name__}")
    if data.is_complex():
        raise TypeError(f"data must be real, got {data.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, true where data are known, got {mask.dtype}")
    same_shape("mask", mask, "data", data)

    def hold(step: int, time: float, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        noisy = schedule.add_noise(data, noise, torch.tensor(time, dtype=torch.float64, device=x.device))
        return torch.where(mask, noisy.to(x.dtype), x)

    return hold


def inpaint(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    data: Float[Tensor, "batch ..."],
    mask: Bool[Tensor, "batch ..."],
    *,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Float[Tensor, "batch ..."]:
    """Fill in what is missing, by a model that was not trained to.

    After every step of `predictor_corrector` what is known is put back in, noised to the time reached. (The release
    puts it back after the corrector as well as after the predictor.) For other samplers `known_region` does the same.

    Args:
        denoiser: the model with its schedule.
        x: noise at `times[0]`.
        times: falling times.
        data: the samples, of which only the known numbers are read.
        mask: where they are known.
        generator: decides all noise.
        **settings: of `predictor_corrector`.

    Returns:
        Samples whose known numbers are exactly those of `data`.

    Raises:
        TypeError: if `mask` is not boolean, or `data` or `times` are complex.
        ValueError: if shapes differ, or as `predictor_corrector`.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, grids, schedules
        >>> ends = AnalyticGMM.isotropic(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), std=0.1)
        >>> model = ends.denoiser(schedules.VE(sigma_max=5.0))
        >>> data, mask = torch.tensor([[0.9, 0.0]]), torch.tensor([[True, False]])
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = model.schedule.prior(1, 2, generator=generator)
        >>> x = inpaint(model, noise, grids.log_snr(model.schedule, 100), data, mask, generator=generator)
        >>> x[0, 0].item() == data[0, 0].item(), 0.5 < x[0, 1].item() < 1.5
        (True, True)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if problem := form_problem(denoiser=denoiser):
        raise TypeError(problem)
    if times is not None and torch.as_tensor(times).is_complex():
        raise TypeError(f"times must be real, got {torch.as_tensor(times).dtype}")
    if times is None or torch.as_tensor(times).ndim != 1 or len(times) < 2:
        raise ValueError("times must be a 1-d tensor of at least 2 finite, falling times, such as those of grids.power")
    same_shape("data", data, "x", x)
    hold = known_region(denoiser.schedule, data, mask, generator=generator)
    first = hold(0, float(times[0]), x)
    filled = predictor_corrector(denoiser, first, times, generator=generator, callback=hold, **settings)
    return torch.where(mask, data, filled)


def log_likelihood(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    *,
    divergence: Divergence = "hutchinson",
    probe: Float[Tensor, "batch ..."] | None = None,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-5,
) -> Float[Tensor, " batch"]:
    r"""log p(x) under the model: the ODE carries x to noise, of known density, and its divergence is integrated along.

    $\log p_0(x) = \log p_T(x_T) + \int_0^T \nabla\cdot(f x - \tfrac12 g^2 s)\,dt$, from the schedule's `t_min` to its
    `t_max` by RK45; that takes a few hundred evaluations, each with a backward pass.

    Args:
        denoiser: the model with its schedule; differentiable in x.
        x: clean samples.
        divergence: `hutchinson`, an unbiased estimate by v^T J v with random signs v, or `exact`, with as many
            backward passes as a sample has numbers.
        probe: v, of the shape of `x`; drawn where it is not given.
        generator: decides the probe.
        tolerance: relative and absolute, of the integration.

    Returns:
        Natural logarithms, in float64; divide by -log(2) times the numbers in a sample for bits per dimension.

    Raises:
        TypeError: if `denoiser` lacks the form, or `probe` is no floating-point tensor.
        ValueError: for an unknown `divergence`, a `probe` of another shape, `x` or a `probe` that is not finite, or a
            model that is not finite or with which the integration does not reach its end.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, schedules
        >>> data = AnalyticGMM.isotropic(torch.zeros(1, 2, dtype=torch.float64), std=1.0)
        >>> x = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=torch.float64)
        >>> log_likelihood(data.denoiser(schedules.VPLinear()), x, divergence="exact")
        tensor([-1.8379, -2.8379], dtype=torch.float64)
    """
    from scipy.integrate import solve_ivp

    start(denoiser, x, torch.tensor([1.0, 0.0]))
    schedule = denoiser.schedule
    finite_tensor("x", x)
    one_of("divergence", divergence, get_args(Divergence))
    positive("tolerance", tolerance)
    if probe is None:
        signs = torch.randint(0, 2, x.shape, generator=generator, device=x.device)
        probe = signs.to(x.dtype) * 2 - 1
    if not isinstance(probe, Tensor):
        raise TypeError(f"probe must be a tensor, got {type(probe).__name__}")
    if not probe.is_floating_point():
        raise TypeError(f"probe must be floating point, got {probe.dtype}")
    if not bool(torch.isfinite(probe).all()):
        raise ValueError("probe must be finite, got NaN or infinity")
    same_shape("probe", probe, "x", x)

    def slope(time: float, state: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        t = torch.tensor(time, dtype=torch.float64)
        drift, half = float(schedule.f(t)), 0.5 * float(schedule.g2(t))
        at = torch.from_numpy(state[: x.numel()].copy()).reshape(x.shape).to(x.device, x.dtype)
        # The state is cloned, since one that was made in inference mode takes no gradients.
        with torch.inference_mode(False), torch.enable_grad():
            at = at.clone().requires_grad_()
            moved = drift * at - half * predict(denoiser, at, model_times(t[None], at)[0], "score")
            spread = _trace(moved, at, probe if divergence == "hutchinson" else None)
        # The solver would look for a step small enough for ever.
        if not bool(torch.isfinite(moved).all() & torch.isfinite(spread).all()):
            raise ValueError(f"denoiser must be finite and smooth, got NaN or infinity at time {time:g}")
        return np.concatenate([part.detach().double().cpu().numpy().ravel() for part in (moved, spread)])

    first = np.concatenate([x.detach().double().cpu().numpy().ravel(), np.zeros(len(x))])
    ends = (schedule.t_min, schedule.t_max)
    solved = solve_ivp(slope, ends, first, method="RK45", rtol=tolerance, atol=tolerance)
    reset(denoiser)
    if not solved.success:
        raise ValueError(f"denoiser must be finite and smooth from {ends[0]:g} to {ends[1]:g}, got {solved.message}")
    last = torch.from_numpy(solved.y[:, -1])
    noise, grown = last[: x.numel()].reshape(len(x), -1), last[x.numel() :]
    std = schedule.prior_std
    prior = -0.5 * (noise / std).square().sum(1) - noise.shape[1] * (math.log(std) + 0.5 * math.log(2 * math.pi))
    total: Tensor = (prior + grown).to(x.device)
    return total


def _trace(value: Tensor, at: Tensor, probe: Tensor | None) -> Tensor:
    """Per sample the trace of d value / d at, or its estimate with a probe."""
    if probe is not None:
        (row,) = torch.autograd.grad(value, at, probe)
        return (row * probe).flatten(1).sum(1)
    flat, total = value.flatten(1), value.new_zeros(len(value))
    for i in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, i].sum(), at, retain_graph=True)
        total = total + row.flatten(1)[:, i]
    return total.detach()
