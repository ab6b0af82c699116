"""DDIM, Euler's method and DPM-Solver++: the cases they solve exactly, and parity with diffusers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import EDM, AnalyticGMM, Denoiser, Flow, VPCosine, VPLinear, ddim, deis, dpm_solver, euler, grids
from trimtab.diffusion.denoiser import Split, model_times, predict

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(dtype=torch.float64)


def noise(count: int = 16) -> Tensor:
    return SCHEDULE.prior(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("schedule", [SCHEDULE, VPCosine(), EDM(), Flow(t_max=0.99)])
def test_ddim_is_order_zero_of_deis(schedule) -> None:
    model, times = RING.denoiser(schedule), grids.power(schedule, 7)
    torch.testing.assert_close(ddim(model, noise(), times), deis(model, noise(), times, order=0), rtol=1e-9, atol=1e-9)


def test_euler_in_the_noise_level_is_ddim() -> None:
    """On EDM's schedule there is no linear part: dx/dt = eps."""
    model, times = RING.denoiser(EDM()), grids.karras(EDM(), 9)
    torch.testing.assert_close(euler(model, noise(), times), ddim(model, noise(), times))


def test_euler_solves_the_linear_part_only_to_first_order() -> None:
    """Without noise the ODE is dx = f x dt."""
    nothing = Denoiser(lambda x, t: torch.zeros_like(x), SCHEDULE)
    times = torch.tensor([0.5, 0.4], dtype=torch.float64)
    factor = 1 - 0.1 * SCHEDULE.f(times[:1]).item()
    torch.testing.assert_close(euler(nothing, noise(), times), factor * noise())
    exact = SCHEDULE.alpha(times[1]) / SCHEDULE.alpha(times[0])
    torch.testing.assert_close(ddim(nothing, noise(), times), exact * noise())


@pytest.mark.parametrize("steps", [20, 15, 14, 6])
def test_dpm_solver_is_exact_for_predictions_linear_in_lambda_up_to_its_first_and_last_steps(steps: int) -> None:
    """x / sigma grows by the integral of x0 e^lambda; the extrapolation uses the interval's middle value of x0."""
    schedule = EDM(t_min=0.01, t_max=10.0)
    times = grids.log_snr(schedule, steps)
    out = dpm_solver(Denoiser(lambda x, t: -t.log()[:, None].expand_as(x), schedule, "x0"), noise(), times)
    x, lam = noise(), -times.log()
    for i in range(steps):
        half = 0.0 if i == 0 or (i == steps - 1 and steps < 15) else (lam[i + 1] - lam[i]) / 2
        x = times[i + 1] / times[i] * x + (1 - times[i + 1] / times[i]) * (lam[i] + half)
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize("steps", [6, 20])
def test_dpm_solver_is_that_of_diffusers(steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="sample", final_sigmas_type="sigma_min")
    times, model = grids.karras(SCHEDULE, steps), RING.denoiser(SCHEDULE)
    scheduler.set_timesteps(steps)
    # Its own times are integers; these levels take their place.
    scheduler.sigmas, scheduler.timesteps = SCHEDULE.rho(times), torch.arange(steps, 0, -1)
    scheduler.set_begin_index(0)
    x = noise()
    for label, t in zip(scheduler.timesteps, model_times(times[:-1], x), strict=True):
        x = scheduler.step(predict(model, x, t, "x0"), label, x).prev_sample
    torch.testing.assert_close(dpm_solver(model, noise(), times), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [ddim, euler, dpm_solver])
def test_a_split_moves_to_its_clean_part_and_puts_its_noise_back(sampler) -> None:
    class Parts:
        schedule, prediction = SCHEDULE, "x0"

        def __call__(self, x: Tensor, t: Tensor) -> Split:
            return Split(torch.full_like(x, 2.0), torch.full_like(x, -1.0))

    times = torch.tensor([0.5, 0.5 - 1e-9], dtype=torch.float64)
    out = sampler(Parts(), noise(), times)
    expected = 2 * SCHEDULE.alpha(times[1]) - SCHEDULE.sigma(times[1])
    torch.testing.assert_close(out, expected.expand_as(out), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [ddim, euler, dpm_solver])
def test_times_must_keep_data_and_noise(sampler) -> None:
    with pytest.raises(ValueError, match="times must keep alpha and sigma positive on Flow"):
        sampler(RING.denoiser(Flow()), noise(), grids.power(Flow(), 4))
