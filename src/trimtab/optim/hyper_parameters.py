r"""Hyper-parameters as parameters: numbers with a range, held without bounds so that gradient descent can move them.

$$
\lambda = \begin{cases}
  \mathrm{low} + (\mathrm{high} - \mathrm{low})\,\sigma(h) & \text{both bounds finite} \\
  \mathrm{low} + \log(1 + e^{h}) \;\text{ or }\; \mathrm{high} - \log(1 + e^{h}) & \text{one of them} \\
  h & \text{none}
\end{cases}
\qquad
\tilde h = h + \log(1 + e^{\rho})\,\varepsilon, \quad \varepsilon \sim \mathcal N(0, 1)
$$

Reference: Matthew MacKay, Paul Vicol, Jon Lorraine, David Duvenaud, Roger Grosse, "Self-Tuning Networks", ICLR 2019,
arXiv 1903.03088.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.ops.arguments import integer, positive, tensor_problem


def constrain(x: Float[Tensor, "..."], low: float = -math.inf, high: float = math.inf) -> Float[Tensor, "..."]:
    """A value between the bounds for every real number: a stretched sigmoid, a softplus, or the number itself.

    Args:
        x: any real numbers.
        low, high: the bounds; either may be infinite.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `low` is not below `high`.

    Example:
        >>> constrain(torch.tensor([-2.8332, 0.0]), 0.0, 0.9)
        tensor([0.0500, 0.4500])
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if not low < high:
        raise ValueError(f"low must be below high = {high}, got {low}")
    if math.isfinite(low) and math.isfinite(high):
        return low + (high - low) * x.sigmoid()
    if math.isfinite(low):
        return low + F.softplus(x)
    return high - F.softplus(x) if math.isfinite(high) else x


def unconstrain(value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """The number that `constrain` maps to this value.

    Args:
        value: strictly between the bounds.
        low, high: the bounds; either may be infinite.

    Raises:
        ValueError: `value` is not strictly between the bounds.

    Example:
        >>> round(unconstrain(0.05, 0.0, 0.9), 7)
        -2.8332133
    """
    if not low < value < high:
        raise ValueError(f"value must be strictly between low = {low:g} and high = {high:g}, got {value:g}")
    if math.isfinite(low) and math.isfinite(high):
        return math.log(value - low) - math.log(high - value)
    if math.isfinite(low):
        return _inverse_softplus(value - low)
    return _inverse_softplus(high - value) if math.isfinite(high) else value


def _inverse_softplus(value: float) -> float:
    return value + math.log(-math.expm1(-value))


@dataclass(frozen=True)
class HyperParameter:
    """One number to tune.

    Attributes:
        init: its value at the start, strictly between the bounds; for a discrete one an integer in [low, high).
        low, high: its bounds; either may be infinite.
        scale: deviation of the perturbations at the start, in the unbounded space; positive.
        discrete: rounded down to an integer where it is used; perturbations and gates see the continuous number.
        per_example: every example of a batch has its own perturbation; otherwise one is shared by the batch.

    Raises:
        ValueError: a field is out of its range.
    """

    init: float
    low: float = -math.inf
    high: float = math.inf
    scale: float = 0.5
    discrete: bool = False
    per_example: bool = True

    def __post_init__(self) -> None:
        positive("scale", self.scale)
        if self.discrete and not float(self.init).is_integer():
            raise ValueError(f"init must be an integer where discrete, got {self.init}")
        if not self.low < self.init + 0.5 * self.discrete < self.high:
            raise ValueError(
                f"init must be strictly between low = {self.low:g} and high = {self.high:g}, got {self.init}"
            )

    def start(self) -> float:
        """Where it starts in the unbounded space: a discrete one in the middle between its value and the next."""
        return unconstrain(self.init + 0.5 * self.discrete, self.low, self.high)


class HyperParameters(nn.Module):
    """Named hyper-parameters that a network answers to, as two vectors: where they are, and how far to perturb them.

    The order of the names is the order of the entries of `h` and of `rho`.

    Args:
        items: by name.

    Attributes:
        specs: the items.
        h: (hyper,), the hyper-parameters in the unbounded space.
        rho: (hyper,), the deviation of the perturbations is its softplus.

    Raises:
        TypeError: an item is not a `HyperParameter`.
        ValueError: there is none.

    Example:
        >>> hparams = HyperParameters({"dropout": HyperParameter(0.05, 0.0, 0.9), "l2": HyperParameter(1e-4, 0.0)})
        >>> {name: round(value.item(), 5) for name, value in hparams.values().items()}
        {'dropout': 0.05, 'l2': 0.0001}
        >>> hparams.values(hparams.sample(32))["dropout"].shape
        torch.Size([32])
    """

    shared: Tensor

    def __init__(self, items: Mapping[str, HyperParameter]) -> None:
        super().__init__()
        if not items:
            raise ValueError("items must be at least one, got none")
        for name, item in items.items():
            if not isinstance(item, HyperParameter):
                raise TypeError(f"items[{name!r}] must be a HyperParameter, got {type(item).__name__}")
        self.specs = dict(items)
        self.h = nn.Parameter(torch.tensor([item.start() for item in items.values()]))
        self.rho = nn.Parameter(torch.tensor([_inverse_softplus(item.scale) for item in items.values()]))
        shared = torch.tensor([not item.per_example for item in items.values()])
        self.register_buffer("shared", shared, persistent=False)

    def __len__(self) -> int:
        return len(self.specs)

    def scales(self) -> Float[Tensor, " hyper"]:
        """Deviations of the perturbations."""
        return F.softplus(self.rho)

    def entropy(self) -> Float[Tensor, ""]:
        """Entropy of the perturbations, in nats."""
        return (self.scales().log() + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def sample(
        self,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        noise: Float[Tensor, "batch hyper"] | None = None,
    ) -> Float[Tensor, "batch hyper"]:
        """Perturbed hyper-parameters in the unbounded space, one row an example.

        Args:
            batch_size: number of rows.
            generator: for the noise.
            noise: standard normal numbers to use in place of drawn ones.

        Raises:
            TypeError: `batch_size` is no integer.
            ValueError: it is below 1, or `noise` is not of the shape (batch_size, hyper).
        """
        if integer("batch_size", batch_size) < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if noise is None:
            noise = torch.randn(batch_size, len(self), generator=generator, dtype=self.h.dtype, device=self.h.device)
        elif noise.shape != (batch_size, len(self)):
            raise ValueError(f"noise must be of shape {(batch_size, len(self))}, got {tuple(noise.shape)}")
        return self.h + self.scales() * torch.where(self.shared, noise[:1], noise)

    def values(self, h: Float[Tensor, "*batch hyper"] | None = None) -> dict[str, Float[Tensor, "*batch"]]:
        """The hyper-parameters as they are used, by name: within their bounds, discrete ones rounded down.

        Args:
            h: in the unbounded space; by default where they are now.

        Raises:
            ValueError: the last dimension of `h` is not the number of hyper-parameters.
        """
        h = self.h if h is None else h
        if h.shape[-1:] != (len(self),):
            raise ValueError(f"h must end in a dimension of {len(self)}, got shape {tuple(h.shape)}")
        found = {}
        for (name, item), column in zip(self.specs.items(), h.unbind(-1), strict=True):
            value = constrain(column, item.low, item.high)
            if item.discrete:
                value = value.floor()
                if math.isfinite(item.high):  # which rounding may lead to, though it is no value of a discrete one
                    value = value.clamp(max=math.ceil(item.high) - 1)
            found[name] = value
        return found
