"""Hessian-vector products by differentiating the gradient a second time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import tensor_problem

Vectors = Sequence[Tensor]


def hessian_operator(loss: Float[Tensor, ""], params: Sequence[Tensor]) -> Callable[[Vectors], tuple[Tensor, ...]]:
    """The Hessian of a scalar as a linear map, whose graph is built once and used for every product.

    Args:
        loss: a scalar that still has its graph.
        params: tensors that it depends on; where it does not, the product is zero.

    Returns:
        A function that maps one tensor per parameter to the Hessian's product with them, of the same shapes.

    Raises:
        TypeError: `loss` is no real tensor.
        ValueError: `loss` is a constant or not a scalar, or params is empty.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian = hessian_operator((x**3).sum(), [x])
        >>> hessian([torch.tensor([1.0, 1.0])])[0].tolist()
        [6.0, 12.0]
    """
    params = list(params)
    if problem := tensor_problem(loss=loss):
        raise TypeError(problem)
    if not loss.requires_grad:
        raise ValueError("loss must have a graph that leads to params, got a constant")
    if loss.dim() != 0:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
    if not params:
        raise ValueError("params must hold at least one tensor, got none")
    gradient = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    curved = [g for g in gradient if g.requires_grad]

    def product(vectors: Vectors) -> tuple[Tensor, ...]:
        if not curved:  # the loss is linear in all parameters
            return tuple(torch.zeros_like(p) for p in params)
        along = [v for v, g in zip(vectors, gradient, strict=True) if g.requires_grad]
        return torch.autograd.grad(curved, params, along, retain_graph=True, materialize_grads=True)

    return product


def hvp(loss: Float[Tensor, ""], params: Sequence[Tensor], vectors: Vectors) -> tuple[Tensor, ...]:
    """One Hessian-vector product; see `hessian_operator` for many of the same Hessian.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hvp(x[0] * x[1], [x], [torch.tensor([1.0, 0.0])])[0].tolist()
        [0.0, 1.0]
    """
    return hessian_operator(loss, params)(vectors)
