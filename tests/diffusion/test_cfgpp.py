"""CFG++: what it is in terms of classifier-free guidance, its limits, and inversion."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import (
    EDM,
    AnalyticGMM,
    CFGPlusPlus,
    ClassifierFreeGuidance,
    CountNFE,
    Denoiser,
    Split,
    VPLinear,
    convert,
    ddim,
    ddim_invert,
    degrade,
    grids,
    predict,
)
from trimtab.diffusion.prediction import PREDICTIONS

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(dtype=torch.float64)
MODEL = degrade(RING.denoiser(SCHEDULE, "eps"), class_blur=0.4)
LABELS = torch.arange(6)
X = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T = torch.full((6,), 0.6, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.2, 0.6, 1.0])
def test_a_step_is_one_of_classifier_free_guidance_at_a_scale_that_grows_as_steps_shrink(scale: float) -> None:
    scales = []
    for start, end in ((0.9, 0.7), (0.6, 0.5), (0.6, 0.55), (0.1, 0.01)):
        times = torch.tensor([start, end], dtype=torch.float64)
        rho = SCHEDULE.rho(times)
        scales.append(scale * (rho[0] / (rho[0] - rho[1])).item())
        plain = ddim(ClassifierFreeGuidance(MODEL, LABELS, scale=scales[-1]), X, times)
        torch.testing.assert_close(ddim(CFGPlusPlus(MODEL, LABELS, scale=scale), X, times), plain)
    assert scales[2] > scales[1]  # a shorter step from the same level


def test_clean_estimate_lies_between_the_two_and_the_noise_is_unconditional() -> None:
    cond, uncond = MODEL(X, T, LABELS), MODEL(X, T)
    alpha, sigma = SCHEDULE.alpha(T), SCHEDULE.sigma(T)
    for scale in (0.3, 1.0):
        split = CFGPlusPlus(MODEL, LABELS, scale=scale)(X, T)
        assert isinstance(split, Split)
        torch.testing.assert_close(split.eps, uncond)
        ends = [convert(eps, X, alpha, sigma, "eps", "x0") for eps in (uncond, cond)]
        torch.testing.assert_close(split.x0, torch.lerp(*ends, scale))


def test_without_a_scale_it_is_the_unconditional_model_at_half_the_cost() -> None:
    counted, times = CountNFE(MODEL), grids.power(SCHEDULE, 10)
    x = ddim(CFGPlusPlus(counted, LABELS, scale=0.0), X, times)
    assert counted.count == 10
    assert torch.equal(x, ddim(Denoiser(lambda x, t: MODEL(x, t), SCHEDULE), X, times))


def test_on_edm_it_is_the_step_of_k_diffusion() -> None:
    """x <- D_guided + sigma' (x - D_uncond) / sigma."""
    schedule = EDM()
    model = degrade(RING.denoiser(schedule), class_blur=0.4)
    times = torch.tensor([3.0, 2.0], dtype=torch.float64)
    t = times[0].expand(6)
    cond, uncond = model(X, t, LABELS), model(X, t)
    expected = uncond + 0.6 * (cond - uncond) + 2.0 * (X - uncond) / 3.0
    torch.testing.assert_close(ddim(CFGPlusPlus(model, LABELS, scale=0.6), X, times), expected)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_any_kind_of_prediction(kind) -> None:
    times = grids.power(SCHEDULE, 8)
    model = degrade(RING.denoiser(SCHEDULE, kind), class_blur=0.4)
    guided, first = CFGPlusPlus(model, LABELS), CFGPlusPlus(MODEL, LABELS)
    torch.testing.assert_close(ddim(guided, X, times), ddim(first, X, times))
    torch.testing.assert_close(ddim_invert(guided, X, times), ddim_invert(first, X, times))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_samples_keep_their_precision(kind) -> None:
    guided, times = CFGPlusPlus(Denoiser(lambda x, t, cond: 0.5 * x, SCHEDULE, kind), LABELS), grids.power(SCHEDULE, 4)
    x = ddim(guided, X.half(), times)
    assert x.dtype == ddim_invert(guided, x, times).dtype == torch.float16


@pytest.mark.parametrize("rule", [CFGPlusPlus, ClassifierFreeGuidance])
def test_inversion_undoes_sampling_where_predictions_agree(rule) -> None:
    """With a noise that is predicted the same everywhere, forward and backward steps are each other's inverse."""
    cond, uncond = torch.randn(2, 6, 2, dtype=torch.float64)
    constant = Denoiser(lambda x, t, c: uncond if c is None else cond, SCHEDULE)
    guided, times = rule(constant, LABELS, scale=0.7), grids.power(SCHEDULE, 6, t_max=0.8)
    assert not torch.allclose(ddim(guided, X, times), X)
    torch.testing.assert_close(ddim(guided, ddim_invert(guided, X, times), times), X)
    torch.testing.assert_close(ddim_invert(guided, ddim(guided, X, times), times), X)


def test_a_callback_sees_every_step_back_and_may_replace_the_sample() -> None:
    times, seen = grids.power(SCHEDULE, 5), []
    guided = CFGPlusPlus(MODEL, LABELS)
    out = ddim_invert(guided, X, times, callback=lambda *step: seen.append(step))
    assert [step for step, _, _ in seen] == list(range(5))
    assert [time for _, time, _ in seen] == times[:-1].flip(0).tolist()
    torch.testing.assert_close(seen[-1][2], out, rtol=0, atol=0)
    replaced = ddim_invert(guided, X, times, callback=lambda step, time, x: torch.zeros_like(x))
    assert not replaced.any()


def test_inversion_of_a_plain_denoiser_is_of_first_order() -> None:
    x = RING.sample(32, generator=torch.Generator().manual_seed(1))
    plain = RING.denoiser(SCHEDULE)
    errors = []
    for steps in (200, 400):
        times = grids.log_snr(SCHEDULE, steps)
        errors.append((ddim(plain, ddim_invert(plain, x, times), times) - x).square().mean().sqrt().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.25)


def test_inversion_reaches_noise() -> None:
    x = RING.sample(2000, generator=torch.Generator().manual_seed(1))
    noise = ddim_invert(RING.denoiser(SCHEDULE), x, grids.log_snr(SCHEDULE, 100))
    torch.testing.assert_close(torch.cov(noise.T), torch.eye(2, dtype=torch.float64), atol=0.12, rtol=0)
    before = x.clone()
    assert torch.equal(x, before)


def test_smaller_scales_than_the_largest_guide_less() -> None:
    """The class's share among samples grows with the scale."""
    labels = torch.arange(8).repeat(25)
    noise = SCHEDULE.prior(200, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def accuracy(scale: float) -> float:
        x = ddim(CFGPlusPlus(MODEL, labels, scale=scale), noise, grids.power(SCHEDULE, 25))
        return float((RING.class_log_posterior(x).argmax(1) == labels).double().mean())

    assert accuracy(0.0) < accuracy(0.4) - 0.1 < accuracy(1.0)


@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan")])
def test_bad_scales(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be"):
        CFGPlusPlus(MODEL, LABELS, scale=scale)


def test_bad_input_of_the_inversion() -> None:
    with pytest.raises(ValueError, match="times must be a 1-d tensor"):
        ddim_invert(MODEL, X, torch.tensor([0.1, 0.5]))
    with pytest.raises(ValueError, match="times must keep alpha and sigma positive"):
        ddim_invert(MODEL, X, torch.tensor([0.5, 0.0]))
    with pytest.raises(TypeError, match="the outermost wrapper"):
        ClassifierFreeGuidance(_split_model(), LABELS)(X, T)


def _split_model() -> Denoiser:
    inner = CFGPlusPlus(MODEL, LABELS)

    def call(x: Tensor, t: Tensor, cond: object) -> Tensor:
        return inner(x, t)  # type: ignore[return-value]

    assert predict(inner, X, T, "x0").shape == X.shape
    return Denoiser(call, SCHEDULE)
