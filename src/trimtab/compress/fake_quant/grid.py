"""Values on a grid of whole numbers times a step, and what passes of their gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import integer, tensor_problem

TINY = 1e-8
"""The least step that there is."""


def round_ste(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Rounds to the nearest whole number, halves to the even one; the gradient passes as if it did not.

    Example:
        >>> x = torch.tensor([0.6, 1.5], requires_grad=True)
        >>> round_ste(x).sum().backward()
        >>> round_ste(x).tolist(), x.grad.tolist()
        ([1.0, 2.0], [1.0, 1.0])
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    return x + (x.round() - x).detach()


def grad_scale(x: Float[Tensor, "..."], scale: float) -> Float[Tensor, "..."]:
    """The same value, whose gradient is multiplied by `scale`.

    Example:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> grad_scale(x, 0.25).backward()
        >>> x.grad.item()
        0.25
    """
    if problem := tensor_problem(x=x):
        raise TypeError(problem)
    if not -float("inf") < scale < float("inf"):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return x.detach() + scale * (x - x.detach())


def quant_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """The smallest and the largest whole number of a format.

    Args:
        bits: at least 1, or 2 where there is a sign; at most 24, what float32 holds exactly.
        signed: whether there are negative ones.

    Example:
        >>> quant_range(4), quant_range(4, signed=False)
        ((-8, 7), (0, 15))
    """
    integer("bits", bits, 2 if signed else 1, 24)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def affine_qparams(
    low: Float[Tensor, "..."],
    high: Float[Tensor, "..."],
    bits: int,
    *,
    symmetric: bool = False,
    signed: bool = True,
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The step and the zero point with which a range just fits a format; zero is always on the grid.

    Args:
        low, high: the smallest and the largest values; the range is widened to hold zero.
        bits: of the format.
        symmetric: the zero point is 0, and the step is the larger one of what both ends need.
        signed: whether the format has negative numbers.

    Returns:
        The step, and the zero point, a whole number in the tensor's own type.

    Raises:
        ValueError: the shapes differ, or `bits` is out of range.

    Example:
        >>> affine_qparams(torch.tensor(-1.0), torch.tensor(2.0), 2)
        (tensor(1.), tensor(-1.))
        >>> affine_qparams(torch.tensor(-1.0), torch.tensor(2.0), 3, symmetric=True)
        (tensor(0.6667), tensor(0.))
    """
    if problem := tensor_problem(low=low, high=high):
        raise TypeError(problem)
    if low.shape != high.shape:
        raise ValueError(f"high must be of shape {tuple(low.shape)} as low, got {tuple(high.shape)}")
    smallest, largest = quant_range(bits, signed)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        step = high / largest if not signed else torch.maximum(-low, high) / largest
        return step.clamp(min=TINY), torch.zeros_like(step)
    step = ((high - low) / (largest - smallest)).clamp(min=TINY)
    return step, (smallest - (low / step).round()).clamp(smallest, largest)


def fake_quantize(
    x: Float[Tensor, "..."],
    step: Float[Tensor, "..."],
    zero_point: Float[Tensor, "..."],
    bits: int,
    *,
    signed: bool = True,
    pass_clipped: bool = False,
) -> Float[Tensor, "..."]:
    """Values on the grid of a format, as floating-point numbers; the gradient is 1 inside the range.

    Args:
        x: what is quantised.
        step, zero_point: of the grid; they broadcast against `x`.
        bits: of the format.
        signed: whether the format has negative numbers.
        pass_clipped: the gradient is 1 outside of the range too, where it is 0 otherwise.

    Example:
        >>> fake_quantize(torch.tensor([-1.2, 0.4, 5.0]), torch.tensor(1.0), torch.tensor(-1.0), 2)
        tensor([-1.,  0.,  2.])
    """
    if problem := tensor_problem(x=x, step=step, zero_point=zero_point):
        raise TypeError(problem)
    smallest, largest = quant_range(bits, signed)
    if pass_clipped:
        found = ((x / step).round() + zero_point).clamp(smallest, largest)
        return x + ((found - zero_point) * step - x).detach()
    return (round_ste((x / step + zero_point).clamp(smallest, largest)) - zero_point) * step


def lsq_quantize(
    x: Float[Tensor, "..."], step: Float[Tensor, "..."], bits: int, *, signed: bool = True, scale: float = 1.0
) -> Float[Tensor, "..."]:
    """LSQ: values on a grid whose step takes a gradient.

    Args:
        x: what is quantised.
        step: of the grid; its magnitude counts. It broadcasts against `x`.
        bits: of the format.
        signed: whether the format has negative numbers.
        scale: factor of the step's gradient.

    Example:
        >>> step = torch.tensor(1.0, requires_grad=True)
        >>> lsq_quantize(torch.tensor([0.25, 9.0]), step, 3).sum().backward()
        >>> step.grad.item()  # 0 - 0.25 from inside, 3 from beyond the largest number
        2.75
    """
    if problem := tensor_problem(x=x, step=step):
        raise TypeError(problem)
    smallest, largest = quant_range(bits, signed)
    step = grad_scale(step.abs() + TINY, scale)
    return round_ste((x / step).clamp(smallest, largest)) * step
