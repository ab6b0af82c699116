r"""Noise schedules: how much of the data and how much noise is left at time t.

Every schedule states $x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon$ and the inverse of the noise level
$\rho = \sigma/\alpha$. What methods need beyond that (log-SNR, drift, diffusion, prior) is derived here once. Times
grow with the noise; samplers run from `t_max` down to `t_min`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import number, real_problem


@overload
def per_sample(coefficient: Tensor, x: Tensor) -> Tensor: ...
@overload
def per_sample(coefficient: Tensor | float, x: Tensor) -> Tensor | float: ...
def per_sample(coefficient: Tensor | float, x: Tensor) -> Tensor | float:
    """A coefficient of shape `()` or `(batch,)` in a shape that multiplies `x` of shape `(batch, ...)`, if it has not.

    Example:
        >>> per_sample(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 1, 1, 1])
    """
    if not isinstance(coefficient, Tensor) or coefficient.ndim in (0, x.ndim):
        return coefficient
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


@dataclass(frozen=True)
class NoiseSchedule(ABC):
    """What every schedule offers; a new one defines `alpha`, `sigma` and `t_of_rho`.

    Attributes:
        t_min: the least noisy time that samplers go to.
        t_max: the noisiest time, where they start.
    """

    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= number("t_min", self.t_min) < number("t_max", self.t_max) < math.inf:
            raise ValueError(
                f"t_min and t_max must satisfy 0 <= t_min < t_max < inf, got {self.t_min} and {self.t_max}"
            )

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The factor on the data."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The standard deviation of the noise."""

    @abstractmethod
    def t_of_rho(self, rho: Tensor) -> Tensor:
        """The time at which sigma / alpha is `rho`."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for a schedule that finds them faster together."""
        return self.alpha(t), self.sigma(t)

    def rho(self, t: Tensor) -> Tensor:
        """The noise level sigma / alpha, which is the sigma of EDM and k-diffusion; it grows with t."""
        return self.sigma(t) / self.alpha(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma)."""
        return -2 * self.rho(t).log()

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The time of a log signal-to-noise ratio."""
        return self.t_of_rho(torch.exp(-log_snr / 2))

    def f(self, t: Tensor) -> Tensor:
        """The drift's factor, d log alpha / dt: the forward process is dx = f x dt + g dw."""
        return _slope(self.alpha, t) / self.alpha(t)

    def g2(self, t: Tensor) -> Tensor:
        """The squared diffusion, d sigma^2/dt - 2 f sigma^2 = 2 alpha sigma d rho/dt."""
        return 2 * self.alpha(t) * self.sigma(t) * _slope(self.rho, t)

    @property
    def prior_std(self) -> float:
        """The standard deviation of the noise that sampling starts from."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))

    def prior(
        self,
        *shape: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Noise to start sampling from.

        Example:
            >>> EDM().prior(4, 2).shape
            torch.Size([4, 2])
        """
        return self.prior_std * torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha(t) x0 + sigma(t) noise, with `t` of shape `()` or `(batch,)`."""
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * noise


def _slope(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of an element-wise function; works under `torch.no_grad` and `torch.inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        at = t.detach().clone().requires_grad_()
        value = function(at)
        # A constant alpha (EDM, VE) has no graph.
        return torch.autograd.grad(value.sum(), at)[0] if value.requires_grad else torch.zeros_like(at)


@dataclass(frozen=True)
class VPLinear(NoiseSchedule):
    r"""Variance-preserving, linear beta: $\log\alpha = -t^2(\beta_1-\beta_0)/4 - t\beta_0/2$, $\sigma^2 = 1-\alpha^2$.

    Song et al. (2021), arXiv 2011.13456, Appendix C; t in [0, 1].

    Example:
        >>> schedule = VPLinear()
        >>> round(schedule.alpha(torch.tensor(1.0, dtype=torch.float64)).item(), 7)
        0.0065716
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    prior_std: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < number("beta_min", self.beta_min) < number("beta_max", self.beta_max) < math.inf:
            raise ValueError(
                f"beta_min and beta_max must satisfy 0 < beta_min < beta_max < inf, got {self.beta_min} and "
                f"{self.beta_max}"
            )

    def log_alpha(self, t: Tensor) -> Tensor:
        """The logarithm of alpha."""
        return -t * (t * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)

    def alpha(self, t: Tensor) -> Tensor:
        if problem := real_problem(t=t):
            raise TypeError(problem)
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def rho(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.expm1(-2 * self.log_alpha(t)))

    def t_of_rho(self, rho: Tensor) -> Tensor:
        # The quadratic's root in the form without cancellation at small noise.
        level = 2 * torch.log1p(rho**2)
        slope = self.beta_max - self.beta_min
        return level / (self.beta_min + torch.sqrt(self.beta_min**2 + slope * level))


@dataclass(frozen=True)
class SubVP(VPLinear):
    r"""The sub-variance-preserving schedule: alpha of `VPLinear`, $\sigma = 1 - \alpha^2$ (Song et al., 2021)."""

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self.log_alpha(t))

    def rho(self, t: Tensor) -> Tensor:
        return self.sigma(t) / self.alpha(t)

    def t_of_rho(self, rho: Tensor) -> Tensor:
        alpha = 2 / (rho + torch.sqrt(rho**2 + 4))
        return super().t_of_rho(torch.sqrt(1 / alpha**2 - 1))


@dataclass(frozen=True)
class VPCosine(NoiseSchedule):
    r"""Variance-preserving with $\alpha = \cos\theta(t)/\cos\theta(0)$, $\theta = \frac{\pi}{2}\frac{t+s}{1+s}$.

    Nichol and Dhariwal (2021), arXiv 2102.09672. alpha is zero at t = 1, so `t_max` stays below it.
    """

    t_max: float = 0.9946
    s: float = 0.008
    prior_std: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.t_max < 1 and 0 <= number("s", self.s) < math.inf):
            raise ValueError(f"t_max must be below 1 and s at least 0, got {self.t_max} and {self.s}")

    def _angle(self, t: Tensor | float) -> Tensor:
        return cast(Tensor, (t + self.s) / (1 + self.s) * (math.pi / 2))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(self._angle(t)) / math.cos(cast(float, self._angle(0.0)))

    def sigma(self, t: Tensor) -> Tensor:
        start = cast(float, self._angle(0.0))
        angle = self._angle(t)
        return torch.sqrt(torch.sin(angle - start) * torch.sin(angle + start)) / math.cos(start)

    def t_of_rho(self, rho: Tensor) -> Tensor:
        start = cast(float, self._angle(0.0))
        # sin^2 and cos^2 of the angle up to a common factor: atan2 keeps precision at both ends.
        cosine2 = math.cos(start) ** 2 / (1 + rho**2)
        sine2 = math.sin(start) ** 2 + rho**2 * cosine2
        return torch.atan2(sine2.sqrt(), cosine2.sqrt()) * (2 / math.pi) * (1 + self.s) - self.s


@dataclass(frozen=True)
class VE(NoiseSchedule):
    r"""Variance-exploding: $\alpha = 1$, $\sigma = \sigma_{min}(\sigma_{max}/\sigma_{min})^t$ (Song et al., 2021)."""

    t_min: float = 1e-5
    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < number("sigma_min", self.sigma_min) < number("sigma_max", self.sigma_max) < math.inf:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got {self.sigma_min} and "
                f"{self.sigma_max}"
            )

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (t * math.log(self.sigma_max / self.sigma_min)).exp()

    def t_of_rho(self, rho: Tensor) -> Tensor:
        return torch.log(rho / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """alpha = 1 and sigma = t: time is the noise level (Karras et al., 2022, arXiv 2206.00364)."""

    t_min: float = 0.002
    t_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def t_of_rho(self, rho: Tensor) -> Tensor:
        return rho


@dataclass(frozen=True)
class Flow(NoiseSchedule):
    """alpha = 1 - t and sigma = t: the straight paths of flow matching and rectified flow.

    alpha is zero at t = 1; samplers that divide by it need a grid that starts below, such as `t_max=0.999`.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def t_of_rho(self, rho: Tensor) -> Tensor:
        return 1 - 1 / (1 + rho)


class Discrete(NoiseSchedule):
    """A variance-preserving schedule known at integer times: alpha^2 is `alphas_cumprod`, linear in between.

    This is how models of DDPM's kind are trained; times are 0 to `len(alphas_cumprod) - 1`.

    Args:
        alphas_cumprod: alpha^2 at each integer time, falling from near 1, all in (0, 1).

    Raises:
        ValueError: if it is not a falling 1-d sequence of numbers in (0, 1).

    Example:
        >>> schedule = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))
        >>> schedule.t_max
        999.0
    """

    prior_std: ClassVar[float] = 1.0
    alphas_cumprod: Float[Tensor, " times"]

    def __init__(self, alphas_cumprod: Float[Tensor, " times"]) -> None:
        values = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if values.ndim != 1 or len(values) < 2:
            raise ValueError(f"alphas_cumprod must have shape (times,), at least 2, got {tuple(values.shape)}")
        if not bool((values > 0).all() & (values < 1).all() & (values.diff() < 0).all()):
            raise ValueError("alphas_cumprod must fall from each time to the next and lie in (0, 1)")
        super().__init__(t_min=0.0, t_max=float(len(values) - 1))
        object.__setattr__(self, "alphas_cumprod", values)

    def __repr__(self) -> str:
        return f"Discrete({len(self.alphas_cumprod)} times)"

    # A tensor inside: two schedules are equal if they are the same object.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _around(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha^2 at the two integer times around t, and how far t is between them."""
        table = self.alphas_cumprod.to(t.device, torch.promote_types(t.dtype, torch.float32))
        low = t.detach().clamp(0, len(table) - 2).long()
        return table.take(low), table.take(low + 1), (t - low).to(table.dtype)

    def _alpha2(self, t: Tensor) -> Tensor:
        return torch.lerp(*self._around(t)).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha2(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha2(t)).sqrt()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha2 = self._alpha2(t)
        return alpha2.sqrt(), (1 - alpha2).sqrt()

    def g2(self, t: Tensor) -> Tensor:
        # beta = -d log alpha^2 / dt, whose derivative is the table's difference.
        before, after, between = self._around(t)
        return ((before - after) / torch.lerp(before, after, between)).to(t.dtype)

    def t_of_rho(self, rho: Tensor) -> Tensor:
        table = self.alphas_cumprod.to(rho.device, torch.promote_types(rho.dtype, torch.float32))
        alpha2 = 1 / (1 + rho.to(table.dtype) ** 2)
        low = (torch.searchsorted(-table, -alpha2, right=True) - 1).clamp(0, len(table) - 2)
        return (low + (table[low] - alpha2) / (table[low] - table[low + 1])).to(rho.dtype)
