r"""DualFast: fewer sampling steps by correcting the model's error as well as the solver's.

For a trained diffusion model that has to sample in 10 evaluations or fewer. It wraps the denoiser, so it goes with any
sampler, and costs no evaluation: the error of a network is largest where little noise is left, so the noise that it saw
at the first, noisiest step serves as a reference, from which every later prediction is pushed away:

$$
\varepsilon^*_t = \varepsilon_\theta(x_t, t) + c_t\,\bigl(\varepsilon_\theta(x_t, t) -
\varepsilon_\theta(x_\tau, \tau)\bigr), \qquad \tau > t .
$$

$c_t$ grows from 0 at the first step towards c at the end of the schedule, as the error does; c = 0 is the model itself.
`error_decomposition` measures the two errors separately, the network's and the step's.

The paper's text was not available: rule, reference and the growth of $c_t$ follow an account of it; that the growth is
linear in t, and c = 0.2, are choices of this library.

Reference: Hu Yu, Hao Luo, Fan Wang and Feng Zhao, "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion
Models", 2025, arXiv 2506.13058.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.deis import deis_rk
from trimtab.diffusion.denoiser import DenoiserLike, Split, form_problem, reset
from trimtab.diffusion.grids import log_snr
from trimtab.diffusion.prediction import Prediction, convert
from trimtab.diffusion.schedules import NoiseSchedule, per_sample
from trimtab.diffusion.solvers import ddim
from trimtab.ops.arguments import integer, non_negative, one_of, real_problem, same_shape

Growth = Literal["growing", "constant"]


class DualFast:
    """A denoiser whose predictions are pushed away from that of the first step of the run.

    It goes around guidance, `DualFast(ClassifierFreeGuidance(...))`. Within it the first of the two evaluations of a
    step would serve both as the reference.

    Args:
        denoiser: the model with its schedule, guided or not.
        c: how far, at the end of the schedule; 0 leaves the model as it is. Too much does harm where steps are many.
        growth: `growing` from 0 at the first step, linearly in t, or `constant` from the second step on. On `EDM`,
            where t is the noise level, the two are close.

    Raises:
        TypeError: if `denoiser` lacks the form of a denoiser.
        ValueError: if `c` is negative, `growth` is unknown, the denoiser returns a `Split`, or the batch changes
            within a run.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, ddim, degrade, grids, schedules
        >>> model = degrade(AnalyticGMM.ring().denoiser(schedules.VPLinear()), shrink=0.3)
        >>> noise = model.schedule.prior(500, 2, generator=torch.Generator().manual_seed(0))
        >>> times = grids.power(model.schedule, 5, p=1)
        >>> plain, corrected = ddim(model, noise, times), ddim(DualFast(model), noise, times)
        >>> radius = [x.norm(dim=1).mean().item() for x in (plain, corrected)]
        >>> radius[0] < radius[1] < 1  # the model shrinks the ring, whose radius is 1
        True
    """

    def __init__(self, denoiser: DenoiserLike, c: float = 0.2, *, growth: Growth = "growing") -> None:
        if problem := form_problem(denoiser=denoiser):
            raise TypeError(problem)
        self.denoiser, self.c = denoiser, non_negative("c", c)
        self.growth: Growth = one_of("growth", growth, get_args(Growth))
        self._first: tuple[Tensor, Tensor] | None = None

    @property
    def schedule(self) -> NoiseSchedule:
        """The schedule of the wrapped denoiser."""
        return self.denoiser.schedule

    @property
    def prediction(self) -> Prediction:
        """The kind of the wrapped denoiser's prediction."""
        return self.denoiser.prediction

    def reset(self) -> None:
        """Forget the first step; samplers call it before each run."""
        self._first = None
        reset(self.denoiser)

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x, t=t):
            raise TypeError(problem)
        if self._first is not None and self._first[0].shape != x.shape:
            raise ValueError(
                f"x must keep the shape {tuple(self._first[0].shape)} within a run, got {tuple(x.shape)}; "
                "call reset() before a new run"
            )
        value = self.denoiser(x, t, *args, **kwargs)
        if isinstance(value, Split):
            raise TypeError("denoiser returned a Split; a rule that renoises differently must be the outermost wrapper")
        if self.c == 0:
            return value
        (alpha, sigma), kind = self.schedule.alpha_sigma(per_sample(t, x)), self.prediction
        eps = convert(value, x, alpha, sigma, kind, "eps")
        if self._first is None:
            self._first = eps, t
            return value
        reference, start = self._first
        c: Tensor | float = self.c
        if self.growth == "growing":
            c = per_sample(c * ((start - t) / (start - self.schedule.t_min)).clamp(0, 1), x)
        return convert(compensate(eps, reference, c), x, alpha, sigma, "eps", kind)


def compensate(
    eps: Float[Tensor, "batch ..."], reference: Float[Tensor, "batch ..."], c: Tensor | float
) -> Float[Tensor, "batch ..."]:
    """The rule itself, on predicted noises: (1 + c) eps - c reference.

    Example:
        >>> compensate(torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5).tolist()
        [[2.5]]
    """
    if problem := real_problem(eps=eps, reference=reference, c=c):
        raise TypeError(problem)
    if not isinstance(c, Tensor) and not math.isfinite(c):
        raise ValueError(f"c must be finite, got {c}")
    return eps + c * (eps - reference)


@dataclass(frozen=True)
class SamplingErrors:
    """Mean squared errors of a step.

    Attributes:
        approximation: what the network does wrong, with steps so fine that the solver does nothing wrong.
        discretisation: what one large step adds to that.
        total: of the large step, against the truth.
    """

    approximation: float
    discretisation: float
    total: float


def error_decomposition(
    denoiser: DenoiserLike,
    x0: Float[Tensor, "batch ..."],
    s: float,
    t: float,
    *,
    noise: Float[Tensor, "batch ..."],
    steps: int = 100,
    truth: DenoiserLike | None = None,
) -> SamplingErrors:
    """The two errors of sampling from time s down to t: the network's, and that of going in one DDIM step.

    Args:
        denoiser: the model.
        x0: clean samples.
        s: the time to start from, at the sample alpha_s x0 + sigma_s noise.
        t: the time to reach, below s.
        noise: standard normal, of the shape of `x0`.
        steps: of the fine solution, of fourth order.
        truth: an exact denoiser, whose fine solution is then the truth. Without one it is alpha_t x0 + sigma_t noise,
            as in the paper; the ODE does not lead there exactly, since noisy samples do not tell x0, and what an exact
            model would show for it counts as the network's error too.

    Returns:
        The errors, averages over samples and numbers.

    Raises:
        TypeError: if `x0` or `noise` is complex or a NumPy array, or `denoiser` lacks the form of one.
        ValueError: if shapes differ, `steps` is below 1 or the times do not fall.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM, degrade, schedules
        >>> exact = AnalyticGMM.ring(dtype=torch.float64).denoiser(schedules.VPLinear())
        >>> x0 = exact.mixture.sample(100, generator=torch.Generator().manual_seed(0))
        >>> noise = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        >>> of_exact = error_decomposition(exact, x0, 0.5, 0.3, noise=noise, steps=20, truth=exact)
        >>> of_exact.approximation, of_exact.discretisation > 0
        (0.0, True)
        >>> weak = degrade(exact, shrink=0.3)
        >>> error_decomposition(weak, x0, 0.5, 0.3, noise=noise, steps=20, truth=exact).approximation > 1e-4
        True
    """
    if problem := real_problem(x0=x0, noise=noise):
        raise TypeError(problem)
    same_shape("noise", noise, "x0", x0)
    integer("steps", steps)
    if problem := form_problem(denoiser=denoiser):
        raise TypeError(problem)
    schedule = denoiser.schedule
    ends = torch.tensor([s, t], dtype=torch.float64)
    start = schedule.add_noise(x0, noise, ends[0].to(x0.dtype))
    coarse = ddim(denoiser, start, ends)
    times = log_snr(schedule, steps, t_max=s, t_min=t)
    solve = partial(deis_rk, times=times, method="rk4")
    fine = solve(denoiser, start)
    exact = schedule.add_noise(x0, noise, ends[1].to(x0.dtype)) if truth is None else solve(truth, start)
    approximation, discretisation, total = (
        (a - b).square().mean().item() for a, b in ((fine, exact), (coarse, fine), (coarse, exact))
    )
    return SamplingErrors(approximation, discretisation, total)
