"""Which entries of a plan the sparse Hessian keeps."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def largest_entries(plan: Float[Tensor, "n m"], density: float) -> Tensor:
    """The paper's choice: which entries are the largest, as many as a Hessian of the density has (and all that tie).

    Each entry stands in two blocks of the Hessian, whose (n + m)^2 entries the density counts.

    Example:
        >>> largest_entries(torch.tensor([[0.1, 0.4], [0.3, 0.2]]), density=0.25)
        tensor([[False,  True],
                [ True, False]])
    """
    count = math.ceil(density * sum(plan.shape) ** 2 / 2)
    if count >= plan.numel():
        return torch.ones_like(plan, dtype=torch.bool)
    return plan >= plan.flatten().topk(count, sorted=False).values.min()


def mass_entries(plan: Float[Tensor, "n m"], a: Float[Tensor, " n"], b: Float[Tensor, " m"], lost: float) -> Tensor:
    """Entries without which no row i loses more than `lost * a[i]` and no column j more than `lost * b[j]`."""
    n, m = plan.shape
    return (plan >= (lost / m * a)[:, None]) | (plan >= lost / n * b)
