"""What randomised smoothing certifies of a classifier: the class that wins under noise, and the ball around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import (
    finite_tensor,
    in_range,
    integer,
    positive,
)

Logits = Callable[[Float[Tensor, "m ..."]], Float[Tensor, "m classes"]]


@dataclass(frozen=True)
class Certificate:
    """What a smoothed classifier says of inputs, and how far around them it is sure to say it.

    Attributes:
        labels: predicted classes; -1 where it abstains.
        radius: radii of the certified balls in the Euclidean norm, 0 where it abstains.
    """

    labels: Int[Tensor, " batch"]
    radius: Float[Tensor, " batch"]

    def accuracy(self, targets: Int[Tensor, " batch"], radius: float = 0.0) -> float:
        """Share of inputs that are rightly classified and certified at a radius.

        Args:
            targets: the right classes.
            radius: at least 0.

        Raises:
            ValueError: there is not one class for each input, or `radius` is negative or NaN.

        Example:
            >>> found = Certificate(torch.tensor([1, 2, -1]), torch.tensor([0.5, 0.1, 0.0]))
            >>> found.accuracy(torch.tensor([1, 2, 0]), radius=0.25)
            0.3333...
        """
        if targets.shape != self.labels.shape:
            raise ValueError(f"targets must be of shape {tuple(self.labels.shape)}, got {tuple(targets.shape)}")
        if not (isinstance(radius, float | Real) and radius >= 0):
            raise ValueError(f"radius must be at least 0, got {radius!r}")
        return ((self.labels == targets) & (self.radius >= radius)).float().mean().item()


@torch.no_grad()
def certify(
    predict: Logits,
    x: Float[Tensor, "batch ..."],
    sigma: float,
    *,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    generator: torch.Generator | None = None,
) -> Certificate:
    r"""Randomised smoothing: the class that wins most votes under Gaussian noise, and the ball in which it must win.

    The class is chosen by `n0` votes. Of `n` others the share of its votes is bounded from below (Clopper and Pearson),
    and the radius is $\sigma \Phi^{-1}$ of that bound; at a bound of half or less it abstains.

    Args:
        predict: images to logits; a sample's must not depend on the others'.
        x: images.
        sigma: standard deviation of the noise, positive.
        n0, n: numbers of votes.
        alpha: probability that a certificate is wrong, in (0, 1).
        batch_size: images that `predict` is given together.
        generator: source of the noise, on the CPU; torch's global one where it is None.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: it is empty or not finite, an argument is out of range, or `predict` answers with NaN.

    Example:
        >>> found = certify(lambda x: F.one_hot(torch.zeros(len(x), dtype=torch.int64), 3), torch.zeros(1, 4), 0.25)
        >>> found.labels, found.radius  # always the same class: 0.25 times the normal quantile of 0.001 ** 1e-4
        (tensor([0]), tensor([0.7996]))
    """
    from scipy.stats import beta, norm

    x = finite_tensor("x", x, floating=True)
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"x must have shape (batch, ...) with at least one sample, got {tuple(x.shape)}")
    positive("sigma", sigma)
    in_range("alpha", alpha, 0, 1, "neither")
    integer("n0", n0), integer("n", n), integer("batch_size", batch_size)
    first = _votes(predict, x, sigma, n0, batch_size, generator)
    chosen = first.argmax(1)
    held = _votes(predict, x, sigma, n, batch_size, generator).gather(1, chosen[:, None])[:, 0].cpu().numpy()
    bound = np.where(held > 0, beta.ppf(alpha, held, n - held + 1), 0.0)
    sure = bound > 0.5
    radius = torch.as_tensor(sigma * norm.ppf(bound.clip(0.5, None)), dtype=torch.float32)
    certain = torch.as_tensor(sure)
    labels = torch.where(certain.to(chosen.device), chosen, -1)
    return Certificate(labels, (radius * certain).to(x.device))


def _votes(
    predict: Logits, x: Tensor, sigma: float, n: int, batch_size: int, generator: torch.Generator | None
) -> Int[Tensor, "batch classes"]:
    copies, counts = max(1, batch_size // len(x)), []
    for done in range(0, n, copies):
        number = min(copies, n - done)
        noise = torch.randn((number, *x.shape), generator=generator, dtype=x.dtype).to(x.device)
        logits = torch.cat([predict(part) for part in (x + sigma * noise).flatten(0, 1).split(int(batch_size))])
        if logits.isnan().any():
            raise ValueError("predict must give logits, got NaN")
        counts.append(F.one_hot(logits.argmax(1), logits.shape[1]).view(number, len(x), -1).sum(0))
    return torch.stack(counts).sum(0)
