"""Gradients of a function from its values alone, and how they are passed on to what made its argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import (
    floating_tensor,
    integer,
    one_of,
    positive,
)

Method = Literal["cge", "rge"]
Values = Callable[[Float[Tensor, "copies batch ..."]], Float[Tensor, "copies batch"]]


def num_queries(method: Method, dim: int, q: int | None = None) -> int:
    """How many values of a function one gradient takes, for each sample.

    Example:
        >>> num_queries("cge", 32), num_queries("rge", 784, 64)
        (64, 65)
    """
    one_of("method", method, ("cge", "rge"))
    return 2 * integer("dim", dim) if method == "cge" else integer("q", dim if q is None else q) + 1


@torch.no_grad()
def zo_gradient(
    f: Values,
    z: Float[Tensor, "batch ..."],
    *,
    mu: float = 0.005,
    method: Method = "cge",
    q: int | None = None,
    directions: Float[Tensor, "q batch ..."] | None = None,
    generator: torch.Generator | None = None,
    chunk: int = 64,
) -> Float[Tensor, "batch ..."]:
    """The gradients of a function at each sample of a batch, from its values alone.

    Args:
        f: takes copies of the batch, moved a little, of shape `(copies, batch, ...)`, and gives one value for each. A
            sample's value must not depend on the others.
        z: where gradients are wanted.
        mu: length of the moves, positive.
        method: "cge", coordinate by coordinate, exact for quadratic functions; "rge", along random directions, unbiased
            for linear ones, with a squared error of `(d - 1) / q` of the gradient's.
        q: number of random directions; as many as coordinates where it is None.
        directions: these directions of unit length instead of random ones.
        generator: source of the draw; torch's global one where it is None.
        chunk: copies that `f` is given together.

    Returns:
        The estimate, a constant.

    Raises:
        TypeError: `z` is not floating point, or `directions` no tensor.
        ValueError: `f` gives something else than one value for each sample of each copy, or an argument is out of
            range.

    Example:
        >>> z = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        >>> zo_gradient(lambda z: z.square().sum(2), z)
        tensor([[2.0000, 4.0000]], dtype=torch.float64)
    """
    floating_tensor("z", z)
    if z.ndim < 2 or z.numel() == 0:
        raise ValueError(f"z must have shape (batch, ...) with at least one sample, got {tuple(z.shape)}")
    positive("mu", mu)
    one_of("method", method, ("cge", "rge"))
    integer("chunk", chunk)
    z = z.detach()
    dim = z[0].numel()
    if method == "cge":
        parts = []
        for rows in torch.eye(dim, dtype=z.dtype, device=z.device).split(int(max(1, chunk // 2))):
            moves = mu * rows.view(len(rows), 1, *z.shape[1:])
            ahead, behind = _values(f, torch.cat([z + moves, z - moves])).chunk(2)
            parts.append((ahead - behind) / (2 * mu))
        return torch.cat(parts).T.reshape(z.shape)
    count = integer("q", dim if q is None else q)
    if directions is not None and not isinstance(directions, Tensor):
        raise TypeError(f"directions must be a tensor, got {type(directions).__name__}")
    if directions is not None:
        if directions.ndim != z.ndim + 1 or directions.shape[1:] != z.shape or len(directions) == 0:
            raise ValueError(f"directions must be (q, {', '.join(map(str, z.shape))}), got {tuple(directions.shape)}")
        count = len(directions)
    here, total = _values(f, z[None]), torch.zeros_like(z)
    for first in range(0, count, chunk):
        number = min(chunk, count - first)
        if directions is None:
            device = z.device if generator is None else generator.device
            drawn = torch.randn((number, *z.shape), generator=generator, dtype=z.dtype, device=device).to(z.device)
            length = drawn.flatten(2).norm(dim=2).clamp_min(torch.finfo(z.dtype).tiny)
            unit = drawn / length.view(number, len(z), *[1] * (z.ndim - 1))
        else:
            unit = directions[first : first + number].to(z)
        rise = (_values(f, z + mu * unit) - here) / mu
        total += (rise.view(number, len(z), *[1] * (z.ndim - 1)) * unit).sum(0)
    return total * (dim / count)


def _values(f: Values, copies: Tensor) -> Tensor:
    values = f(copies)
    if values.shape != copies.shape[:2]:
        wanted = f"one value for each sample of each copy, {tuple(copies.shape[:2])}"
        raise ValueError(f"f must give {wanted}, got shape {tuple(values.shape)}")
    return values


def zo_surrogate(z: Float[Tensor, "batch ..."], gradient: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    """A loss whose gradient with respect to `z` is the one given, over the batch: backpropagate it into what made `z`.

    Its value means nothing.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: `gradient` has not the shape of `z`.

    Example:
        >>> z = torch.ones(2, 3, requires_grad=True)
        >>> zo_surrogate(z, torch.full((2, 3), 4.0)).backward()
        >>> z.grad
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
    """
    if not all(isinstance(held, Tensor) and held.is_floating_point() for held in (z, gradient)):
        raise TypeError("z and gradient must be floating-point tensors, got others")
    if z.shape != gradient.shape:
        raise ValueError(f"gradient must be of shape {tuple(z.shape)} as z, got {tuple(gradient.shape)}")
    return (z * gradient.detach()).sum() / len(z)
