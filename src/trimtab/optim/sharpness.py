r"""How sharp a minimum is: the rise of the loss a short way uphill, and the Hessian's top eigenvalue and trace.

Each takes the loss as a function without arguments, so that it works on any model, data and reduction. Evaluate on a
fixed batch in eval mode: the loss must come out the same at every call.

$$
S_\rho = L\Bigl(\theta + \rho \tfrac{\nabla L}{\lVert \nabla L \rVert_2}\Bigr) - L(\theta), \qquad
\lambda_{\max}(\nabla^2 L), \qquad
\operatorname{tr} \nabla^2 L = \mathbb{E}_{z \in \{-1, 1\}^d}\, z^\top \nabla^2 L\, z
$$
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.ops.arguments import integer, positive
from trimtab.ops.hvp import hessian_operator
from trimtab.optim.two_pass import ascent_direction

Loss = Callable[[], Tensor]


@torch.enable_grad()
def sam_sharpness(loss: Loss, params: Iterable[Tensor], rho: float = 0.05) -> float:
    """Rise of the loss one ascent step of length `rho` up the gradient, as in SAM. The weights are put back.

    Args:
        loss: evaluates the loss, a scalar.
        params: the weights.
        rho: length of the step, positive.

    Raises:
        ValueError: `rho` is not positive, or the loss is not a finite scalar.

    Example:
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> round(sam_sharpness(lambda: 0.5 * (w**2).sum(), [w], rho=0.1), 4)  # 0.1 * 5 + 0.1**2 / 2
        0.505
    """
    positive("rho", rho)
    params = [p for p in params if p.requires_grad]
    before = _scalar(loss)
    gradient = torch.autograd.grad(before, params, materialize_grads=True)
    home = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, move in zip(params, ascent_direction(list(gradient)), strict=True):
            p.add_(move, alpha=rho)
        try:
            after = _scalar(loss)
        finally:
            for p, value in zip(params, home, strict=True):
                p.copy_(value)
    return float(after.detach() - before.detach())


@dataclass(frozen=True)
class EigenPair:
    """An eigenvalue of the Hessian and its unit eigenvector, one tensor per parameter.

    Attributes:
        value: the eigenvalue.
        vector: the eigenvector.
        converged: whether the residual fell below the tolerance.
        iterations: products with the Hessian that were taken.
    """

    value: float
    vector: tuple[Tensor, ...]
    converged: bool
    iterations: int


def hessian_top_eigenvalue(
    loss: Loss,
    params: Iterable[Tensor],
    *,
    iterations: int = 200,
    tolerance: float = 1e-3,
    generator: torch.Generator | None = None,
    start: Sequence[Tensor] | None = None,
) -> EigenPair:
    """Largest eigenvalue of the Hessian, by power iteration.

    Where the eigenvalue of largest magnitude is negative, the iteration goes on with the Hessian shifted by it, so
    that the largest one is found all the same.

    Args:
        loss: evaluates the loss, a scalar.
        params: the weights.
        iterations: at most so many products with the Hessian in each of the two phases.
        tolerance: stop when the residual's norm is below this part of the eigenvalue's magnitude.
        generator: for the random start.
        start: the start itself, instead.

    Raises:
        ValueError: the loss is not a finite scalar, `start` is zero, `iterations` is below 1, or `tolerance` negative.

    Example:
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> top = hessian_top_eigenvalue(lambda: 2 * w[0] ** 2 - 3 * w[1] ** 2, [w])
        >>> round(top.value, 3)
        4.0
    """
    integer("iterations", iterations)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be at least 0 and finite, got {tolerance}")
    params = [p for p in params if p.requires_grad]
    product = hessian_operator(_scalar(loss), params)
    first = list(start) if start is not None else [_normal(p, generator) for p in params]
    if not _dot(first, first) > 0:
        raise ValueError("start must not be zero, got a vector without length")
    pair = _power_iteration(product, first, iterations, tolerance)
    if pair.value >= 0:
        return pair
    shift = pair.value

    def shifted(v: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(h - shift * x for h, x in zip(product(v), v, strict=True))

    top = _power_iteration(shifted, first, iterations, tolerance, shift)
    return EigenPair(top.value + shift, top.vector, top.converged, pair.iterations + top.iterations)


def _power_iteration(
    product: Callable[[Sequence[Tensor]], tuple[Tensor, ...]],
    start: list[Tensor],
    iterations: int,
    tolerance: float,
    shift: float = 0.0,
) -> EigenPair:
    """Of the product, which is the Hessian's less the shift; the tolerance is of the Hessian's eigenvalue."""
    norm, count = _dot(start, start).sqrt(), 0
    v = [x / norm for x in start]
    while True:
        image, count = product(v), count + 1
        value = _dot(image, v)
        residual = [h - value * x for h, x in zip(image, v, strict=True)]
        converged = bool(_dot(residual, residual).sqrt() <= tolerance * (value + shift).abs())
        if converged or count == iterations:
            return EigenPair(float(value), tuple(v), converged, count)
        norm = _dot(image, image).sqrt()
        v = [h / norm for h in image]


@dataclass(frozen=True)
class TraceEstimate:
    """Estimate of a trace, and its standard error (infinite for a single sample)."""

    value: float
    standard_error: float


def hessian_trace(
    loss: Loss,
    params: Iterable[Tensor],
    *,
    samples: int = 32,
    generator: torch.Generator | None = None,
    probes: Iterable[Sequence[Tensor]] | None = None,
) -> TraceEstimate:
    """Trace of the Hessian by Hutchinson's estimator with random signs.

    Args:
        loss: evaluates the loss, a scalar.
        params: the weights.
        samples: number of random sign vectors, at least 1.
        generator: for the signs.
        probes: the vectors themselves, instead.

    Raises:
        ValueError: the loss is not a finite scalar, or there are no samples.

    Example:
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> hessian_trace(lambda: 2 * w[0] ** 2 - 3 * w[1] ** 2, [w], samples=2).value
        -2.0
    """
    integer("samples", samples)
    params = [p for p in params if p.requires_grad]
    product = hessian_operator(_scalar(loss), params)
    if probes is None:
        probes = ([_normal(p, generator).sign() for p in params] for _ in range(samples))
    values = torch.tensor([float(_dot(product(z), z)) for z in probes], dtype=torch.float64)
    if not len(values):
        raise ValueError("probes must hold at least one vector, got none")
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf
    return TraceEstimate(float(values.mean()), error)


def _scalar(loss: Loss) -> Tensor:
    value = loss()
    if not isinstance(value, Tensor) or value.dim() != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss must return a scalar tensor, got {shape}")
    if not torch.isfinite(value):
        raise ValueError(f"loss must be finite, got {value.item()}")
    return value


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator).to(like.device)


def _dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
