r"""What consistency models share: noise levels, pairs of neighbours on one noising path, robust distances, sampling.

A consistency function maps a noisy sample at any level to the start of its path. It is trained to say the same at two
neighbouring levels $\sigma_i < \sigma_{i+1}$ of one path $x + \sigma z$,

$$
d\bigl(f_\theta(x + \sigma_{i+1} z, \sigma_{i+1}),\ f_{\theta^-}(x + \sigma_i z, \sigma_i)\bigr),
$$

with a teacher $\theta^-$ that gets no gradient. `ConsistencyPreconditioned` makes such a function of a network.

Reference: Yang Song, Prafulla Dhariwal, Mark Chen and Ilya Sutskever, "Consistency Models", ICML 2023, arXiv
2303.01469.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trimtab.diffusion import grids
from trimtab.diffusion.denoiser import DenoiserLike, StepCallback, after_step, model_times, predict, start
from trimtab.diffusion.schedules import EDM
from trimtab.ops.arguments import integer, positive, real_problem, same_shape

Distance = Callable[[Tensor, Tensor, float], Tensor]
"""Maps two batches and a scale to a distance per sample."""


def noise_levels(schedule: EDM, count: int, rho: float = 7.0) -> Float64[Tensor, " count"]:
    """The discretisation, rising from the least noise to the most: uniform in sigma^(1/rho).

    Args:
        schedule: the range of noise levels.
        count: how many, at least 2.
        rho: 7 puts most of them at small noise (Karras et al., 2022, Eq. 5).

    Raises:
        ValueError: `count` is below 2 or `rho` is not positive.

    Example:
        >>> noise_levels(EDM(t_min=1.0, t_max=9.0), 3, rho=2.0).tolist()
        [1.0, 4.0, 9.0]
    """
    return grids.karras(schedule, integer("count", count, 2) - 1, rho).flip(0)


def pseudo_huber(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."], c: float) -> Float[Tensor, " batch"]:
    r"""The distance $\sqrt{\|a - b\|^2 + c^2} - c$ of each sample: quadratic when small, then linear.

    Args:
        a, b: samples.
        c: scale, positive; iCT has 0.00054 times the root of the dimension.

    Raises:
        TypeError: `a` or `b` is no real tensor.
        ValueError: shapes differ or `c` is not positive.

    Example:
        >>> pseudo_huber(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), c=4.0)
        tensor([1.])
    """
    positive("c", c)
    square = _squared_distance(a, b)
    return square / ((square + c**2).sqrt() + c)  # the difference itself cancels where it is small


def cauchy(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."], c: float) -> Float[Tensor, " batch"]:
    r"""The distance $\log(1 + \|a - b\|^2 / 2c^2)$ of each sample: the pull of far ones falls as one over distance.

    Arguments and errors are those of `pseudo_huber`.

    Example:
        >>> cauchy(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), c=1.0).exp()
        tensor([3.])
    """
    positive("c", c)
    return torch.log1p(_squared_distance(a, b) / (2 * c**2))


def geman_mcclure(a: Float[Tensor, "batch ..."], b: Float[Tensor, "batch ..."], c: float) -> Float[Tensor, " batch"]:
    r"""The distance $2\|a - b\|^2 / (\|a - b\|^2 + 4c^2)$ of each sample, which never exceeds 2.

    Arguments and errors are those of `pseudo_huber`. The scale is that of Barron's family, so that small distances
    weigh as they do in `cauchy`: $\|a - b\|^2 / 2c^2$.

    Example:
        >>> geman_mcclure(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), c=1.0)
        tensor([1.])
    """
    positive("c", c)
    square = _squared_distance(a, b)
    return 2 * square / (square + 4 * c**2)


def neighbours(
    function: DenoiserLike,
    x0: Float[Tensor, "batch ..."],
    noise: Float[Tensor, "batch ..."],
    low: Float[Tensor, " batch"],
    high: Float[Tensor, " batch"],
    *further: Any,
    teacher: DenoiserLike | None = None,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:
    """What the student says at the higher noise level, and the teacher, without gradient, at the lower one.

    Both see the same noise, and what they draw at random (dropout) is the same.

    Args:
        function: the student.
        x0: clean samples.
        noise: standard normal, of the shape of `x0`.
        low, high: noise levels per sample.
        *further: what the function takes beside x and t, such as a class.
        teacher: a function whose weights are an average of the student's; None is the student itself.

    Returns:
        The student's output and its target.

    Raises:
        TypeError: a tensor is complex, or a NumPy array.
        ValueError: `noise` has not the shape of `x0`, or the levels are not one per sample.

    Example:
        >>> from trimtab.diffusion import Denoiser
        >>> identity = Denoiser(lambda x, t: x, EDM(), "x0")
        >>> x0, one = torch.zeros(1, 1), torch.ones(1)
        >>> student, target = neighbours(identity, x0, torch.ones(1, 1), low=one, high=2 * one)
        >>> student.item(), target.item()
        (2.0, 1.0)
    """
    if problem := real_problem(x0=x0, noise=noise, low=low, high=high):
        raise TypeError(problem)
    same_shape("noise", noise, "x0", x0)
    for name, level in (("low", low), ("high", high)):
        if level.shape != x0.shape[:1]:
            raise ValueError(f"{name} must have shape ({len(x0)},), one per sample, got {tuple(level.shape)}")
    schedule, cuda = function.schedule, [x0.device] if x0.device.type == "cuda" else []
    before = torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)
    student = _plain(function(schedule.add_noise(x0, noise, high), high, *further))
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        torch.set_rng_state(before[0])
        for device, state in zip(cuda, before[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
        told = function if teacher is None else teacher
        target = _plain(told(schedule.add_noise(x0, noise, low), low, *further))
    return student, target


@torch.no_grad()
def consistency_sample(
    function: DenoiserLike,
    x: Float[Tensor, "batch ..."],
    times: Float[Tensor, " steps+1"],
    *,
    generator: torch.Generator | None = None,
    callback: StepCallback | None = None,
) -> Float[Tensor, "batch ..."]:
    r"""Sample with a consistency function: jump to the start of the path, put noise back, jump again.

    After the jump from $t_i$, the sample goes to $t_{i+1}$ by noise of variance $\rho_{i+1}^2 - \rho_N^2$ (Algorithm 1
    of Consistency Models), for what it jumped to is held to have the noise of the last time.

    Args:
        function: the consistency function; evaluated once per step. Guided ones go too.
        x: noise at `times[0]`.
        times: falling times; those before the last are jumped from, the last is where the function's jumps end, its
            schedule's `t_min`. One step: `torch.tensor([80.0, 0.002])`; two: `torch.tensor([80.0, 0.821, 0.002])`.
        generator: decides the noise put back, on the device of `x`.
        callback: called after every step as `callback(step, time, x)`; a tensor that it returns replaces x.

    Returns:
        The sample at `times[-1]`.

    Raises:
        ValueError: times that do not fall.

    Example:
        >>> from trimtab.diffusion import AnalyticGMM
        >>> point = AnalyticGMM.isotropic(torch.tensor([[1.0, 2.0]]), std=0.0).denoiser(EDM())
        >>> consistency_sample(point, EDM().prior(1, 2), torch.tensor([80.0, 0.8, 0.002]))
        tensor([[1., 2.]])
    """
    times = start(function, x, times)
    alpha, rho = function.schedule.alpha(times).tolist(), function.schedule.rho(times).tolist()
    for i, t in enumerate(model_times(times[:-1], x)):
        x = alpha[i + 1] * predict(function, x, t, "x0")
        spread = max(rho[i + 1] ** 2 - rho[-1] ** 2, 0.0) ** 0.5
        if spread:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            x = x + alpha[i + 1] * spread * noise
        x = after_step(callback, i, times[i + 1].item(), x)
    return x


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        raise TypeError(f"a and b must be tensors, got {type(a).__name__} and {type(b).__name__}")
    if problem := real_problem(a=a, b=b):
        raise TypeError(problem)
    same_shape("b", b, "a", a)
    return (a - b).square().flatten(1).sum(1)


def _plain(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"function must return one prediction, got {type(value).__name__}")
    return value
