"""Noise schedules: closed forms, inverses and the SDE they belong to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.diffusion import EDM, VE, Discrete, Flow, SubVP, VPCosine, VPLinear
from trimtab.diffusion.schedules import NoiseSchedule, per_sample

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
SCHEDULES: dict[str, NoiseSchedule] = {
    "VPLinear": VPLinear(),
    "SubVP": SubVP(),
    "VPCosine": VPCosine(),
    "VE": VE(),
    "EDM": EDM(),
    "Flow": Flow(t_max=0.999),
    "Discrete": Discrete(torch.cumprod(1 - BETAS, 0)),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def inside(schedule: NoiseSchedule, count: int = 41) -> torch.Tensor:
    return torch.linspace(schedule.t_min, schedule.t_max, count, dtype=torch.float64)


@every_schedule
def test_noise_level_inverts_and_grows(name: str) -> None:
    schedule = SCHEDULES[name]
    t = inside(schedule)
    rho = schedule.rho(t)
    torch.testing.assert_close(rho, schedule.sigma(t) / schedule.alpha(t), rtol=1e-10, atol=0)
    assert bool((rho.diff() > 0).all())
    torch.testing.assert_close(schedule.t_of_rho(rho), t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-9)


@every_schedule
def test_drift_and_diffusion_move_the_moments(name: str) -> None:
    """d alpha/dt = f alpha and d sigma^2/dt = 2 f sigma^2 + g^2, by central differences."""
    schedule = SCHEDULES[name]
    # Off the integers, where a discrete schedule has kinks.
    t = inside(schedule, 12)[1:-1] + 0.3 * 1e-3 * schedule.t_max
    h = 1e-5 * schedule.t_max
    f, g2 = schedule.f(t), schedule.g2(t)
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(f * schedule.alpha(t), slope, rtol=1e-5, atol=1e-7)
    variance = (schedule.sigma(t + h) ** 2 - schedule.sigma(t - h) ** 2) / (2 * h)
    torch.testing.assert_close(2 * f * schedule.sigma(t) ** 2 + g2, variance, rtol=1e-5, atol=1e-7)


def test_closed_forms() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    half = one / 2
    vp = VPLinear()
    assert vp.alpha(one).item() == pytest.approx(0.0065716, abs=5e-8)
    assert vp.sigma(one).item() == pytest.approx(0.9999784, abs=5e-8)
    assert vp.f(half).item() == pytest.approx(-0.5 * (0.1 + 0.5 * 19.9))
    assert vp.g2(half).item() == pytest.approx(0.1 + 0.5 * 19.9)
    assert VE().g2(half).item() == pytest.approx(VE().sigma(half).item() ** 2 * 2 * torch.log(one * 5000).item())
    assert EDM().g2(one * 3).item() == pytest.approx(6.0)
    assert Flow().f(half).item() == pytest.approx(-2.0)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), SCHEDULES["Discrete"]])
def test_variance_preserving(schedule: NoiseSchedule) -> None:
    t = inside(schedule)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    assert schedule.prior_std == 1.0


def test_sub_vp_has_less_noise_than_vp() -> None:
    t = inside(VPLinear())
    assert bool((SubVP().sigma(t) <= VPLinear().sigma(t)).all())
    torch.testing.assert_close(SubVP().sigma(t), VPLinear().sigma(t) ** 2)


def test_cosine_starts_clean_and_matches_its_definition() -> None:
    t = torch.tensor([0.0, 0.4], dtype=torch.float64)
    angle = (t + 0.008) / 1.008 * torch.pi / 2
    expected = torch.cos(angle) / torch.cos(angle[0])
    torch.testing.assert_close(VPCosine().alpha(t), expected)


def test_discrete_is_the_table_at_integers_and_linear_between() -> None:
    table = torch.cumprod(1 - BETAS, 0)
    schedule = Discrete(table)
    times = torch.tensor([0.0, 1.0, 500.0, 998.5, 999.0], dtype=torch.float64)
    expected = torch.stack([table[0], table[1], table[500], (table[998] + table[999]) / 2, table[999]])
    torch.testing.assert_close(schedule.alpha(times) ** 2, expected)
    # float32 times from a network's side work as well.
    torch.testing.assert_close(schedule.alpha(times.float()), expected.sqrt().float())


def test_slopes_work_where_gradients_are_off() -> None:
    t = torch.tensor([0.5], dtype=torch.float64)
    expected = VPLinear().f(t)
    with torch.no_grad():
        assert torch.equal(VPLinear().f(t), expected)
    with torch.inference_mode():
        assert torch.equal(VPLinear().f(t.clone()), expected)


def test_add_noise_per_sample() -> None:
    schedule, x0, noise = VPLinear(), torch.ones(2, 3, 4), torch.full((2, 3, 4), 2.0)
    t = torch.tensor([0.1, 0.7])
    noisy = schedule.add_noise(x0, noise, t)
    for i in range(2):
        expected = schedule.alpha(t[i]) + 2 * schedule.sigma(t[i])
        torch.testing.assert_close(noisy[i], expected.expand(3, 4))
    assert per_sample(0.5, x0) == 0.5


def test_prior_is_reproducible_and_scaled() -> None:
    draws = [VE().prior(2000, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].std().item() == pytest.approx(50, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 5), st.floats(5.1, 40), st.floats(1e-3, 1.0))
def test_vp_inverse_for_any_betas(beta_min: float, beta_max: float, time: float) -> None:
    schedule = VPLinear(beta_min=beta_min, beta_max=beta_max)
    t = torch.tensor(time, dtype=torch.float64)
    assert schedule.t_of_rho(schedule.rho(t)).item() == pytest.approx(time, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPLinear(t_min=1.0, t_max=0.5), "t_min and t_max"),
        (lambda: VPLinear(beta_min=0.0), "beta_min"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "sigma_min"),
        (lambda: VPCosine(t_max=1.0), "t_max"),
        (lambda: Discrete(torch.tensor([0.5, 0.9])), "alphas_cumprod must fall"),
        (lambda: Discrete(torch.tensor([0.9, float("nan")])), "alphas_cumprod must fall"),
        (lambda: Discrete(torch.ones(3, 2)), "alphas_cumprod must have shape"),
    ],
)
def test_bad_input(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_closed_form_of_a_table_is_its_derivative(dtype: torch.dtype) -> None:
    schedule = SCHEDULES["Discrete"]
    t = torch.cat([torch.rand(50, generator=torch.Generator().manual_seed(0)) * schedule.t_max, torch.arange(5.0)])
    t = torch.cat([t, torch.tensor([schedule.t_max])]).to(dtype)
    torch.testing.assert_close(schedule.g2(t), NoiseSchedule.g2(schedule, t))
    assert schedule.g2(t).dtype == dtype
