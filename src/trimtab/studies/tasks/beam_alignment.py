"""Aligning a metasurface's beam with a receiver somewhere in its far field, from a fixed number of noisy pilots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.solvers.bandits import sequential_halving
from trimtab.solvers.holobeam import FarFieldChannel, Identify, Measure, beam_grid, holobeam
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

SNRS = (30, 45, 60)
# With how many times the pilots the failure rate is followed.
_TIMES = (1, 3, 5)

# From measurements, the surface's length in wavelengths on both axes, the pilots and a generator, to the beam.
Align = Callable[[Measure, int, int, torch.Generator], tuple[float, float]]


def along_axes(identify: Identify, init_pilots: int = 0) -> Align:
    """One search along each axis with half of the pilots, as HoloBeam does, by this algorithm."""

    def align(measure: Measure, k: int, pilots: int, generator: torch.Generator) -> tuple[float, float]:
        found = holobeam(measure, k, k, pilots, init_pilots=init_pilots, identify=identify, generator=generator)
        return found.b1, found.b2

    return align


def over_all(identify: Identify) -> Align:
    """One search over all beams."""

    def align(measure: Measure, k: int, pilots: int, generator: torch.Generator) -> tuple[float, float]:
        grid = beam_grid(k)

        def pull(arms: Tensor, count: int) -> Tensor:
            return measure(grid[arms // len(grid)], grid[arms % len(grid)], count)

        arm = identify(pull, len(grid) ** 2, pilots, generator=generator).arm
        return float(grid[arm // len(grid)]), float(grid[arm % len(grid)])

    return align


@dataclass(frozen=True)
class BeamAlignment(Task):
    """Find the best of (2k + 1)^2 beams; directions of receivers are uniform over the half sphere, drawn by the seed.

    Attributes:
        k: length of the surface in wavelengths, on both axes.
        pilots: in all, whatever a contestant does with them.
        follow: "shares" (of the best gain, with noise 30, 45 and 60 dB below it), or "failures" (how the rate of
            failures to find the best beam falls with the pilots, for one direction three beams from the centre on both
            axes and a quarter of a step off the grid, with noise 35 dB below the best gain).
    """

    k: int = 10
    pilots: int = 300
    follow: str = "shares"

    name: ClassVar[str] = "beam-alignment"
    metrics: ClassVar[Mapping[str, Metric]] = {
        **{f"gain_at_{snr}_db": Metric(f"gain over the best beam's, {snr} dB (%)", percent=True) for snr in SNRS},
        **{f"found_at_{snr}_db": Metric(f"best beam found, {snr} dB (%)", percent=True) for snr in SNRS},
        "failures": Metric("failures with the most pilots (%)", best="min", percent=True),
        "log_slope_ratio": Metric("slope of log failures, late over early (exponential: 1, power law: 0.46)"),
    }

    def __post_init__(self) -> None:
        if self.k < 4 or self.pilots < 1:
            raise ValueError(f"k must be at least 4 and pilots positive, got {self.k} and {self.pilots}")
        if self.follow not in ("shares", "failures"):
            raise ValueError(f"follow must be 'shares' or 'failures', got {self.follow!r}")

    def align(self, align: Align | None = None) -> Arm:
        """A contestant; without one, sequential halving over all beams."""
        return self.arm(align=align)

    def run(self, trial: Trial, **options: Any) -> Result:
        align: Align = options.get("align", over_all(sequential_halving))
        if self.follow == "failures":
            return self._failures(trial, align)
        episodes = trial.pick(smoke=4, laptop=150, paper=2000)
        receivers, noise = trial.generator(), trial.generator(1)
        height, phi = torch.rand(2, episodes, generator=receivers, dtype=torch.float64)
        directions = list(zip(height.acos().tolist(), (2 * math.pi * phi).tolist(), strict=True))
        metrics: dict[str, float] = {}
        for done, snr in enumerate(SNRS, 1):
            channels = [FarFieldChannel.towards(*direction, self.k, self.k, snr) for direction in directions]
            shares = torch.tensor([self._share(channel, align, self.pilots, noise) for channel in channels])
            metrics[f"gain_at_{snr}_db"] = float(shares.mean())
            metrics[f"found_at_{snr}_db"] = float((shares >= 1 - 1e-9).double().mean())
            trial.report(done / len(SNRS))
        return Result(metrics, {"gain": Curve(SNRS, [metrics[f"gain_at_{snr}_db"] for snr in SNRS])})

    def _failures(self, trial: Trial, align: Align) -> Result:
        episodes, noise = trial.pick(smoke=20, laptop=2000, paper=30_000), trial.generator(1)
        side = 1 - 2 * torch.randint(2, (2,), generator=trial.generator())
        a1, a2 = (3.25 * side / self.k).tolist()
        channel, rates = FarFieldChannel(self.k, self.k, a1, a2, snr_db=35), []
        for done, times in enumerate(_TIMES, 1):
            shares = [self._share(channel, align, times * self.pilots, noise) for _ in range(episodes)]
            # Half a failure more, so that there is a logarithm where there are none.
            rates.append((sum(share < 1 - 1e-9 for share in shares) + 0.5) / (episodes + 1))
            trial.report(done / len(_TIMES))
        early, middle, late = map(math.log, rates)
        slopes = (middle - early) / (_TIMES[1] - _TIMES[0]), (late - middle) / (_TIMES[2] - _TIMES[1])
        ratio = slopes[1] / slopes[0] if slopes[0] < 0 else 0.0
        pilots = [float(times * self.pilots) for times in _TIMES]
        return Result({"failures": rates[-1], "log_slope_ratio": ratio}, {"failures": Curve(pilots, rates)})

    def _share(self, channel: FarFieldChannel, align: Align, pilots: int, generator: torch.Generator) -> float:
        """Gain of the beam chosen over that of the best one."""
        b1, b2 = torch.tensor(align(channel.pilots(generator), self.k, pilots, generator)).double().split(1)
        grid = beam_grid(self.k)
        best = channel.gain(grid[(grid - channel.a1).abs().argmin()], grid[(grid - channel.a2).abs().argmin()])
        return float(channel.gain(b1, b2) / best)
