r"""DEIS: fast deterministic sampling by an exponential integrator (tAB, rhoAB, rhoRK and iPNDM).

For trained diffusion models that have to sample in 5 to 20 evaluations: it needs no training and costs nothing over
DDIM, which is its order 0. `deis` is the multistep form (one evaluation a step), `deis_rk` the Runge-Kutta form
(several), `ipndm` the variant with fixed Adams-Bashforth weights.

The linear part of the probability-flow ODE is solved exactly; only the predicted noise is extrapolated, by the Lagrange
polynomial $L_j$ through its last values, in t (tAB) or in the noise level $\rho = \sigma/\alpha$ (rhoAB):

$$
x_{i+1} = \frac{\alpha_{i+1}}{\alpha_i}\, x_i + \sum_{j=0}^{r} C_{ij}\, \varepsilon_\theta(x_{i-j}, t_{i-j}),
\qquad C_{ij} = \alpha_{i+1} \int_{\rho_i}^{\rho_{i+1}} L_j \, d\rho .
$$

This is Eq. 14-15 of the paper with the integral taken over $\rho$, which holds for every schedule, not only the
variance-preserving ones. rhoRK runs a Runge-Kutta method on $d(x/\alpha)/d\rho = \varepsilon_\theta$.

The authors' release sums the integrals at 10000 points; here they are Gauss-Legendre, a relative 1e-4 away from it.

Reference: Qinsheng Zhang and Yongxin Chen, "Fast Sampling of Diffusion Models with Exponential Integrator", ICLR 2023,
arXiv 2204.13902. iPNDM builds on Liu et al., "Pseudo Numerical Methods for Diffusion Models", ICLR 2022.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trimtab.diffusion.denoiser import (
    DenoiserLike,
    StepCallback,
    after_step,
    levels,
    model_times,
    start,
    state_and_noise,
)
from trimtab.diffusion.schedules import NoiseSchedule
from trimtab.ops.arguments import integer, one_of, real_problem

Variable = Literal["t", "rho", "log_rho"]
RungeKutta = Literal["heun", "kutta3", "rk4"]

_QUADRATURE = tuple(torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(64))
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class Tableau(NamedTuple):
    """A Runge-Kutta method: row s of `stages` weighs the earlier slopes, `nodes[s]` is where in the step it stands."""

    nodes: tuple[float, ...]
    stages: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


_TABLEAUS: dict[RungeKutta, Tableau] = {
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "kutta3": Tableau((0, 1 / 2, 1), ((), (1 / 2,), (-1, 2)), (1 / 6, 4 / 6, 1 / 6)),
    "rk4": Tableau((0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
}


@torch.no_grad()
def deis(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    order: int = 3,
    variable: Variable = "t",
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Sample with the multistep form: tAB-DEIS, or rhoAB-DEIS with `variable="rho"`.

    Args:
        denoiser: the model with its schedule, guided or not; evaluated once per step.
        x: noise at `times[0]`, such as `schedule.prior(...)`.
        times: falling times, such as `grids.power(schedule, 10)`.
        order: degree of the polynomial, 0 (DDIM) to 3; it grows from 0 over the first steps.
        variable: what the polynomial is in: `t`, `rho`, or `log_rho` (the form that diffusers' scheduler has).
        callback: called after every step as `callback(step, time, x)`; a tensor that it returns replaces x.

    Returns:
        The sample at `times[-1]`.

    Raises:
        ValueError: for an `order` below 0 or above 3, an unknown `variable`, times that do not fall, or alpha = 0.

    Example:
        >>> from trimtab.diffusion import Denoiser, grids, schedules
        >>> schedule = schedules.VPLinear()
        >>> standard_normal = Denoiser(lambda x, t: x * schedule.sigma(t)[:, None], schedule, "eps")
        >>> noise = schedule.prior(8, 2, generator=torch.Generator().manual_seed(0))
        >>> x = deis(standard_normal, noise, grids.power(schedule, 20))
        >>> bool(torch.allclose(x, noise, rtol=0.02))  # for standard normal data the ODE stands still
        True
    """
    times = start(denoiser, x, times)
    return _multistep(denoiser, x, times, deis_coefficients(denoiser.schedule, times, order, variable), callback)


@torch.no_grad()
def ipndm(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    order: int = 3,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Sample with iPNDM: DDIM with the noise replaced by its Adams-Bashforth average (Sec. 3.3).

    The weights are those of equal steps, so `times` should be uniform: `grids.power(schedule, steps, p=1)`.
    Arguments and errors are those of `deis`.
    """
    times = start(denoiser, x, times)
    _check_order(order)
    ddim = deis_coefficients(denoiser.schedule, times, order=0)
    weights = torch.zeros(len(ddim), order + 1, dtype=torch.float64)
    for i in range(len(ddim)):
        row = _ADAMS_BASHFORTH[min(i, order)]
        weights[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return _multistep(denoiser, x, times, torch.cat([ddim[:, :1], ddim[:, 1:] * weights], dim=1), callback)


@torch.no_grad()
def deis_rk(
    denoiser: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    method: RungeKutta = "kutta3",
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    """Sample with rhoRK-DEIS: a Runge-Kutta method on d(x/alpha)/d rho = eps.

    Args:
        denoiser: the model with its schedule; evaluated 2, 3 or 4 times per step.
        x: noise at `times[0]`.
        times: falling times.
        method: `heun` (order 2, the sampler of EDM), `kutta3` (3) or `rk4` (4).
        callback: called after every step as `callback(step, time, x)`; a tensor that it returns replaces x.

    Returns:
        The sample at `times[-1]`.

    Raises:
        ValueError: for an unknown `method`, times that do not fall, or alpha = 0.
    """
    times = start(denoiser, x, times)
    one_of("method", method, _TABLEAUS)
    tableau, schedule = _TABLEAUS[method], denoiser.schedule
    alpha, rho = levels(schedule, times)
    steps = rho.diff()

    # Every stage of every step, shape (stages, steps): the ends of a step are its times, not their round trip.
    stage_rho = torch.stack([rho[:-1] + node * steps for node in tableau.nodes])
    inner = torch.tensor([0 < node < 1 for node in tableau.nodes])[:, None]
    ends = torch.stack([times[1:] if node == 1 else times[:-1] for node in tableau.nodes])
    stage_t = torch.where(inner, schedule.t_of_rho(stage_rho), ends)
    stage_alpha, stage_sigma = schedule.alpha(stage_t).tolist(), schedule.sigma(stage_t).tolist()
    model_t = [model_times(row, x) for row in stage_t]

    for i, (h, reached, kept) in enumerate(zip(steps.tolist(), times[1:].tolist(), alpha[1:].tolist(), strict=True)):
        x, first = state_and_noise(denoiser, x, model_t[0][i], stage_alpha[0][i], stage_sigma[0][i])
        y, slopes = x / stage_alpha[0][i], [first]
        for s in range(1, len(tableau.nodes)):
            x = _combine(y, 1.0, [h * a for a in tableau.stages[s]], slopes).mul_(stage_alpha[s][i])
            slopes.append(state_and_noise(denoiser, x, model_t[s][i], stage_alpha[s][i], stage_sigma[s][i])[1])
        x = _combine(y, 1.0, [h * b for b in tableau.weights], slopes).mul_(kept)
        x = after_step(callback, i, reached, x)
    return x


def deis_coefficients(
    schedule: NoiseSchedule, times: Float[Tensor, " steps+1"], order: int = 3, variable: Variable = "t"
) -> Float64[Tensor, "steps order+2"]:
    r"""The table of the multistep form: per step the factor on x, then those on the noises, newest first.

    The polynomial $L_j$ is written in $u = (s - s_i)/(s_{i+1} - s_i)$ for the variable s. Its weights follow from the
    moments $\int u^m d\rho$, by parts $\rho_{i+1} - \rho_i - m\int_0^1 u^{m-1} (\rho - \rho_i)\, du$: no derivative of
    the schedule is needed, and order 0 is DDIM exactly.

    Raises:
        TypeError: `schedule` is no `NoiseSchedule`, or `times` are an array or complex.
        ValueError: as `deis`.

    Example:
        >>> from trimtab.diffusion import schedules
        >>> deis_coefficients(schedules.EDM(), torch.tensor([3.0, 2.0, 1.0]), order=1, variable="rho").tolist()
        [[1.0, -1.0, 0.0], [1.0, -1.5, 0.5]]
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    if problem := real_problem(times=times):
        raise TypeError(problem)
    if not isinstance(times, Tensor) or times.ndim != 1 or len(times) < 2:
        raise ValueError("times must be a 1-d tensor of at least 2 finite, falling times, such as those of grids.power")
    _check_order(order)
    one_of("variable", variable, get_args(Variable))
    times = times.to(torch.float64)
    alpha, rho = levels(schedule, times)
    s = {"t": times, "rho": rho, "log_rho": rho.log()}[variable]
    h = s.diff()
    steps = len(h)

    u, weight = (_QUADRATURE[0] + 1) / 2, _QUADRATURE[1] / 2
    between = s[:-1, None] + h[:, None] * u
    to_rho: dict[str, Callable[[Tensor], Tensor]] = {"t": schedule.rho, "rho": torch.clone, "log_rho": torch.exp}
    rise = to_rho[variable](between) - rho[:-1, None]
    degrees = torch.arange(1, order + 1)
    powers = degrees[:, None] * u ** (degrees[:, None] - 1)
    whole = rho.diff()[:, None]
    moments = torch.cat([whole, whole - (rise * weight) @ powers.T.to(torch.float64)], dim=1)

    table = torch.zeros(steps, order + 2, dtype=torch.float64)
    table[:, 0] = alpha[1:] / alpha[:-1]
    for degree in range(min(order, steps - 1) + 1):
        # Row i can look back i steps, so the degree grows until it is the order.
        rows = torch.arange(degree, steps if degree == order else degree + 1)
        nodes = (s[rows[:, None] - torch.arange(degree + 1)] - s[rows, None]) / h[rows, None]
        vandermonde = nodes[:, None, :] ** torch.arange(degree + 1)[:, None]
        solution = torch.linalg.solve(vandermonde, moments[rows, : degree + 1, None])[..., 0]
        table[rows, 1 : degree + 2] = alpha[rows + 1, None] * solution
    return table


def _multistep(
    denoiser: DenoiserLike, x: Tensor, times: Tensor, table: Tensor, callback: StepCallback | None
) -> Tensor:
    alpha, sigma = denoiser.schedule.alpha(times).tolist(), denoiser.schedule.sigma(times).tolist()
    model_t = model_times(times[:-1], x)
    noises: deque[Tensor] = deque(maxlen=table.shape[1] - 1)
    for i, (reached, (psi, *weights)) in enumerate(zip(times[1:].tolist(), table.tolist(), strict=True)):
        x, eps = state_and_noise(denoiser, x, model_t[i], alpha[i], sigma[i])
        noises.appendleft(eps)
        x = after_step(callback, i, reached, _combine(x, psi, weights, noises))
    return x


def _combine(x: Tensor, factor: float, weights: list[float], noises: Iterable[Tensor]) -> Tensor:
    """factor x + sum_j weights_j noises_j, in one new tensor."""
    out = x * factor
    for weight, noise in zip(weights, noises, strict=False):  # the table is wider than a short history
        if weight != 0:
            out.add_(noise, alpha=weight)
    return out


def _check_order(order: int) -> None:
    integer("order", order, 0, 3)
