"""DEIS: its coefficients, the cases it solves exactly, and parity with diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.diffusion import (
    EDM,
    AnalyticGMM,
    CountNFE,
    Denoiser,
    Discrete,
    Flow,
    VPCosine,
    VPLinear,
    deis,
    deis_coefficients,
    deis_rk,
    grids,
    ipndm,
)

SCHEDULE = VPLinear()
DISCRETE = Discrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


def noise(count: int = 64, dim: int = 2) -> Tensor:
    return SCHEDULE.prior(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noise_in_rho(function, schedule=SCHEDULE) -> Denoiser:
    """A model whose predicted noise depends on the noise level only."""
    return Denoiser(lambda x, t: function(schedule.rho(t))[:, None].expand_as(x), schedule)


@pytest.mark.parametrize("variable", ["t", "rho", "log_rho"])
@pytest.mark.parametrize("schedule", [SCHEDULE, VPCosine(), EDM(), Flow(t_max=0.99), DISCRETE])
def test_order_zero_is_ddim(schedule, variable) -> None:
    times = grids.power(schedule, 7)
    table = deis_coefficients(schedule, times, order=0, variable=variable)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    torch.testing.assert_close(table[:, 0], alpha[1:] / alpha[:-1], rtol=1e-14, atol=0)
    # alpha' (x - sigma eps) / alpha + sigma' eps
    torch.testing.assert_close(table[:, 1], sigma[1:] - alpha[1:] / alpha[:-1] * sigma[:-1], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("variable", ["t", "rho", "log_rho"])
def test_coefficients_by_direct_integration(variable) -> None:
    """C_ij = int psi(tau, t') k(tau) L_j(tau) d tau, as the paper writes it, by the trapezoid rule."""
    times = grids.power(SCHEDULE, 6)
    table = deis_coefficients(SCHEDULE, times, order=3, variable=variable)
    change = {"t": lambda t: t, "rho": SCHEDULE.rho, "log_rho": lambda t: SCHEDULE.rho(t).log()}[variable]
    alpha = SCHEDULE.alpha(times)
    for i in range(6):
        used = min(i, 3) + 1
        tau = torch.linspace(times[i].item(), times[i + 1].item(), 200_001, dtype=torch.float64)
        alpha2 = SCHEDULE.alpha(tau) ** 2
        k = -0.5 * 2 * SCHEDULE.f(tau) / (1 - alpha2).sqrt()
        psi = alpha[i + 1] / SCHEDULE.alpha(tau)
        nodes = change(times)[[i - j for j in range(used)]]
        for j in range(used):
            others = nodes[[m for m in range(used) if m != j]]
            basis = ((change(tau)[:, None] - others) / (nodes[j] - others)).prod(1)
            expected = torch.trapezoid(psi * k * basis, tau)
            assert table[i, 1 + j].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-8)
        assert bool((table[i, 1 + used :] == 0).all())


def test_coefficients_on_a_discrete_schedule_survive_its_kinks() -> None:
    times = torch.tensor([999.0, 700.0, 400.0, 150.0, 0.0], dtype=torch.float64)
    table = deis_coefficients(DISCRETE, times, order=3)
    tau = torch.linspace(400.0, 150.0, 250_001, dtype=torch.float64)
    nodes = torch.tensor([400.0, 700.0, 999.0], dtype=torch.float64)
    rho, alpha = DISCRETE.rho(tau), DISCRETE.alpha(times)
    for j in range(3):
        others = nodes[[m for m in range(3) if m != j]]
        basis = ((tau[:, None] - others) / (nodes[j] - others)).prod(1)
        expected = alpha[3] * torch.trapezoid(basis, rho)
        assert table[2, 1 + j].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("variable", ["t", "rho", "log_rho"])
def test_constant_noise_is_exact_in_one_step(order: int, variable) -> None:
    for steps in (1, 5):
        times = grids.power(SCHEDULE, steps)
        out = deis(noise_in_rho(torch.ones_like), noise(), times, order=order, variable=variable)
        alpha, rho = SCHEDULE.alpha(times[[0, -1]]), SCHEDULE.rho(times[[0, -1]])
        torch.testing.assert_close(out, alpha[1] * (noise() / alpha[0] + rho[1] - rho[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_rho_ab_is_exact_for_polynomials_in_rho(degree: int) -> None:
    """After the first steps, whose order is lower, every step is exact."""
    times = grids.log_snr(SCHEDULE, 8, t_max=0.6)
    rho, alpha = SCHEDULE.rho(times), SCHEDULE.alpha(times)
    table = deis_coefficients(SCHEDULE, times, order=degree, variable="rho")
    for i in range(degree, 8):
        gained = sum(table[i, 1 + j] * rho[i - j] ** degree for j in range(degree + 1))
        exact = alpha[i + 1] * (rho[i + 1] ** (degree + 1) - rho[i] ** (degree + 1)) / (degree + 1)
        assert float(gained) == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize(("method", "degree"), [("heun", 1), ("kutta3", 2), ("rk4", 3)])
def test_rho_rk_is_exact_for_polynomials_up_to_its_order(method, degree: int) -> None:
    schedule = EDM(t_min=1.0, t_max=4.0)
    times = grids.power(schedule, 2)
    out = deis_rk(noise_in_rho(lambda rho: rho**degree, schedule), noise(), times, method=method)
    exact = (1.0 - 4.0 ** (degree + 1)) / (degree + 1)
    torch.testing.assert_close(out, noise() + exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("kutta3", 3), ("rk4", 4)])
def test_a_step_of_rho_rk_is_the_exponential_up_to_its_order(method, order: int) -> None:
    """Noise in proportion to the sample makes x' = x on EDM's schedule, and a step a polynomial in its length."""
    growing = Denoiser(lambda x, t: x, EDM(t_min=0.1, t_max=2.0))
    x = noise(4)
    for start, end in ((1.0, 0.3), (0.6, 0.5)):
        out = deis_rk(growing, x, torch.tensor([start, end], dtype=torch.float64), method=method)
        factor = sum((end - start) ** k / math.factorial(k) for k in range(order + 1))
        torch.testing.assert_close(out, factor * x)


def test_equal_steps_in_rho_are_adams_bashforth() -> None:
    table = deis_coefficients(EDM(), torch.tensor([6.0, 5, 4, 3, 2], dtype=torch.float64), order=3, variable="rho")
    expected = [
        [1, 0, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
    torch.testing.assert_close(table[:, 1:], -torch.tensor(expected, dtype=torch.float64))


def test_ipndm_weights() -> None:
    """On equal steps of an EDM schedule iPNDM is rhoAB; its weights sum to DDIM's on any grid."""
    ring = AnalyticGMM.ring(dtype=torch.float64).denoiser(EDM())
    times = torch.linspace(5, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(ipndm(ring, noise(), times), deis(ring, noise(), times, variable="rho"))
    constant, times = noise_in_rho(torch.ones_like), grids.power(SCHEDULE, 6)
    torch.testing.assert_close(ipndm(constant, noise(), times), deis(constant, noise(), times, order=0))


def test_history_is_newest_first() -> None:
    seen = iter([1.0, 10.0, 100.0])
    model = Denoiser(lambda x, t: torch.full_like(x, next(seen)), EDM())
    out = deis(model, torch.zeros(1, 1), torch.tensor([4.0, 3.0, 2.0, 1.0]), order=2, variable="rho")
    expected = -1.0 - (1.5 * 10 - 0.5 * 1) - (23 * 100 - 16 * 10 + 5 * 1) / 12
    assert out.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("sample", "smallest", "steps"),
    [
        (lambda d, x, t: deis(d, x, t, order=2, variable="rho"), 2.5, 80),
        (lambda d, x, t: deis(d, x, t, order=3, variable="rho"), 3.4, 80),
        (lambda d, x, t: deis(d, x, t, order=3, variable="t"), 3.3, 80),
    ],
)
def test_high_order_on_the_ring(sample, smallest: float, steps: int) -> None:
    ring, start = AnalyticGMM.ring(dtype=torch.float64).denoiser(SCHEDULE), noise(128)
    exact = deis_rk(ring, start, grids.power(SCHEDULE, 400), method="rk4")
    coarse, fine = (sample(ring, start, grids.power(SCHEDULE, n)) for n in (steps, 2 * steps))
    ratio = ((coarse - exact).square().mean() / (fine - exact).square().mean()).sqrt()
    assert math.log2(ratio.item()) >= smallest


def test_higher_order_pays_at_ten_evaluations() -> None:
    ring, start = AnalyticGMM.ring(dtype=torch.float64).denoiser(SCHEDULE), noise(128)
    exact = deis_rk(ring, start, grids.power(SCHEDULE, 400), method="rk4")
    errors = [
        (deis(ring, start, grids.power(SCHEDULE, 10), order=order) - exact).square().mean().sqrt().item()
        for order in range(4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0] / 3


@pytest.mark.parametrize(
    ("sample", "per_step"),
    [
        (deis, 1),
        (ipndm, 1),
        (lambda d, x, t: deis_rk(d, x, t, method="heun"), 2),
        (deis_rk, 3),
        (lambda d, x, t: deis_rk(d, x, t, method="rk4"), 4),
    ],
)
def test_evaluations(sample, per_step: int) -> None:
    counted = CountNFE(AnalyticGMM.ring().denoiser(SCHEDULE))
    sample(counted, SCHEDULE.prior(2, 2), grids.power(SCHEDULE, 6))
    assert counted.count == 6 * per_step


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(0, 3), st.sampled_from(["t", "rho", "log_rho"]), st.floats(1.0, 4.0))
def test_weights_of_a_step_sum_to_ddims(steps: int, order: int, variable, p: float) -> None:
    times = grids.power(SCHEDULE, steps, p=p)
    table = deis_coefficients(SCHEDULE, times, order, variable)
    ddim = deis_coefficients(SCHEDULE, times, 0)
    assert table.shape == (steps, order + 2)
    torch.testing.assert_close(table[:, 1:].sum(1), ddim[:, 1], rtol=1e-8, atol=1e-10)


def test_float32_stays_close_to_float64_down_to_small_times() -> None:
    schedule = VPLinear(t_min=1e-4)
    ring, start = AnalyticGMM.ring(), noise(32)
    times = grids.power(schedule, 20)
    double = deis(ring.to(torch.float64).denoiser(schedule), start, times)
    single = deis(ring.denoiser(schedule), start.float(), times)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, atol=2e-3, rtol=0)


def test_gradients_flow_through_the_undecorated_function() -> None:
    ring, start = AnalyticGMM.ring(dtype=torch.float64).denoiser(SCHEDULE), noise(4).requires_grad_()
    assert not deis(ring, start, grids.power(SCHEDULE, 4)).requires_grad
    out = deis.__wrapped__(ring, start, grids.power(SCHEDULE, 4))  # type: ignore[attr-defined]
    out.sum().backward()
    assert bool(torch.isfinite(start.grad).all())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_log_rho_is_diffusers_scheduler(order: int) -> None:
    """The same noises through both: diffusers counts orders from one, and its levels are float32."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(8)
    schedule = Discrete(scheduler.alphas_cumprod.double())
    times = torch.cat([scheduler.timesteps, torch.zeros(1)]).double()
    ring = AnalyticGMM.ring(dtype=torch.float64).denoiser(schedule, "eps")
    theirs = noise(16)
    for t in scheduler.timesteps:
        theirs = scheduler.step(ring(theirs, t.double().expand(16)), t, theirs).prev_sample
    ours = deis(ring, noise(16), times, order=order - 1, variable="log_rho")
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, x, t: deis(d, x, t, order=4), "order must be in \\[0, 3\\], got 4"),
        (lambda d, x, t: ipndm(d, x, t, order=-1), "order must be in \\[0, 3\\], got -1"),
        (lambda d, x, t: deis(d, x, t, variable="time"), "variable must be one of 't', 'rho', 'log_rho', got 'time'"),
        (
            lambda d, x, t: deis_rk(d, x, t, method="euler"),
            "method must be one of 'heun', 'kutta3', 'rk4', got 'euler'",
        ),
        (lambda d, x, t: deis(d, x, t.flip(0)), "times must be"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(AnalyticGMM.ring().denoiser(SCHEDULE), torch.zeros(2, 2), grids.power(SCHEDULE, 4))


def test_schedules_without_data_at_the_start_are_refused_by_name() -> None:
    flow = Flow()
    with pytest.raises(ValueError, match="times must keep alpha and sigma positive on Flow"):
        deis(AnalyticGMM.ring().denoiser(flow, "flow"), torch.zeros(2, 2), grids.power(flow, 4))
