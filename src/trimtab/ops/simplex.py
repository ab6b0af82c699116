"""Euclidean projection onto the probability simplex."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.ops.arguments import looked_at, tensor


def project_simplex(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    r"""The nearest point whose entries are non-negative and sum to 1, along the last dimension.

    It does not change with what is added to all entries, and is computed so that large sums lose no digits. It is
    $\max(x - \theta, 0)$, with the threshold found by sorting. From Held, Wolfe and Crowder, "Validation of
    subgradient optimization", Mathematical Programming 1974.

    Raises:
        TypeError: `x` is no tensor or array of floating point numbers.
        ValueError: `x` has no entries along the last dimension or, on the CPU, is not finite.

    Example:
        >>> project_simplex(torch.tensor([0.5, 0.9, -3.0]))
        tensor([0.3000, 0.7000, 0.0000])
    """
    x = tensor("x", x, floating=True)
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"x must have entries along its last dimension, got shape {tuple(x.shape)}")
    if looked_at(x) and not x.isfinite().all():
        raise ValueError("x must be finite, got NaN or infinity")
    x = x - x.detach().amax(-1, keepdim=True)
    sorted_x = x.sort(dim=-1, descending=True).values
    excess = sorted_x.cumsum(-1) - 1
    count = torch.arange(1, x.shape[-1] + 1, device=x.device)
    kept = (sorted_x * count > excess).sum(-1, keepdim=True)
    threshold = excess.gather(-1, kept - 1) / kept
    return (x - threshold).clamp_min(0)
