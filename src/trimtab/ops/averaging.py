"""Moving averages of a network's weights."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from trimtab.ops.arguments import in_range

M = TypeVar("M", bound=nn.Module)


def frozen_copy(module: M) -> M:
    """A copy that takes no gradients, in eval mode: a teacher, or the start of a moving average.

    Example:
        >>> frozen_copy(nn.Linear(2, 2)).weight.requires_grad
        False
    """
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def move_average(average: nn.Module, module: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) module, for every weight; buffers, such as statistics, are copied.

    Args:
        average: of the same structure as `module`, such as its `frozen_copy`.
        module: the network in training.
        decay: share of the average that stays, in [0, 1].

    Raises:
        ValueError: `decay` is out of range, or the two have other weights.

    Example:
        >>> average, module = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = [nn.init.constant_(m.weight, value) for m, value in ((average, 0.0), (module, 1.0))]
        >>> move_average(average, module, decay=0.9)
        >>> round(average.weight.item(), 6)
        0.1
    """
    in_range("decay", decay, 0, 1)
    ours, theirs = list(average.parameters()), list(module.parameters())
    if [p.shape for p in ours] != [p.shape for p in theirs]:
        raise ValueError("average must have the weights of module, got others")
    if ours:
        torch._foreach_lerp_([p.detach() for p in ours], [p.detach() for p in theirs], 1 - decay)
    for mine, its in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(its)
