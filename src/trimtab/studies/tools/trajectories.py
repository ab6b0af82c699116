"""Pictures of trajectories in the plane."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.studies.engine.picture import Picture

# Points from a state to the next: enough for a line without holes across the whole picture.
_POINTS = 128


def drawn_trajectories(states: Float[Tensor, "steps+1 samples 2"], low: float, high: float, side: int = 112) -> Picture:
    """The trajectories of samples, straight from each state to the next, in the square from `low` to `high`.

    The second axis points up. Where several meet it is darker.

    Example:
        >>> drawn_trajectories(torch.tensor([[[-0.9, -0.9]], [[0.9, 0.9]]]), -1.0, 1.0, side=2).pixels().tolist()
        [[255, 170], [170, 255]]
    """
    share = torch.linspace(0, 1, _POINTS, dtype=torch.float64)[:, None, None, None]
    points = torch.lerp(states[:-1].double(), states[1:].double(), share).detach().cpu()
    edges = torch.linspace(low, high, side + 1, dtype=torch.float64)
    passed = torch.zeros(side, side, dtype=torch.float64)
    for sample in points.unbind(2):
        passed += (torch.histogramdd(sample.reshape(-1, 2), [edges, edges]).hist > 0).double()
    return Picture.of(1 - passed.T.flip(0) / 3)
