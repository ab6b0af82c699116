"""How far subspaces are from each other, and edits along directions of a denoiser's Jacobian."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from trimtab.diffusion.jacobian import Map
from trimtab.ops.arguments import number, real_problem


def subspace_distance(first: Float[Tensor, "dim rank"], second: Float[Tensor, "dim rank"]) -> Float[Tensor, ""]:
    r"""The Frobenius norm of $U U^\top - V V^\top$, for orthonormal columns; ranks may differ.

    Raises:
        TypeError: one is a NumPy array or complex.
        ValueError: the subspaces are not of one space.

    Example:
        >>> line, other = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
        >>> subspace_distance(line, other)
        tensor(1.4142)
    """
    if problem := real_problem(first=first, second=second):
        raise TypeError(problem)
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second):
        raise ValueError(
            f"first and second must have shapes (dim, rank) of one dim, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    return torch.linalg.matrix_norm(first @ first.T - second @ second.T)  # type: ignore[no-any-return]


def match_subspaces(
    found: Float[Tensor, "components dim rank"], true: Float[Tensor, "components dim rank"]
) -> tuple[Int[Tensor, " components"], Float[Tensor, " components"]]:
    """Pairs found subspaces with true ones so that their distances are least.

    Returns:
        For each true subspace the index of its partner, and their distance.

    Raises:
        TypeError: `found` or `true` is a NumPy array or complex.
        ValueError: there are not as many of one as of the other.

    Example:
        >>> axes = torch.eye(3)[:, :, None]
        >>> match_subspaces(axes[[2, 0, 1]], axes)
        (tensor([1, 2, 0]), tensor([0., 0., 0.]))
    """
    if problem := real_problem(found=found, true=true):
        raise TypeError(problem)
    if len(found) != len(true):
        raise ValueError(f"found must be {len(true)} subspaces, as true, got {len(found)}")
    distances = torch.stack([torch.stack([subspace_distance(u, v) for u in found]) for v in true])
    _, partners = linear_sum_assignment(distances.square().detach().double().cpu().numpy())
    chosen = torch.as_tensor(partners, device=distances.device)
    return chosen, distances.gather(1, chosen[:, None])[:, 0]


@torch.no_grad()
def edit_along(
    function: Map, x: Float[Tensor, "1 ..."], direction: Float[Tensor, "..."], step: float
) -> Float[Tensor, "1 ..."]:
    """The denoised sample, moved along a direction: `function(x) + step * direction`.

    Directions are right singular vectors of the denoiser's Jacobian at a middle noise level (`jacobian_svd`), each of
    which changes one attribute of an image; the authors take 0.7 of the schedule's length.

    Args:
        function: the denoiser at one noise level, of a batch of one sample.
        x: the noisy sample.
        direction: in the shape of a sample; brought to unit length.
        step: how far, and to which side.

    Raises:
        ValueError: the direction is zero or of another shape.

    Example:
        >>> edit_along(lambda x: 0.5 * x, torch.tensor([[2.0, 2.0]]), torch.tensor([0.0, 3.0]), step=0.5)
        tensor([[1.0000, 1.5000]])
    """
    if problem := real_problem(x=x, direction=direction):
        raise TypeError(problem)
    number("step", step)
    if x.ndim < 2 or direction.shape != x.shape[1:]:
        raise ValueError(
            f"direction must have the shape of a sample, {tuple(x.shape[1:])}, got {tuple(direction.shape)}"
        )
    length = torch.linalg.vector_norm(direction)
    if not 0 < float(length) < math.inf:
        raise ValueError(f"direction must be finite and not zero, got one of length {float(length):g}")
    return function(x) + step * direction / length  # type: ignore[no-any-return]
