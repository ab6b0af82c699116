"""The warm-up: the regularisation is lowered in stages, each of which starts where the last two point to."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trimtab.ops.sinkhorn import DualState

_STAGE_RATIO = 4.0  # by which the regularisation falls from one stage to the next, at most
_LEAST_RATIO = 1.2  # where stages are this near to one another, they are left unsolved


def warm_up(state: DualState, end: float, solve: Callable[[], bool]) -> None:
    """Takes the state from its regularisation down to another, stage by stage.

    Args:
        state: moved.
        end: the last stage's regularisation, at most the state's.
        solve: solves the state's stage well enough to go on from, or says that it could not.
    """
    solve()
    ratio, earlier = _STAGE_RATIO, None
    while state.reg > end:
        here, f = state.reg, state.reg * state.f
        slope = torch.zeros_like(f) if earlier is None else (f - earlier[1]) / (here - earlier[0])
        while True:
            stage = max(end, here / ratio)
            state.rescale(stage, f + (stage - here) * slope)
            if solved := solve():
                ratio = min(_STAGE_RATIO, ratio**1.5)
            if solved or ratio < _LEAST_RATIO:
                break
            ratio = ratio**0.5
        earlier = here, f
