"""Pictures of trajectories in the plane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.diffusion import AnalyticGMM
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


def sampler_trajectories(
    sampler: Callable[..., Tensor], noise: Tensor, run: Callable[..., object], data: AnalyticGMM
) -> Mapping[str, Picture]:
    """A picture, by its name, of trajectories from noise to samples in the plane of the data's two main directions.

    Args:
        sampler: the one that is run; without a `callback` of its own there is nothing to draw.
        noise: where they begin.
        run: runs it from this noise; it is called with the callback.
        data: the distribution to sample.
    """
    if "callback" not in signature(sampler).parameters:
        return {}
    states = [noise]
    run(callback=lambda step, time, x: states.append(x))
    spread, directions = torch.linalg.eigh(data.cov)
    plane = directions[:, [-1, -2]]
    plane = plane * plane.sum(0).sign()  # the same way round on every machine
    reach = 2.5 * max(1.0, float(spread[-1]) ** 0.5)
    seen = (torch.stack(states) - data.mean) @ plane
    return {f"trajectories of {len(noise)} samples": drawn_trajectories(seen, -reach, reach, side=128)}
