"""A function to be minimised, with its gradient and what stands for its Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import all_finite

Function = Callable[[Float[Tensor, " d"]], Float[Tensor, ""]]
Gradient = Callable[[Float[Tensor, " d"]], Float[Tensor, " d"]]
Curvature = Callable[[Float[Tensor, " d"]], Float[Tensor, "d d"]]
HessianName = Literal["exact", "gauss_newton", "fisher", "zero"]


def derivatives(
    fun: Function, gradient: Gradient | None, hessian: HessianName | Curvature
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], Tensor | None]]:
    """The value with the gradient, and the Hessian, as functions of the point."""
    slope = gradient or getattr(fun, "gradient", None)
    if slope is not None:
        evaluate = lambda x: (fun(x), slope(x))  # noqa: E731
    else:
        both = torch.func.grad_and_value(fun)
        evaluate = lambda x: both(x)[::-1]  # noqa: E731
    if callable(hessian):
        return evaluate, hessian
    if hessian not in get_args(HessianName):
        raise ValueError(f"hessian must be a function or one of {', '.join(get_args(HessianName))}, got {hessian!r}")
    if hessian == "zero":
        return evaluate, lambda x: None
    own: Any = getattr(fun, "hessian" if hessian == "exact" else hessian, None)
    if own is None and hessian != "exact":
        raise ValueError(f"hessian must be a method of the function, or a function, got {hessian!r}, which fun has not")
    return evaluate, cast(Curvature, own or torch.func.hessian(fun))


def checked(x: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Refuses a value and gradient of wrong shape, or not finite."""
    if value.shape != () or gradient.shape != x.shape:
        raise ValueError(
            f"fun must give a scalar and a gradient of shape {tuple(x.shape)}, got shapes {tuple(value.shape)} and "
            f"{tuple(gradient.shape)}"
        )
    if not (value.isfinite() and gradient.isfinite().all()):
        raise ValueError("fun and its gradient must be finite at the start, got NaN or infinity")
    return value, gradient


def checked_hessian(x: Tensor, hessian: Tensor | None) -> Tensor | None:
    """Refuses a Hessian of wrong shape, or not finite; None is zero."""
    if hessian is None:
        return None
    if hessian.shape != (len(x), len(x)):
        raise ValueError(f"hessian must give a matrix of shape {(len(x), len(x))}, got {tuple(hessian.shape)}")
    if not all_finite(hessian):
        raise ValueError("hessian must be finite, got NaN or infinity at an iterate")
    return hessian


def check_start(x: Tensor) -> None:
    """Refuses what is no finite vector of single or double precision."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x or x0 must be a tensor of float32 or float64, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"x or x0 must be a vector with entries, got shape {tuple(x.shape)}")
    if not x.isfinite().all():
        raise ValueError("x or x0 must be finite, got NaN or infinity")
