"""The form of a denoiser, which samplers call and guidance wraps.

A denoiser is a callable `(x, t) -> prediction` with two attributes, its `schedule` and the kind of its `prediction`.
`Denoiser` gives a network that form. Guidance (and anything else that changes what the network says) takes a denoiser
and is one, so every such wrapper composes with every sampler. Two conventions make that work:

- A sampler calls `start` once before its first evaluation; a wrapper with a state forgets it in `reset()`.
- A wrapper that denoises with one prediction and puts noise back with another (CFG++) returns a `Split` of the two.

Samplers take a `callback(step, time, x)`, called after every step, with the time that it has reached: to watch a run,
or to hold it to something that is known, since a tensor that the callback returns takes the place of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.prediction import PREDICTIONS, Prediction, convert
from trimtab.diffusion.schedules import NoiseSchedule
from trimtab.ops.arguments import one_of, real_problem
from trimtab.ops.callbacks import StepCallback as StepCallback
from trimtab.ops.callbacks import after_step as after_step


class Split(NamedTuple):
    """A clean sample to move to, and a noise to put back, that need not belong to the same prediction."""

    x0: Tensor
    eps: Tensor


class DenoiserLike(Protocol):
    """What samplers and wrappers ask of a denoiser."""

    @property
    def schedule(self) -> NoiseSchedule: ...

    @property
    def prediction(self) -> Prediction: ...

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor | Split: ...


class Denoiser:
    """A network in the form that samplers and guidance expect.

    Args:
        model: called `model(x, t)` with x of shape `(batch, ...)` and t of shape `(batch,)`; guidance calls
            `model(x, t, cond)`.
        schedule: the noise schedule it was trained for.
        prediction: what it predicts: `x0`, `eps`, `v`, `score` or `flow`.

    Raises:
        TypeError: if `model` is not callable or `schedule` is no `NoiseSchedule`.
        ValueError: for an unknown `prediction`.

    Example:
        >>> from trimtab.diffusion.schedules import VPLinear
        >>> denoiser = Denoiser(lambda x, t: torch.zeros_like(x), VPLinear(), prediction="eps")
        >>> predict(denoiser, torch.ones(2, 3), torch.full((2,), 0.5), "x0").shape
        torch.Size([2, 3])
    """

    def __init__(self, model: Callable[..., Tensor], schedule: NoiseSchedule, prediction: Prediction = "eps") -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), got {type(model).__name__}")
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
        one_of("prediction", prediction, PREDICTIONS)
        self.model, self.schedule, self.prediction = model, schedule, prediction

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if problem := real_problem(x=x):
            raise TypeError(problem)
        return self.model(x, t, *args, **kwargs)


class CountNFE:
    """A denoiser that counts its evaluations since the start of the run, in `.count`.

    Guidance that asks for some samples of a batch alone makes fewer evaluations than calls tell: `.per_sample` is their
    number for one sample of the largest batch, on average.

    Example:
        >>> from trimtab.diffusion import deis, grids, schedules
        >>> schedule = schedules.EDM()
        >>> counted = CountNFE(Denoiser(lambda x, t: torch.zeros_like(x), schedule))
        >>> x = deis(counted, schedule.prior(4, 2), grids.karras(schedule, 10))
        >>> counted.count
        10
    """

    def __init__(self, denoiser: DenoiserLike) -> None:
        if problem := form_problem(denoiser=denoiser):
            raise TypeError(problem)
        self.denoiser, self.schedule, self.prediction = denoiser, denoiser.schedule, denoiser.prediction
        self.count = self._samples = self._batch = 0

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **kwargs: Any) -> Tensor | Split:
        if problem := real_problem(x=x):
            raise TypeError(problem)
        self.add(x)
        return self.denoiser(x, t, *args, **kwargs)

    def add(self, x: Tensor) -> None:
        """Count an evaluation of these samples."""
        self.count += 1
        self._samples += len(x)
        self._batch = max(self._batch, len(x))

    @property
    def per_sample(self) -> float:
        """Evaluations for one sample, on average."""
        return self._samples / max(self._batch, 1)

    def reset(self) -> None:
        """Forget the count, as a new run does."""
        self.count = self._samples = self._batch = 0
        reset(self.denoiser)


def form_problem(**denoisers: object) -> str:
    """Which of these arguments lacks the form of a denoiser, as the text of a TypeError; empty if all have it.

    Example:
        >>> form_problem(denoiser=torch.nn.Identity()).partition(":")[0]
        'denoiser must have a schedule and a prediction'
    """
    for name, value in denoisers.items():
        if not callable(value) or not hasattr(value, "schedule") or not hasattr(value, "prediction"):
            return (
                f"{name} must have a schedule and a prediction: wrap the network as Denoiser(model, schedule, "
                f"prediction), got {type(value).__name__}"
            )
    return ""


def reset(denoiser: object) -> None:
    """Have a wrapper forget the state of its last run; nothing for a denoiser without any."""
    forget = getattr(denoiser, "reset", None)
    if forget is not None:
        forget()


def start(denoiser: DenoiserLike, x: Tensor, times: Tensor) -> Float[Tensor, " steps+1"]:
    """Check what a sampler was given, reset the denoiser, and return the times in float64 on the CPU.

    Raises:
        TypeError: if `denoiser` lacks the form, `x` is no floating-point tensor, or `times` are complex.
        ValueError: if `x` has no batch dimension or `times` do not fall.
    """
    if problem := form_problem(denoiser=denoiser):
        raise TypeError(problem)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if times is None:
        raise TypeError("times must be a tensor of falling times, such as those of grids.power, got None")
    if x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must have shape (batch, ...) with at least one sample, got {tuple(x.shape)}")
    if torch.as_tensor(times).is_complex():
        raise TypeError(f"times must be real, got {torch.as_tensor(times).dtype}")
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2 or not bool(torch.isfinite(times).all() & (times.diff() < 0).all()):
        raise ValueError("times must be a 1-d tensor of at least 2 finite, falling times, such as those of grids.power")
    reset(denoiser)
    return times


def levels(schedule: NoiseSchedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and the noise level sigma / alpha at every time, for solvers that divide by them.

    Raises:
        ValueError: if alpha or sigma is 0 at one of them.
    """
    alpha, rho = schedule.alpha(times), schedule.rho(times)
    if not bool(torch.isfinite(rho).all() & (rho > 0).all() & (rho.diff() < 0).all()):
        raise ValueError(
            f"times must keep alpha and sigma positive on {type(schedule).__name__}, got sigma/alpha from "
            f"{rho[0].item():g} to {rho[-1].item():g}; give the grid a t_max below or a t_min above"
        )
    return alpha, rho


def model_times(times: Tensor, x: Tensor) -> Tensor:
    """Times of shape `(steps,)` as a network takes them, `(steps, batch)`, on the device of `x`.

    Half precision would round them, so they are at least float32.
    """
    kept = times.to(x.device, torch.promote_types(x.dtype, torch.float32))
    return kept[:, None].expand(-1, x.shape[0])


def predict(
    denoiser: DenoiserLike, x: Float[Tensor, "batch ..."], t: Float[Tensor, " batch"], kind: Prediction
) -> Float[Tensor, "batch ..."]:
    """The denoiser's prediction as the kind wanted."""
    value = denoiser(x, t)
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    if isinstance(value, Split):
        return value.eps if kind == "eps" else convert(value.x0, x, alpha, sigma, "x0", kind)
    return convert(value, x, alpha, sigma, denoiser.prediction, kind)


def state_and_noise(
    denoiser: DenoiserLike, x: Tensor, t: Float[Tensor, " batch"], alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """What a step of an ODE solver needs: the state it starts from, and the noise in it.

    The state is `x`, unless the denoiser returns a `Split`: then it is the one with that clean part and that noise.

    Raises:
        ValueError: if the prediction has not the shape of `x`.
    """
    value = denoiser(x, t)
    if isinstance(value, Split):
        return alpha * value.x0 + sigma * value.eps, value.eps
    if value.shape != x.shape:
        raise ValueError(f"denoiser must return the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}")
    return x, convert(value, x, alpha, sigma, denoiser.prediction, "eps")
