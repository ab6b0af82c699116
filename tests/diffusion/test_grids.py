"""Time grids."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.diffusion import EDM, Discrete, Flow, VPLinear, grids

GRIDS = {"power": grids.power, "karras": grids.karras, "log_snr": grids.log_snr}
DISCRETE = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("schedule", [VPLinear(), EDM(), DISCRETE], ids=["VPLinear", "EDM", "Discrete"])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_falls_from_end_to_end(name: str, schedule, steps: int) -> None:
    times = GRIDS[name](schedule, steps)
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert (times[0].item(), times[-1].item()) == (schedule.t_max, schedule.t_min)
    assert bool((times.diff() < 0).all())
    shorter = GRIDS[name](schedule, steps, t_max=0.5, t_min=0.25)
    assert (shorter[0].item(), shorter[-1].item()) == (0.5, 0.25)


def test_what_is_uniform() -> None:
    schedule = VPLinear()
    roots = grids.power(schedule, 9, p=3).pow(1 / 3)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(9))
    levels = schedule.rho(grids.karras(schedule, 9)).pow(1 / 7)
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(9))
    ratios = schedule.log_snr(grids.log_snr(schedule, 9))
    torch.testing.assert_close(ratios.diff(), ratios.diff()[:1].expand(9))


def test_karras_is_the_formula_of_edm() -> None:
    i = torch.arange(18, dtype=torch.float64)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(grids.karras(EDM(), 17), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grids.power(VPLinear(), 0), "steps must be at least 1"),
        (lambda: grids.power(VPLinear(), 5, p=0.0), "p must be positive"),
        (lambda: grids.karras(VPLinear(), 5, rho=-1.0), "rho must be positive"),
        (lambda: grids.power(VPLinear(), 5, t_min=0.5, t_max=0.4), "t_min and t_max"),
        (lambda: grids.log_snr(Flow(), 5), "sigma/alpha"),
        (lambda: grids.power(VPLinear(), 5, t_min=math.nan), "t_min and t_max"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
