"""The sampling tasks: their data, their references and their baselines."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trimtab.data import load
from trimtab.diffusion import ddim, deis_rk, grids
from trimtab.studies.engine.study import Trial, settings_of
from trimtab.studies.tasks.mixture_sampling import (
    MixtureSampler,
    MixtureSampling,
    exact_5,
    exact_10,
    imperfect_5,
    imperfect_10,
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


def perfect(denoiser, x, times):
    return deis_rk(denoiser, x, grids.log_snr(denoiser.schedule, 20), method="rk4")


def test_an_exact_sampler_has_no_error_and_runs_repeat() -> None:
    result = exact_10.run(Trial(seed=1), MixtureSampler(sampler=perfect))
    assert result.metrics["rmse"] == result.metrics["median"] == 0.0
    results = [exact_10.run(Trial(seed=1), MixtureSampler()) for _ in range(2)]
    assert results[0] == results[1]
    assert set(results[0].metrics) == set(MixtureSampling.metrics)
    curve = results[0].curves["rmse"]
    assert list(curve.x) == [5, 7, 10, 15, 20]
    assert curve.y[0] > curve.y[-1] > 0
    assert curve.y[2] == results[0].metrics["rmse"]


def test_solving_an_imperfect_model_better_does_not_mend_it() -> None:
    """Its samples stay away from the exact ones, and a wrapper that undoes the fault brings them back."""
    entrant = MixtureSampler(sampler=perfect)
    faulty = imperfect_10.run(Trial(seed=1), entrant).metrics
    assert faulty["rmse"] > 0.01

    def mend(denoiser):
        return replace(denoiser, shrink=0.0)

    assert imperfect_10.run(Trial(seed=1), MixtureSampler(sampler=perfect, wrap=mend)).metrics["rmse"] == 0.0


def test_steps_cost_what_they_cost() -> None:
    """Two evaluations a step: half of the steps."""
    taken: list[int] = []

    def heun(denoiser, x, times):
        taken.append(len(times) - 1)
        return deis_rk(denoiser, x, times, method="heun")

    result = exact_10.run(Trial(), MixtureSampler(sampler=heun))
    assert taken[0] == 4  # to find out what a step costs
    assert taken[1:] == [5, 2, 3, 7, 10]
    assert list(result.curves["rmse"].x) == [4, 6, 10, 14, 20]


def test_the_search_is_over_grids_on_its_own_noise() -> None:
    entrant = MixtureSampler()
    settings = settings_of(exact_10.grid(entrant))
    assert [setting["grid"] for setting in settings] == list(GRIDS)
    scores = [exact_10.run(Trial(setting=setting, searching=True), entrant).score for setting in settings]
    assert len(set(scores)) == len(GRIDS)
    shown = exact_10.run(Trial(setting=settings[1]), entrant).metrics
    assert scores[1] == -shown["rmse"]
    judged = imperfect_5.run(Trial(setting=settings[1], searching=True), entrant)
    assert judged.score == -imperfect_5.run(Trial(setting=settings[1]), entrant).metrics["frechet"]


def test_times_of_ones_own_are_chosen_on_other_noise() -> None:
    seen = []

    def choose(draws, steps, generator):
        seen.append(draws.noise)
        assert len(draws.sample(grids.power(draws.model.schedule, steps))) == len(draws.noise)
        return grids.karras(draws.model.schedule, steps)

    own = exact_5.run(Trial(), MixtureSampler(times=choose))
    assert own.metrics == exact_5.run(Trial(setting={"grid": "karras"}), MixtureSampler()).metrics
    assert len(seen) == len(own.curves["rmse"].x) == 1


def test_a_random_sampler_draws_by_the_seed() -> None:
    def noisy(denoiser, x, times, generator):
        return ddim(denoiser, x, times) + torch.randn(x.shape, generator=generator, dtype=x.dtype)

    results = [exact_5.run(Trial(seed=seed), MixtureSampler(sampler=noisy, random=True)) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="target must be 'ring8' or 'digits', got 'spiral'"):
        mixture("spiral")  # type: ignore[arg-type]
