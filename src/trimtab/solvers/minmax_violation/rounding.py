"""Roundings of continuous values to levels, where searches start."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.solvers.minmax_violation.reader import last_places

_ORDERS = 8  # of compensated roundings among the starts, at most


def compensated_rounding(
    A: Float[Tensor, "m n"],
    centre: Float[Tensor, "problems n"],
    grid: Float[Tensor, "problems n levels"],
    order: Int[Tensor, "orders n"],
    damping: float = 0.01,
) -> Int[Tensor, "problems orders n"]:
    """Rounds variables in turn, those to come taking up what that did to A x in least squares; places in the grid.

    This is GPTQ (Frantar et al., ICLR 2023), here with several orders at once.

    Args:
        A: (m, n).
        centre: (problems, n) continuous values.
        grid: (problems, n, levels), increasing.
        order: (orders, n) permutations of the variables.
        damping: added to the diagonal of A^T A, as a share of its mean.
    """
    gram = A.T @ A
    gram.diagonal().add_(damping * gram.diagonal().mean().clamp(min=torch.finfo(A.dtype).tiny))
    ordered = gram[order[:, :, None], order[:, None, :]]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered))).mT
    values, last = centre[:, order], last_places(grid)
    index = torch.empty(values.shape, dtype=torch.long, device=A.device)
    for place, variable in enumerate(order.T):
        levels, here = grid[:, variable], values[:, :, place, None]
        index[:, :, place] = (levels - here).abs().argmin(2).minimum(last[:, variable])
        rounded = levels.gather(2, index[:, :, place, None])
        error = (here - rounded) / factor[:, place, place, None]
        values[:, :, place + 1 :] -= error * factor[:, place, place + 1 :]
    return index.gather(2, order.argsort(1).expand_as(index))


def rounded_starts(
    A: Float[Tensor, "m n"],
    centre: Float[Tensor, "problems n"],
    grid: Float[Tensor, "problems n levels"],
    restarts: int,
    generator: torch.Generator,
) -> Int[Tensor, "batch n"]:
    """Nearest levels, compensated roundings in some orders, and random roundings to one of the two levels around."""
    n = centre.shape[1]
    orders = [torch.randperm(n, generator=generator).to(A.device) for _ in range(min(restarts - 2, _ORDERS - 1))]
    if restarts > 1:
        orders.insert(0, A.square().sum(0).argsort(descending=True, stable=True))
    last = last_places(grid)[..., None]
    above = torch.searchsorted(grid.contiguous(), centre[..., None].contiguous()).clamp(min=1).minimum(last)
    below = (above - 1).clamp(min=0)
    low, high = grid.gather(2, below)[..., 0], grid.gather(2, above)[..., 0]
    share = ((centre - low) / (high - low)).nan_to_num(0.0)
    draws = torch.rand(len(centre), restarts - len(orders), n, generator=generator, dtype=torch.float64)
    draws[:, 0] = 0.5
    index = torch.where(draws.to(share.device) < share[:, None], above[:, None, :, 0], below[:, None, :, 0])
    if orders:
        index = torch.cat([index, compensated_rounding(A, centre, grid, torch.stack(orders))], 1)
    return index.flatten(0, 1)
