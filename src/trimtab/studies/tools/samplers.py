"""What samplers of studies have in common, and the time grids that they may choose from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor

from trimtab.diffusion import grids
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.diffusion.schedules import NoiseSchedule

Sampler = Callable[[DenoiserLike, Tensor, Tensor], Tensor]
"""Maps a denoiser, noise and falling times to samples."""

GRIDS: Mapping[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "uniform": functools.partial(grids.power, p=1.0),
    "quadratic": grids.power,
    "karras": grids.karras,
    "log-SNR": grids.log_snr,
}
