"""Aligning a metasurface's beam with a receiver somewhere in its far field, from a fixed number of noisy pilots."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.solvers.holobeam import FarFieldChannel, Identify, Measure, beam_grid, holobeam
from trimtab.studies.engine.study import Curve, Metric, Result, Trial

SNRS = (30, 45, 60)
# With how many times the pilots the failure rate is followed.
_TIMES = (1, 3, 5)

# From measurements, the surface's length in wavelengths on both axes, the pilots and a generator, to the beam.
Align = Callable[[Measure, int, int, torch.Generator], tuple[float, float]]

GAINS = {
    "gain": Metric("gain over the best beam's, mean of 30, 45 and 60 dB (%)", percent=True),
    **{f"gain_at_{snr}_db": Metric(f"gain over the best beam's, {snr} dB (%)", percent=True) for snr in SNRS},
    "found": Metric("best beam found, mean of 30, 45 and 60 dB (%)", percent=True),
}
FAILURES = {
    "failures": Metric("failures with the most pilots (%)", best="min", percent=True),
    "log_slope_ratio": Metric("slope of log failures, late over early (exponential: 1, power law: 0.46)"),
}


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
class Surface:
    """Find the best of (2k + 1)^2 beams; a seed draws the receivers and the noise.

    Attributes:
        k: length of the surface in wavelengths, on both axes.
        pilots: in all, whatever a contestant does with them.
    """

    k: int = 10
    pilots: int = 300

    def gains(self, trial: Trial, align: Align) -> Result:
        """Shares of the best gain with noise 30, 45 and 60 dB below it; receivers uniform over the half sphere."""
        episodes = trial.pick(smoke=4, laptop=100, paper=2000)
        receivers, noise = trial.generator(), trial.generator(1)
        height, phi = torch.rand(2, episodes, generator=receivers, dtype=torch.float64)
        directions = list(zip(height.acos().tolist(), (2 * math.pi * phi).tolist(), strict=True))
        gains, found = [], []
        for done, snr in enumerate(SNRS, 1):
            channels = [FarFieldChannel.towards(*direction, self.k, self.k, snr) for direction in directions]
            shares = torch.tensor([share(channel, align, self.k, self.pilots, noise) for channel in channels])
            gains.append(float(shares.mean()))
            found.append(float((shares >= 1 - 1e-9).double().mean()))
            trial.report(done / len(SNRS))
        return Result(
            {
                "gain": sum(gains) / len(gains),
                **{f"gain_at_{snr}_db": gain for snr, gain in zip(SNRS, gains, strict=True)},
                "found": sum(found) / len(found),
            },
            {"gain": Curve(SNRS, gains, x_label="signal-to-noise ratio (dB)")},
        )

    def failures(self, trial: Trial, align: Align) -> Result:
        """How the rate of failures to find the best beam falls with the pilots.

        For one direction, three beams from the centre on both axes and a quarter of a step off the grid, with noise
        35 dB below the best gain.
        """
        episodes, noise = trial.pick(smoke=20, laptop=1000, paper=30_000), trial.generator(1)
        side = 1 - 2 * torch.randint(2, (2,), generator=trial.generator())
        a1, a2 = (3.25 * side / self.k).tolist()
        channel, rates = FarFieldChannel(self.k, self.k, a1, a2, snr_db=35), []
        for done, times in enumerate(_TIMES, 1):
            shares = [share(channel, align, self.k, times * self.pilots, noise) for _ in range(episodes)]
            # Half a failure more, so that there is a logarithm where there are none.
            rates.append((sum(one < 1 - 1e-9 for one in shares) + 0.5) / (episodes + 1))
            trial.report(done / len(_TIMES))
        early, middle, late = map(math.log, rates)
        slopes = (middle - early) / (_TIMES[1] - _TIMES[0]), (late - middle) / (_TIMES[2] - _TIMES[1])
        ratio = slopes[1] / slopes[0] if slopes[0] < 0 else 0.0
        pilots = [float(times * self.pilots) for times in _TIMES]
        return Result(
            {"failures": rates[-1], "log_slope_ratio": ratio}, {"failures": Curve(pilots, rates, x_label="pilots")}
        )


def share(channel: FarFieldChannel, align: Align, k: int, pilots: int, generator: torch.Generator) -> float:
    """Gain of the beam chosen over that of the best one."""
    b1, b2 = torch.tensor(align(channel.pilots(generator), k, pilots, generator)).double().split(1)
    grid = beam_grid(k)
    best = channel.gain(grid[(grid - channel.a1).abs().argmin()], grid[(grid - channel.a2).abs().argmin()])
    return float(channel.gain(b1, b2) / best)
