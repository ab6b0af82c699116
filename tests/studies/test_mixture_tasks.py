"""The sampling tasks: their data, their references and their baselines."""

from __future__ import annotations

import math

import pytest
import torch

from trimtab.data import load
from trimtab.diffusion import AnalyticGMM, VPLinear, deis_rk, grids
from trimtab.studies.diffusion.deis import euler
from trimtab.studies.study import Trial
from trimtab.studies.tasks.guided_sampling import GuidedSampling
from trimtab.studies.tasks.mixture_sampling import GRIDS, MixtureSampling, mixture


def test_the_digits_mixture_is_digits() -> None:
    """Its exact classifier reads real digits, and its moments are theirs."""
    digits = mixture("digits")
    assert (digits.dim, digits.num_classes, len(digits.means)) == (64, 10, 30)
    data = load("digits")
    x = data.x_train.flatten(1).double() * 2 - 1
    read = digits.class_log_posterior(x, 1.0, 0.3).argmax(1)
    assert float((read == data.y_train).double().mean()) > 0.95
    torch.testing.assert_close(digits.mean, x.mean(0), atol=0.05, rtol=0)
    assert bool((digits.floor - 0.02**2).abs().max() < 1e-6)
    assert digits.basis.shape == (30, 64, 8)


def test_euler_solves_the_same_equation_at_first_order() -> None:
    schedule = VPLinear()
    ring = AnalyticGMM.ring(dtype=torch.float64).denoiser(schedule)
    noise = schedule.prior(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = deis_rk(ring, noise, grids.log_snr(schedule, 200), method="rk4")
    errors = [(euler(ring, noise, grids.power(schedule, n)) - exact).square().mean().sqrt().item() for n in (100, 200)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.2)


def test_an_exact_sampler_has_no_error_and_runs_repeat() -> None:
    task = MixtureSampling()
    perfect = task.sample(
        lambda denoiser, x, times: deis_rk(denoiser, x, grids.log_snr(denoiser.schedule, 20), method="rk4")
    )
    assert perfect(Trial(seed=1)).metrics["rmse_10"] == 0.0
    results = [task.sample()(Trial(seed=1)) for _ in range(2)]
    assert results[0] == results[1]
    assert set(task.metrics) == set(results[0].metrics)
    assert results[0].metrics["rmse_5"] > results[0].metrics["rmse_20"] > 0


def test_every_contestant_gets_its_best_grid() -> None:
    tried: list[tuple[float, ...]] = []

    def watch(denoiser, x, times):
        tried.append(tuple(times.tolist()))
        return x

    MixtureSampling().sample(watch)(Trial())
    assert len({times for times in tried if len(times) == 11}) == len(GRIDS)


def test_guidance_raises_accuracy_and_contrast() -> None:
    task = GuidedSampling()
    guided = task.guide()(Trial())
    unguided = task.guide(lambda denoiser, labels, scale: task_model(denoiser, labels))(Trial())
    assert set(task.metrics) == set(guided.metrics)
    assert guided.metrics["accuracy"] > unguided.metrics["accuracy"] + 0.2
    assert guided.metrics["contrast_error"] > unguided.metrics["contrast_error"]
    assert guided.metrics["nfe"] == 2 * unguided.metrics["nfe"] == 50


def task_model(denoiser, labels):
    from trimtab.diffusion import ClassifierFreeGuidance

    return ClassifierFreeGuidance(denoiser, labels, scale=1.0)


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target must be 'ring8' or 'digits', got 'spiral'"):
        mixture("spiral")  # type: ignore[arg-type]
