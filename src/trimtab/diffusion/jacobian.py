"""The Jacobian of a denoiser at one sample, as a matrix and as its leading singular vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import in_range, integer, tensor

Map = Callable[[Tensor], Tensor]
"""Maps a batch of one sample to a batch of one of the same shape."""


class SVD(NamedTuple):
    """Singular values, falling, and the vectors as rows in the shape of a sample.

    Attributes:
        values: (k,) singular values.
        left: (k, ...) what comes out.
        right: (k, ...) what it is the answer to.
    """

    values: Float[Tensor, " k"]
    left: Float[Tensor, "k ..."]
    right: Float[Tensor, "k ..."]


def denoiser_jacobian(function: Map, x: Float[Tensor, "1 ..."]) -> Float[Tensor, "dim dim"]:
    """The matrix of derivatives of every output (row) by every input (column).

    It makes dim backward passes, several at a time. A network must be in evaluation mode: statistics of a batch would
    be differentiated too.

    Args:
        function: of a batch of one sample.
        x: the sample, shape (1, ...).

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` is not one sample, or what the function returns has another shape.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
        >>> denoiser_jacobian(lambda x: x @ A.T, torch.zeros(1, 2))
        tensor([[1., 2.],
                [0., 3.]])
    """
    x = _one_sample(x)
    out, pull = torch.func.vjp(function, x)  # type: ignore[misc]
    if out.shape != x.shape:
        raise ValueError(f"function must return the shape of x, {tuple(x.shape)}, got {tuple(out.shape)}")
    units = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
    (rows,) = torch.func.vmap(pull, chunk_size=256)(units)
    return rows.reshape(x.numel(), x.numel()).detach()  # type: ignore[no-any-return]


def jacobian_svd(
    function: Map,
    x: Float[Tensor, "1 ..."],
    k: int | None = None,
    *,
    iterations: int = 10,
    generator: torch.Generator | None = None,
) -> SVD:
    """The singular value decomposition of the Jacobian.

    Args:
        function: of a batch of one sample.
        x: the sample, shape (1, ...).
        k: how many of the largest to find by subspace iteration, which costs `2 * iterations` passes of k vectors and
            makes no matrix; None for all, from the matrix.
        iterations: of the subspace iteration.
        generator: of its start.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` is not one sample, or k is more than its size.

    Example:
        >>> A = torch.diag(torch.tensor([3.0, 1.0, 0.5]))
        >>> jacobian_svd(lambda x: x @ A, torch.zeros(1, 3), k=1).values
        tensor([3.])
    """
    x = _one_sample(x)
    if k is None:
        left, values, right = torch.linalg.svd(denoiser_jacobian(function, x))
        return SVD(values, left.T.reshape(-1, *x.shape[1:]), right.reshape(-1, *x.shape[1:]))
    integer("k", k, 1, x.numel())
    integer("iterations", iterations)
    # A few more than asked for: the error falls with the ratio to the first one left out.
    width = min(k + 5, x.numel())
    _, pull = torch.func.vjp(function, x)  # type: ignore[misc]

    def forward(rows: Tensor) -> Tensor:
        push = torch.func.vmap(lambda v: torch.func.jvp(function, (x,), (v,))[1])
        return push(rows.reshape(-1, *x.shape)).reshape(len(rows), -1)  # type: ignore[no-any-return]

    def backward(rows: Tensor) -> Tensor:
        return torch.func.vmap(pull)(rows.reshape(-1, *x.shape))[0].reshape(len(rows), -1)  # type: ignore[no-any-return]

    rows = torch.randn(width, x.numel(), generator=generator, dtype=x.dtype).to(x.device)
    for _ in range(iterations):
        rows = torch.linalg.qr(backward(forward(_orthonormal(rows))).T).Q.T
    left, values, right = torch.linalg.svd(forward(rows).T, full_matrices=False)
    found = (right @ rows)[:k].detach()
    return SVD(values[:k].detach(), left.T[:k].reshape(-1, *x.shape[1:]).detach(), found.reshape(-1, *x.shape[1:]))


def numerical_rank(values: Float[Tensor, " k"], share: float = 0.99) -> int:
    """The number of singular values that make up this share of their root sum of squares.

    With the authors' 0.99 of "Diffusion Models Learn Low-Dimensional Distributions via Subspace Clustering".

    Example:
        >>> numerical_rank(torch.tensor([3.0, 1.0, 0.1]))
        2
    """
    in_range("share", share, 0, 1, "right")
    squares = tensor("values", values, ndim=1).double().square().sort(descending=True).values.cumsum(0).sqrt()
    return int((squares < share * squares[-1]).sum()) + 1 if len(squares) and squares[-1] > 0 else 0


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.T).Q.T  # type: ignore[no-any-return]


def _one_sample(x: Tensor) -> Tensor:
    x = tensor("x", x, floating=True)
    if x.ndim < 2 or len(x) != 1:
        raise ValueError(f"x must have shape (1, ...), got {tuple(x.shape)}")
    return x.detach()
