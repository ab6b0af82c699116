"""Gradient reversal: the identity on the way forward, minus a weight on the way back.

What lies before it ascends the loss that what lies after it descends, in one backward pass: a feature extractor
against a domain classifier, or a perturbation against the network that it disturbs.

Reference: Yaroslav Ganin and Victor Lempitsky, "Unsupervised Domain Adaptation by Backpropagation", ICML 2015,
arXiv 1409.7495.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import number


def reverse_gradient(x: Float[Tensor, "..."], weight: float = 1.0) -> Float[Tensor, "..."]:
    """The same values, with a gradient that is turned round and scaled on its way back.

    Args:
        x: any floating-point tensor.
        weight: what the gradient is multiplied by, apart from the sign; 0 stops it.

    Raises:
        TypeError: `x` is not a floating-point tensor, or `weight` is not a number.
        ValueError: `weight` is not finite.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> reverse_gradient(x, weight=0.5).square().sum().backward()
        >>> x.grad
        tensor([-1., -2.])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    reversed_: Tensor = _Reversal.apply(x, number("weight", weight))  # type: ignore[no-untyped-call]
    return reversed_


class _Reversal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None
