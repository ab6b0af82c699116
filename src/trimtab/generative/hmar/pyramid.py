"""A pyramid of token grids: who attends to whom, how scales weigh in the loss, and how many passes draw them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trimtab.generative.quantize import check_scales
from trimtab.ops.arguments import integer, one_of

Context = Literal["own scale", "coarser scales"]
Weighting = Literal["middle", "scales", "tokens"]
Schedule = Sequence[Sequence[int]]
"""For each scale, how many tokens are settled in each of its passes."""


def next_scale_mask(scales: Sequence[int], context: Context = "own scale") -> Bool[Tensor, "tokens tokens"]:
    """Which tokens (columns) a token (row) attends to: its own scale's, or those of coarser scales too, as in VAR.

    Example:
        >>> next_scale_mask((1, 2)).sum().item(), next_scale_mask((1, 2), "coarser scales").sum().item()
        (17, 21)
    """
    one_of("context", context, get_args(Context))
    scale = torch.repeat_interleave(torch.tensor([side**2 for side in check_scales(scales)]))
    return scale[:, None] == scale if context == "own scale" else scale[:, None] >= scale


def scale_loss_weights(scales: Sequence[int], weighting: Weighting = "middle") -> Float[Tensor, " tokens"]:
    r"""Weights of tokens in the loss; they sum to one.

    Args:
        scales: sides of the grids.
        weighting: "middle" gives scale k the normal density at the z-score of $p_{K+1-k}$ among all sides, which
            weighs middle scales most, the authors' choice; "scales" weighs all scales alike, "tokens" all tokens.

    Example:
        >>> [round(w, 3) for w in scale_loss_weights((1, 2, 4)).unique_consecutive().tolist()]
        [0.249, 0.11, 0.019]
    """
    one_of("weighting", weighting, get_args(Weighting))
    sides = torch.tensor(check_scales(scales), dtype=torch.float64)
    if weighting == "tokens":
        whole = sides**2
    elif weighting == "scales" or len(sides) == 1:
        whole = torch.ones_like(sides)
    else:
        z = (sides.flip(0) - sides.mean()) / sides.std()
        whole = torch.exp(-0.5 * z**2)
    return torch.repeat_interleave(whole / whole.sum() / sides**2, (sides**2).long()).float()


def check_schedule(scales: Sequence[int], schedule: Schedule | None) -> list[list[int]]:
    """Passes by scale, one each where none are given.

    Raises:
        ValueError: if counts are not positive or do not sum to a scale's tokens, or the first scale has several passes.

    Example:
        >>> check_schedule((1, 2), None)
        [[1], [4]]
    """
    sizes = [side**2 for side in check_scales(scales)]
    if schedule is None:
        return [[size] for size in sizes]
    plan = [[integer("schedule", count) for count in passes] for passes in schedule]
    if [sum(passes) for passes in plan] != sizes or len(plan[0]) > 1:
        raise ValueError(f"schedule must be counts that sum to {sizes}, the first in one pass, got {plan}")
    return plan
