"""Time grids: where a sampler evaluates the network.

Each returns `steps + 1` falling times in float64, from the schedule's `t_max` to its `t_min` (or those given).
Any falling 1-d tensor will do in their place.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from trimtab.diffusion.schedules import NoiseSchedule
from trimtab.ops.arguments import integer, positive

Times = Float64[Tensor, " steps+1"]


def power(
    schedule: NoiseSchedule, steps: int, p: float = 2.0, *, t_min: float | None = None, t_max: float | None = None
) -> Times:
    """Uniform in t^(1/p): p = 1 is uniform in time, p = 2 the quadratic grid of DEIS and DDIM.

    Example:
        >>> from trimtab.diffusion.schedules import EDM
        >>> power(EDM(t_min=1.0, t_max=9.0), 2).tolist()
        [9.0, 4.0, 1.0]
    """
    first, last = _ends(schedule, steps, t_min, t_max)
    positive("p", p)
    return _with_ends(_ramp(first ** (1 / p), last ** (1 / p), steps) ** p, first, last)


def karras(
    schedule: NoiseSchedule, steps: int, rho: float = 7.0, *, t_min: float | None = None, t_max: float | None = None
) -> Times:
    """Uniform in (sigma / alpha)^(1/rho): the grid of EDM (Karras et al., 2022, arXiv 2206.00364, Eq. 5)."""
    first, last = _ends(schedule, steps, t_min, t_max)
    positive("rho", rho)
    high, low = _noise_levels(schedule, first, last)
    return _with_ends(schedule.t_of_rho(_ramp(high ** (1 / rho), low ** (1 / rho), steps) ** rho), first, last)


def log_snr(schedule: NoiseSchedule, steps: int, *, t_min: float | None = None, t_max: float | None = None) -> Times:
    """Uniform in the log signal-to-noise ratio, which is uniform in log rho."""
    first, last = _ends(schedule, steps, t_min, t_max)
    high, low = _noise_levels(schedule, first, last)
    return _with_ends(schedule.t_of_rho(_ramp(high.log(), low.log(), steps).exp()), first, last)


def _ends(schedule: NoiseSchedule, steps: int, t_min: float | None, t_max: float | None) -> tuple[Tensor, Tensor]:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
    first = schedule.t_max if t_max is None else t_max
    last = schedule.t_min if t_min is None else t_min
    integer("steps", steps)
    if not 0 <= last < first < math.inf:
        raise ValueError(f"t_min and t_max must satisfy 0 <= t_min < t_max < inf, got {last} and {first}")
    return torch.tensor(first, dtype=torch.float64), torch.tensor(last, dtype=torch.float64)


def _noise_levels(schedule: NoiseSchedule, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    high, low = schedule.rho(first), schedule.rho(last)
    if not (torch.isfinite(high) and low > 0):
        raise ValueError(f"t_min and t_max must have 0 < sigma/alpha < inf, got {low.item():g} and {high.item():g}")
    return high, low


def _ramp(first: Tensor, last: Tensor, steps: int) -> Tensor:
    return first + (last - first) * (torch.arange(steps + 1, dtype=torch.float64) / steps)


def _with_ends(times: Tensor, first: Tensor, last: Tensor) -> Tensor:
    times[0], times[-1] = first, last
    return times
