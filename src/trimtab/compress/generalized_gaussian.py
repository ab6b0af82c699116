r"""The generalised Gaussian law, between a Laplace law, a Gaussian and a uniform one, and the shape that numbers have.

$$
f(w) = \frac{\nu}{2 a\, \Gamma(1/\nu)} \exp\bigl( -(|w| / a)^{\nu} \bigr)
$$

The estimated shape $\nu$ is the one whose ratio of moments is the measured one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import broadcast_all

from trimtab.ops.arguments import tensor, tensor_problem

_GRID = torch.arange(10, 301, dtype=torch.float64) / 100
"""Shapes among which one is chosen."""


class GeneralizedGaussian(Distribution):
    """The law with density proportional to exp(-(|x| / scale)^shape).

    Args:
        shape: 2 is a Gaussian, 1 a Laplace law; positive.
        scale: positive; sqrt(2) standard deviations of a Gaussian.
        validate_args: as in torch.

    Example:
        >>> law = GeneralizedGaussian(torch.tensor(2.0), torch.tensor(2.0).sqrt())
        >>> normal, x = torch.distributions.Normal(0.0, 1.0), torch.tensor(0.3)
        >>> torch.allclose(law.log_prob(x), normal.log_prob(x))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"shape": constraints.positive, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, shape: float | Tensor, scale: float | Tensor, validate_args: bool | None = None) -> None:
        self.shape, self.scale = broadcast_all(shape, scale)
        super().__init__(self.shape.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GeneralizedGaussian:
        """The same law, of another batch shape."""
        return GeneralizedGaussian(self.shape.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Zero."""
        return torch.zeros_like(self.scale)

    @property
    def variance(self) -> Tensor:
        """scale^2 Gamma(3 / shape) / Gamma(1 / shape)."""
        return self.scale.square() * (torch.lgamma(3 / self.shape) - torch.lgamma(1 / self.shape)).exp()

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the density."""
        if self._validate_args:
            self._validate_sample(value)
        constant = self.shape.log() - math.log(2) - self.scale.log() - torch.lgamma(1 / self.shape)
        return constant - (value / self.scale).abs() ** self.shape

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most this value."""
        beyond = torch.special.gammainc(1 / self.shape, (value / self.scale).abs() ** self.shape)
        found: Tensor = (1 + value.sign() * beyond) / 2
        return found

    def icdf(self, value: Tensor) -> Tensor:
        """The value with this probability below it; by SciPy on the CPU, without a gradient."""
        from scipy.special import gammaincinv

        shape, share = torch.broadcast_tensors(self.shape.detach().double(), 2 * value.detach().double() - 1)
        power = torch.as_tensor(gammaincinv((1 / shape).cpu().numpy(), share.abs().cpu().numpy())).to(self.scale.device)
        found: Tensor = (self.scale * share.sign() * power ** (1 / shape)).to(self.scale.dtype)
        return found

    def entropy(self) -> Tensor:
        """In nats."""
        return 1 / self.shape - self.shape.log() + math.log(2) + self.scale.log() + torch.lgamma(1 / self.shape)

    def rsample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Draws with a gradient with respect to shape and scale.

        A uniform number in [-1, 1) times the power 1 / shape of a Gamma(1 + 1 / shape) number has the law; nothing
        underflows, however large the shape.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        power = (1 + 1 / self.shape).expand(shape).contiguous()
        uniform = torch.rand(shape, generator=generator, dtype=power.dtype, device=power.device)
        gamma: Tensor = torch._standard_gamma(power, generator=generator)
        return (self.scale * uniform.mul_(2).sub_(1)).mul_(gamma ** (1 / self.shape))

    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Draws without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)


def moment_ratio(shape: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """E[w^2] / E[|w|]^2 of the law: pi / 2 for a Gaussian, 2 for a Laplace law; it falls with the shape.

    Example:
        >>> moment_ratio(torch.tensor([1.0, 2.0]))
        tensor([2.0000, 1.5708])
    """
    if problem := tensor_problem(shape=shape):
        raise TypeError(problem)
    return (torch.lgamma(1 / shape) + torch.lgamma(3 / shape) - 2 * torch.lgamma(2 / shape)).exp()


@torch.no_grad()
def estimate_shape(tensors: Tensor | Iterable[Tensor]) -> float:
    """The shape whose ratio of moments is nearest to the measured one, among 0.1, 0.11 to 3; of all tensors together.

    Raises:
        ValueError: there is no number, all are zero, or one is not finite.

    Example:
        >>> estimate_shape(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
        2.0
    """
    parts = float_parts("tensors", tensors)
    count = sum(part.numel() for part in parts)
    absolute, square = (float(sum(part.double().abs().pow(p).sum() for part in parts)) for p in (1, 2))
    if not (absolute > 0 and math.isfinite(square)):
        raise ValueError("tensors must be finite, with one number that is not zero, got others")
    ratio = count * square / absolute**2
    return float(_GRID[(moment_ratio(_GRID) - ratio).abs().argmin()])


def float_parts(name: str, tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """One tensor or several, in a list; refuses by name what is not floating point."""
    parts = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for part in parts:
        tensor(name, part, floating=True)
    return parts
