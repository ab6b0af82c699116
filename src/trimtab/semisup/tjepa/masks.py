"""Which columns of each row are seen, and which are told."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from trimtab.ops.arguments import in_range, integer

Shares = tuple[float, float]


@dataclass(frozen=True)
class ColumnMasks:
    """Which columns of each row are seen, and which are told.

    Attributes:
        context: the columns seen, as many in every row.
        targets: sets of columns to tell, none of them seen; two sets may share columns.
    """

    context: Int[Tensor, "batch seen"]
    targets: Int[Tensor, "batch sets told"]


def sample_column_masks(
    batch: int,
    num_features: int,
    *,
    context_share: Shares = (0.14, 0.37),
    target_share: Shares = (0.16, 0.62),
    num_targets: int = 4,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> ColumnMasks:
    """Draws the columns that a batch sees and tells.

    The two numbers of columns are drawn once for the batch, each uniform between its shares of the columns and
    rounded, until both find room in a row; the columns themselves for each row.

    Args:
        batch: number of rows.
        num_features: number of columns, at least 3.
        context_share, target_share: least and largest share of the columns, in (0, 1).
        num_targets: sets of columns to tell.
        generator: decides all draws.
        device: where the masks are wanted.

    Raises:
        ValueError: a number is too small, a share is out of range or out of order, or both find no room.

    Example:
        >>> masks = sample_column_masks(2, 8, generator=torch.Generator().manual_seed(0))
        >>> masks.context.shape[0], masks.targets.shape[:2]
        (2, torch.Size([2, 4]))
        >>> bool((masks.context[:, None, :, None] == masks.targets[:, :, None]).any())
        False
    """
    integer("batch", batch, 0)
    integer("num_features", num_features, 3)
    integer("num_targets", num_targets)
    seen, told = (
        _counts(name, share, num_features)
        for name, share in (("context_share", context_share), ("target_share", target_share))
    )
    pairs = [(c, t) for c, t in itertools.product(seen, told) if c + t <= num_features]
    if not pairs:
        raise ValueError(
            f"context_share and target_share must leave room for both in {num_features} columns, "
            f"got {context_share} and {target_share}"
        )
    odds = torch.tensor([seen[c] * told[t] for c, t in pairs])
    at = None if generator is None else generator.device
    num_seen, num_told = pairs[int(torch.multinomial(odds.to(at), 1, generator=generator))]
    order = torch.rand(batch, num_features, generator=generator, device=at).argsort(1)
    scores = torch.rand(batch, num_targets, num_features, generator=generator, device=at)
    hidden = order[:, :num_seen]
    scores.scatter_(2, hidden[:, None].expand(-1, num_targets, -1), 2.0)  # what is seen comes last
    return ColumnMasks(hidden.to(device), scores.argsort(2)[:, :, :num_told].to(device))


def _counts(name: str, share: Shares, num_features: int) -> dict[int, float]:
    """Numbers of columns with their odds: those of a uniform number, rounded."""
    if not isinstance(share, tuple | list) or len(share) != 2:
        raise ValueError(f"{name} must be (least, largest), got {share}")
    low, high = (in_range(name, value, 0, 1, "neither") for value in share)
    if low > high:
        raise ValueError(f"{name} must be (least, largest), got {share}")
    least, most = (max(1, round(num_features * value)) for value in (low, high))
    return {n: 0.5 if n in (least, most) and least < most else 1.0 for n in range(least, most + 1)}
