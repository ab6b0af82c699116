"""The sampling tasks: their data, their references and their baselines."""

from __future__ import annotations

import pytest
import torch

from trimtab.data import load
from trimtab.diffusion import CountNFE, ddim, deis, deis_rk, grids
from trimtab.studies.diffusion.deis.ode import METRICS, solve
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.guided_sampling import (
    Contest,
    GuidedSampler,
    GuidedSampling,
    LimitedInterval,
    few_evaluations,
)
from trimtab.studies.tools.mixtures import mixture
from trimtab.studies.tools.samplers import GRIDS


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


def test_an_exact_sampler_has_no_error_and_runs_repeat() -> None:
    def perfect(denoiser, x, times):
        return deis_rk(denoiser, x, grids.log_snr(denoiser.schedule, 20), method="rk4")

    assert solve(Trial(seed=1), perfect).metrics["rmse_10"] == 0.0
    results = [solve(Trial(seed=1), ddim) for _ in range(2)]
    assert results[0] == results[1]
    assert set(METRICS) == set(results[0].metrics)
    assert results[0].metrics["rmse_5"] > results[0].metrics["rmse_20"] > 0


def test_every_contestant_gets_its_best_grid() -> None:
    tried: list[tuple[float, ...]] = []

    def watch(denoiser, x, times):
        tried.append(tuple(times.tolist()))
        return x

    solve(Trial(), watch)
    assert len({times for times in tried if len(times) == 11}) == len(GRIDS)


def contest(entrant: GuidedSampler, evaluations: int = 20) -> Contest:
    return Contest.of(Trial(seed=1), entrant, evaluations)


def test_guidance_raises_accuracy_and_contrast() -> None:
    held = contest(GuidedSampler())
    draws = held.draws(Trial(seed=1), 200, stream=0)
    unguided, guided = held.sample(draws, 1.0), held.sample(draws, 8.0)
    assert held.accuracy(guided, draws.labels) > held.accuracy(unguided, draws.labels) + 0.2
    assert torch.cov(guided.T).trace() > torch.cov(unguided.T).trace()


def test_everybody_gets_as_many_steps_as_the_evaluations_allow() -> None:
    """Guided steps cost two evaluations, those outside of the interval one, third-order ones six."""
    assert contest(GuidedSampler()).steps == contest(GuidedSampler(sampler=deis)).steps == 10
    assert contest(GuidedSampler(sampler=deis_rk)).steps == 3
    limited = contest(GuidedSampler(guidance=LimitedInterval))
    assert limited.steps > 10
    assert limited.count(limited.steps) <= 20 < limited.count(limited.steps + 1)


def test_the_scale_is_the_smallest_that_reaches_the_accuracy() -> None:
    held = contest(GuidedSampler())
    draws = held.draws(Trial(seed=1), 200, stream=0)
    aim = 0.8
    scale = held.scale_of(aim, draws)
    assert held.accuracy(held.sample(draws, scale), draws.labels) >= aim
    assert held.accuracy(held.sample(draws, scale / 1.06), draws.labels) < aim
    impossible = held.scale_of(1.1, draws)
    assert 1.5 <= impossible <= 26


def test_guidance_in_a_limited_interval_is_plain_guidance_there() -> None:
    model = contest(GuidedSampler()).model
    schedule, x, labels = model.schedule, torch.randn(4, 2, dtype=torch.float64), torch.arange(4)
    counted = CountNFE(model)
    limited = LimitedInterval(counted, labels, 3.0)
    for rho, evaluations in ((0.1, 1), (1.0, 2), (10.0, 1)):
        t = schedule.t_of_rho(torch.tensor([rho], dtype=torch.float64)).expand(4)
        cond, uncond = model(x, t, labels), model(x, t)
        before = counted.count
        expected = uncond + 3.0 * (cond - uncond) if evaluations == 2 else cond
        torch.testing.assert_close(limited(x, t), expected)
        assert counted.count - before == evaluations


def test_a_run_measures_everything_and_repeats() -> None:
    results = [few_evaluations.run(Trial(seed=1), GuidedSampler()) for _ in range(2)]
    assert results[0] == results[1]
    assert set(results[0].metrics) == set(GuidedSampling.metrics)
    assert results[0].metrics["evaluations"] == 20
    searched = few_evaluations.run(Trial(seed=1, searching=True), GuidedSampler())
    assert searched.score == -results[0].metrics["frechet"]


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target must be 'ring8' or 'digits', got 'spiral'"):
        mixture("spiral")  # type: ignore[arg-type]
