"""The basis in which a denoiser shrinks an image, and its error without the clean one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion.jacobian import Map, denoiser_jacobian
from trimtab.ops.arguments import floating_tensor, integer, positive, real_problem, same_shape, tensor


class Eigenbasis(NamedTuple):
    """The basis in which a denoiser shrinks an image.

    Attributes:
        values: factors, falling, shape (k,).
        vectors: orthonormal, in the shape of the image, (k, ...).
        asymmetry: Frobenius norm of the Jacobian less its transpose, over that of the Jacobian; the best denoiser's
            is zero.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k ..."]
    asymmetry: float


def denoiser_eigenbasis(denoiser: Map, y: Float[Tensor, "1 ..."], k: int | None = None) -> Eigenbasis:
    """Eigenvalues and eigenvectors of the symmetric part of a denoiser's Jacobian at one noisy image.

    Args:
        denoiser: of a batch of one image; a network in evaluation mode.
        y: the image, shape (1, ...).
        k: how many of the largest to return; None for all.

    Raises:
        TypeError: `y` is not floating point.
        ValueError: `y` is not one image, or k is more than its size.

    Example:
        >>> shrink = torch.tensor([0.9, 0.1, 0.5])
        >>> denoiser_eigenbasis(lambda y: shrink * y, torch.ones(1, 3), k=2).values
        tensor([0.9000, 0.5000])
    """
    if isinstance(y, Tensor) and y.is_complex():
        raise TypeError(f"y must be real, got {y.dtype}")
    matrix = floating_tensor("denoiser(y)", denoiser_jacobian(denoiser, y))
    k = len(matrix) if k is None else integer("k", k, 1, len(matrix))
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    asymmetry = float((matrix - matrix.T).norm() / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny))
    return Eigenbasis(values.flip(0)[:k], vectors.T.flip(0)[:k].reshape(k, *y.shape[1:]), asymmetry)


def best_shrinkage(x: Float[Tensor, "..."], vectors: Float[Tensor, "k ..."], sigma: float) -> Float[Tensor, " k"]:
    r"""The factors that denoise a known clean image best in a given orthonormal basis.

    Their error is $\sigma^2 \sum_k \lambda_k$.

    Args:
        x: the clean image.
        vectors: the basis, such as that of `denoiser_eigenbasis`.
        sigma: standard deviation of the noise.

    Raises:
        TypeError: `x` or `vectors` is complex or a NumPy array.
        ValueError: `vectors` are not of the shape of `x`, or `sigma` is not positive.

    Example:
        >>> best_shrinkage(torch.tensor([2.0, 0.0]), torch.eye(2), sigma=1.0)
        tensor([0.8000, 0.0000])
    """
    if problem := real_problem(x=x, vectors=vectors):
        raise TypeError(problem)
    if vectors.shape[1:] != x.shape:
        raise ValueError(f"vectors must have shape (k, {', '.join(map(str, x.shape))}), got {tuple(vectors.shape)}")
    squares = (vectors.flatten(1) @ x.flatten()).square()
    return squares / (squares + positive("sigma", sigma) ** 2)


def sure(
    denoiser: Map,
    y: Float[Tensor, "batch ..."],
    sigma: float,
    *,
    signs: Float[Tensor, "batch ..."] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " batch"]:
    """Stein's unbiased estimate of a denoiser's squared error on each noisy image, without the clean ones.

    The trace of the Jacobian is estimated by one backward pass with random signs; the sum of squares over an image is
    estimated, not their mean, and single estimates may be negative.

    Args:
        denoiser: of a batch, in which images do not mix.
        y: noisy images.
        sigma: standard deviation of the noise.
        signs: +1 and -1, of the shape of `y`; drawn if None.
        generator: of the signs.

    Raises:
        TypeError: `y` is not floating point, or `signs` is no tensor.
        ValueError: shapes differ or `sigma` is not positive.

    Example:
        >>> sure(lambda y: 0.5 * y, torch.tensor([[2.0, 0.0]]), sigma=1.0)  # 2 * 1 + 1 - 2
        tensor([1.])
    """
    y = tensor("y", y, floating=True)
    sigma = positive("sigma", sigma)
    if signs is None:
        signs = torch.randint(0, 2, y.shape, generator=generator, device=y.device).to(y.dtype) * 2 - 1
    if not isinstance(signs, Tensor):
        raise TypeError(f"signs must be a tensor, got {type(signs).__name__}")
    same_shape("signs", signs, "y", y)
    with torch.inference_mode(False), torch.enable_grad():
        at = y.detach().clone().requires_grad_()
        out = denoiser(at)
        (pulled,) = torch.autograd.grad(out, at, signs)
    trace = (pulled * signs).flatten(1).sum(1)
    return 2 * sigma**2 * trace + (out.detach() - y).square().flatten(1).sum(1) - y[0].numel() * sigma**2
