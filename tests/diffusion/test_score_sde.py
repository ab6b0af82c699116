"""Predictor-corrector sampling, likelihood and inpainting: against closed forms, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trimtab.diffusion import (
    EDM,
    VE,
    AnalyticGMM,
    CountNFE,
    Denoiser,
    EDMPreconditioned,
    SubVP,
    VPLinear,
    deis,
    grids,
    inpaint,
    known_region,
    log_likelihood,
    predictor_corrector,
)

VP, EXPLODING = VPLinear(), VE(sigma_max=10.0)
GAUSSIAN = AnalyticGMM.isotropic(torch.tensor([[0.5, -1.0]], dtype=torch.float64), std=0.6)
NAN = float("nan")
PREDICTORS = ("reverse_diffusion", "ancestral", "euler_maruyama")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(schedule, count: int = 2000) -> Tensor:
    return schedule.prior(count, 2, generator=seeded(), dtype=torch.float64)


def drawn(x: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(x.shape, generator=seeded(seed), dtype=x.dtype)


def one_step_with_noise(schedule, times: Tensor, x: Tensor, **settings: object) -> Tensor:
    """The state after the first of two steps, which is the only one with noise."""
    held: list[Tensor] = []
    predictor_corrector(
        GAUSSIAN.denoiser(schedule),
        x,
        times,
        generator=seeded(7),
        callback=lambda step, time, x: held.append(x),
        **settings,
    )
    return held[0]


@pytest.mark.parametrize("schedule", [VP, EXPLODING, SubVP()])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_a_prediction_is_the_formula(schedule, predictor: str) -> None:
    times = torch.tensor([0.8, 0.7, 0.6], dtype=torch.float64)
    x = noise(schedule, 8)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    score = GAUSSIAN.score(x, alpha[0], sigma[0])
    a, z = alpha[0] / alpha[1], drawn(x)
    added = sigma[0] ** 2 - a**2 * sigma[1] ** 2
    if predictor == "reverse_diffusion":
        expected = x - (a - 1) * x + added * score + added.sqrt() * z
    elif predictor == "ancestral":
        exploding = schedule is EXPLODING
        spread = sigma[1] * added.sqrt() / sigma[0] if exploding else added.sqrt()
        expected = (x + added * score) / a + spread * z
    else:
        f, g2 = schedule.f(times[0]), schedule.g2(times[0])
        expected = x - 0.1 * (f * x - g2 * score) + (0.1 * g2).sqrt() * z
    found = one_step_with_noise(schedule, times, x, predictor=predictor, corrections=0)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_release_s_coefficients_are_met_to_first_order() -> None:
    """On N equal steps, 1 - a^2 is beta(t) / N."""
    times = torch.linspace(1, 1e-3, 1001, dtype=torch.float64)
    alpha = VP.alpha(times)
    beta = 0.1 + times[:-1] * 19.9
    torch.testing.assert_close(1 - (alpha[:-1] / alpha[1:]) ** 2, beta / 1000, rtol=0.15, atol=0)
    assert float(beta[500] / 1000) == pytest.approx(float(1 - (alpha[500] / alpha[501]) ** 2), rel=0.01)


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_correction_is_the_formula(per_sample: bool) -> None:
    times = torch.tensor([0.8, 0.7, 0.6], dtype=torch.float64)
    x = noise(VP, 8)
    alpha, sigma = VP.alpha(times), VP.sigma(times)
    score, z = GAUSSIAN.score(x, alpha[0], sigma[0]), drawn(x)
    ratio = z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)
    if not per_sample:
        ratio = z.norm(dim=1).mean() / score.norm(dim=1).mean()
    size = 2 * (alpha[0] / alpha[1]) ** 2 * (0.3 * ratio) ** 2
    found = one_step_with_noise(VP, times, x, predictor=None, snr=0.3, per_sample=per_sample)
    torch.testing.assert_close(found, x + size * score + (2 * size).sqrt() * z)


@pytest.mark.parametrize("schedule", [VP, EXPLODING, SubVP()])
@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("corrections", [0, 1])
def test_samples_have_the_data_s_moments(schedule, predictor: str, corrections: int) -> None:
    grid = grids.log_snr if schedule is EXPLODING else grids.power
    model, times = GAUSSIAN.denoiser(schedule), grid(schedule, 120)
    x = predictor_corrector(
        model, noise(schedule), times, predictor=predictor, corrections=corrections, snr=0.1, generator=seeded(1)
    )
    torch.testing.assert_close(x.mean(0), GAUSSIAN.mean, atol=0.06, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((2,), 0.6, dtype=torch.float64), atol=0.05, rtol=0)


def test_the_sde_and_the_ode_have_the_same_marginals() -> None:
    ring = AnalyticGMM.ring(5, std=0.2, dtype=torch.float64)
    model, times = ring.denoiser(VP), grids.power(VP, 150)
    sde = predictor_corrector(model, noise(VP, 4000), times, corrections=0, generator=seeded(1))
    ode = deis(model, noise(VP, 4000), times)
    for x in (sde, ode):
        torch.testing.assert_close(x.mean(0), ring.mean, atol=0.05, rtol=0)
        torch.testing.assert_close(torch.cov(x.T), ring.cov, atol=0.04, rtol=0)


def test_corrections_alone_keep_the_distribution_they_are_at() -> None:
    """Langevin steps at one noise level leave its distribution; here they also bring a wrong one to it."""
    times = torch.linspace(0.5, 0.4999, 200, dtype=torch.float64)
    model, wrong = GAUSSIAN.denoiser(VP), torch.zeros(2000, 2, dtype=torch.float64)
    x = predictor_corrector(model, wrong, times, predictor=None, snr=0.3, generator=seeded(1))
    alpha, sigma = VP.alpha(times[-1]), VP.sigma(times[-1])
    torch.testing.assert_close(x.mean(0), alpha * GAUSSIAN.mean, atol=0.05, rtol=0)
    spread = float((alpha**2 * 0.36 + sigma**2).sqrt())
    # Steps of this size, 0.18 in units of the variance, are wider by the factor (1 - 0.18 / 2)^-1/2.
    assert float(x.std(0).mean()) == pytest.approx(spread / (1 - 0.09) ** 0.5, rel=0.04)


def test_corrections_mend_a_start_that_is_wrong() -> None:
    """From noise that is too narrow, the prediction alone stays too narrow."""
    model, times = GAUSSIAN.denoiser(EXPLODING), grids.log_snr(EXPLODING, 30)
    narrow = 0.1 * noise(EXPLODING)
    spreads = [
        predictor_corrector(model, narrow, times, corrections=n, snr=0.3, generator=seeded(1)).std().item()
        for n in (0, 3)
    ]
    assert abs(spreads[1] - 0.6) < abs(spreads[0] - 0.6)


def test_evaluations() -> None:
    counted = CountNFE(GAUSSIAN.denoiser(VP))
    times = grids.power(VP, 10)
    for settings, evaluations in (({"corrections": 0}, 10), ({}, 20), ({"predictor": None, "corrections": 3}, 30)):
        predictor_corrector(counted, noise(VP, 2), times, generator=seeded(), **settings)
        assert counted.count == evaluations


def test_step_sizes_of_one_s_own_make_samples_independent() -> None:
    x, times = noise(VP, 4), grids.power(VP, 5)
    widened = torch.cat([x, 100 * x])

    def sample(x: Tensor, per_sample: bool) -> Tensor:
        # The noise of the first four is the same: one draw of (8, 2) begins as one of (4, 2) does only step by step.
        model = GAUSSIAN.denoiser(VP)
        return predictor_corrector(
            model, x, times[:3], predictor=None, per_sample=per_sample, generator=seeded(), callback=None
        )

    assert not torch.allclose(sample(widened, False)[:1], sample(widened[:7], False)[:1])
    held = [sample(torch.cat([x, scale * x]), True)[:4] for scale in (1.0, 100.0)]
    torch.testing.assert_close(*held)


def test_samples_keep_their_precision() -> None:
    x, times = torch.randn(4, 2, generator=seeded(), dtype=torch.float16), grids.power(VP, 4)
    seen = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return 0.5 * x

    for predictor in (*PREDICTORS, None):
        out = predictor_corrector(Denoiser(model, VP, "x0"), x, times, predictor=predictor, generator=seeded())
        assert out.dtype == torch.float16
        assert bool(torch.isfinite(out).all())
    assert seen == {torch.float16}


def test_bad_settings() -> None:
    model, times = GAUSSIAN.denoiser(VP), grids.power(VP, 3)
    for settings, message in (
        ({"predictor": "heun"}, "predictor must be one of"),
        ({"predictor": None, "corrections": 0}, "corrections must be at least 1 without a predictor"),
        ({"corrections": -1}, "corrections must be at least 0"),
        ({"snr": 0.0}, "snr must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor_corrector(model, noise(VP, 2), times, **settings)


@pytest.mark.parametrize("schedule", [VP, VE(sigma_max=50.0), SubVP(), EDM()])
def test_likelihood_of_gaussian_data_in_closed_form(schedule) -> None:
    """From `t_min` on: the density is that of data with its little noise, and the prior's is not quite the end's."""
    x = GAUSSIAN.sample(6, generator=seeded())
    found = log_likelihood(GAUSSIAN.denoiser(schedule), x, divergence="exact", tolerance=1e-7)
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    alpha, sigma = schedule.alpha(ends), schedule.sigma(ends)
    spread = (alpha**2 * 0.36 + sigma**2).sqrt()
    carried = alpha[1] * GAUSSIAN.mean + spread[1] / spread[0] * (x - alpha[0] * GAUSSIAN.mean)
    prior = torch.distributions.Normal(0.0, schedule.prior_std).log_prob(carried).sum(1)
    expected = GAUSSIAN.log_prob(x, alpha[0], sigma[0]) + prior - GAUSSIAN.log_prob(carried, alpha[1], sigma[1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_likelihood_of_a_mixture_and_its_estimate() -> None:
    ring = AnalyticGMM.ring(5, std=0.2, dtype=torch.float64)
    x = torch.cat([ring.sample(5, generator=seeded()), torch.zeros(1, 2, dtype=torch.float64)])
    schedule = VPLinear(t_min=1e-5)
    exact = log_likelihood(ring.denoiser(schedule, "eps"), x, divergence="exact")
    torch.testing.assert_close(exact, ring.log_prob(x), atol=1e-3, rtol=0)
    # Along a probe v and one across it the estimates average to the trace: here they are (1, 1) and (1, -1).
    probes = [torch.tensor([[1.0, sign]], dtype=torch.float64).expand(6, 2) for sign in (1.0, -1.0)]
    estimates = [log_likelihood(ring.denoiser(schedule), x, probe=probe) for probe in probes]
    torch.testing.assert_close(sum(estimates) / 2, exact, atol=1e-3, rtol=0)
    assert not torch.allclose(estimates[0], exact, atol=1e-2)


def test_likelihood_of_a_network_with_images() -> None:
    """Any shape and precision; a network that says zero noise at the prior's level is the prior pulled back."""

    class Net(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return torch.zeros_like(x)

    denoiser = EDMPreconditioned(Net(), sigma_data=0.7, schedule=EDM(t_min=1e-3))
    x = torch.randn(3, 1, 2, 2, generator=seeded())
    found = log_likelihood(denoiser, x, generator=seeded(1))
    # D = c_skip x is the exact denoiser of N(0, 0.7^2), whose divergence does not depend on the probe's signs.
    normal = torch.distributions.Normal(0.0, math.hypot(0.7, 1e-3))
    torch.testing.assert_close(found, normal.log_prob(x.double()).flatten(1).sum(1), atol=1e-2, rtol=0)
    assert found.shape == (3,)


def test_likelihood_refuses() -> None:
    x = torch.zeros(2, 2, dtype=torch.float64)
    model = GAUSSIAN.denoiser(VP)
    with pytest.raises(ValueError, match="divergence must be one of"):
        log_likelihood(model, x, divergence="skilling")
    with pytest.raises(ValueError, match="probe must be of shape"):
        log_likelihood(model, x, probe=x[:1])
    with pytest.raises(ValueError, match="x must be finite"):
        log_likelihood(model, x / 0)
    with pytest.raises(TypeError, match="denoiser must have a schedule and a prediction"):
        log_likelihood(nn.Identity(), x)
    broken = Denoiser(lambda x, t: x * torch.where(t < 0.5, 1.0, NAN)[:, None], VP)
    with pytest.raises(ValueError, match="denoiser must be finite and smooth"):
        log_likelihood(broken, torch.ones_like(x), divergence="exact")


def test_known_numbers_are_noised_to_the_time_reached() -> None:
    data, mask = torch.full((5000, 2), 3.0, dtype=torch.float64), torch.tensor([True, False]).expand(5000, 2)
    x = known_region(VP, data, mask, generator=seeded())(4, 0.5, torch.zeros(5000, 2, dtype=torch.float64))
    at = torch.tensor(0.5, dtype=torch.float64)
    assert float(x[:, 0].mean()) == pytest.approx(3 * VP.alpha(at).item(), abs=0.05)
    assert float(x[:, 0].std()) == pytest.approx(VP.sigma(at).item(), rel=0.05)
    assert bool((x[:, 1] == 0).all())


def test_inpainting_draws_from_the_conditional_distribution() -> None:
    """Two modes, (-1, -1) and (1, 1): the known half says which one."""
    ends = AnalyticGMM.isotropic(torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64), std=0.2)
    data = torch.where(torch.arange(400)[:, None] % 2 == 0, 0.9, -0.9).expand(400, 2).double()
    mask = torch.tensor([True, False]).expand(400, 2)
    times = grids.log_snr(EXPLODING, 100)
    out = inpaint(ends.denoiser(EXPLODING), noise(EXPLODING, 400), times, data, mask, generator=seeded())
    assert torch.equal(out[:, 0], data[:, 0])
    assert float((out[:, 1].sign() == data[:, 0].sign()).double().mean()) > 0.97
    assert float((out[:, 1] - data[:, 0].sign()).std()) == pytest.approx(0.2, abs=0.05)
    # The unknown half of the data is never read.
    scrambled = torch.where(mask, data, 77.0)
    again = inpaint(
        ends.denoiser(EXPLODING),
        noise(EXPLODING, 400),
        times,
        scrambled,
        mask,
        generator=seeded(),
    )
    assert torch.equal(again[:, 1], out[:, 1])


def test_inpainting_starts_from_noised_data_where_they_are_known() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    schedule = EDM(t_min=0.1, t_max=2.0)
    x, data = torch.zeros(2, 3), torch.full((2, 3), 7.0)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    times = torch.tensor([2.0, 0.5], dtype=torch.float64)
    inpaint(Denoiser(model, schedule, "x0"), x, times, data, mask, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[0], torch.where(mask, data + 2 * noise, x))


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama"])
def test_the_last_prediction_adds_no_noise(predictor: Any) -> None:
    denoiser = Denoiser(lambda x, t: x / 2, EDM(t_min=0.1, t_max=2.0), "x0")
    x = torch.ones(3, 2)
    for times, same in (([2.0, 0.5], True), ([2.0, 1.0, 0.5], False)):
        ends = [
            predictor_corrector(
                denoiser,
                x,
                torch.tensor(times, dtype=torch.float64),
                predictor=predictor,
                corrections=0,
                generator=torch.Generator().manual_seed(seed),
            )
            for seed in (0, 1)
        ]
        assert torch.equal(*ends) == same


def test_inpainting_refuses() -> None:
    model, x = GAUSSIAN.denoiser(VP), noise(VP, 2)
    with pytest.raises(TypeError, match="mask must be boolean"):
        inpaint(model, x, grids.power(VP, 3), x, torch.ones(2, 2))
    with pytest.raises(ValueError, match="mask must be of shape"):
        inpaint(model, x, grids.power(VP, 3), x, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="data must be of shape"):
        inpaint(model, x, grids.power(VP, 3), x[:1], torch.ones(2, 2, dtype=torch.bool))


def test_a_point_is_found_by_every_predictor() -> None:
    """One data point: the last step, without noise, goes to it up to the least noise."""
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    model = Denoiser(lambda x, t: point.expand_as(x), EXPLODING, prediction="x0")
    for predictor in PREDICTORS:
        x = predictor_corrector(
            model, noise(EXPLODING, 8), grids.log_snr(EXPLODING, 60), predictor=predictor, generator=seeded()
        )
        torch.testing.assert_close(x, point.expand(8, 2), atol=0.05, rtol=0)


def test_a_likelihood_of_what_is_not_finite_is_refused() -> None:
    """The solver would look for a small enough step without end."""
    x = torch.randn(3, 2)
    broken = Denoiser(lambda x, t: x / torch.zeros_like(x), VPLinear())
    with pytest.raises(ValueError, match="denoiser must be finite"):
        log_likelihood(broken, x)
    sound = Denoiser(lambda x, t: x, VPLinear())
    with pytest.raises(ValueError, match="probe must be finite"):
        log_likelihood(sound, x, probe=torch.full((3, 2), torch.nan))
    with pytest.raises(TypeError, match="probe must be floating point"):
        log_likelihood(sound, x, probe=torch.ones(3, 2, dtype=torch.int64))


def test_arrays_are_refused_by_name() -> None:
    x, mask = torch.randn(3, 2), torch.ones(3, 2, dtype=torch.bool)
    model, times = Denoiser(lambda x, t: x, VPLinear()), grids.power(VPLinear(), 4)
    with pytest.raises(TypeError, match="data and mask must be tensors, got ndarray and Tensor"):
        known_region(VPLinear(), x.numpy(), mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be floating point"):
        inpaint(model, x.long(), times, x, mask)
    with pytest.raises(ValueError, match="times must be a 1-d tensor"):
        inpaint(model, x, times[:0], x, mask)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_the_likelihood_is_there_in_inference_mode(divergence: str) -> None:
    model, x = GAUSSIAN.denoiser(VP), noise(VP, 3)
    expected = log_likelihood(model, x, divergence=divergence, generator=seeded())
    with torch.inference_mode():
        found = log_likelihood(model, x.clone(), divergence=divergence, generator=seeded())
    assert torch.equal(found.clone(), expected)
