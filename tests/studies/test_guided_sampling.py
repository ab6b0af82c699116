"""Guided sampling: its model, its classifiers, what it counts and how it finds a scale."""

from __future__ import annotations

import pytest
import torch

from trimtab.diffusion import CountNFE, VPLinear, deis, deis_rk
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.guided_sampling import (
    LARGEST,
    Autoguidance,
    Contest,
    GuidedModel,
    GuidedSampler,
    GuidedSampling,
    LimitedInterval,
    classifier_free,
    few_evaluations,
    noise_aware,
)
from trimtab.studies.tools.guiding_classifiers import clean_classifier, noisy_classifier
from trimtab.studies.tools.mixtures import mixture


def contest(entrant: GuidedSampler, evaluations: int = 20) -> Contest:
    return Contest.of(Trial(seed=1), entrant, evaluations)


def test_guidance_raises_accuracy_and_contrast() -> None:
    held = contest(GuidedSampler())
    draws = held.draws(Trial(seed=1), 200, stream=0)
    unguided, guided = held.sample(draws, 1.0)[0], held.sample(draws, 8.0)[0]
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
    assert held.accuracy(held.sample(draws, scale)[0], draws.labels) >= aim
    assert held.accuracy(held.sample(draws, scale / 1.06)[0], draws.labels) < aim
    impossible = held.scale_of(1.1, draws)
    assert 1.5 <= impossible <= 26


def test_a_scale_below_the_smallest_is_found() -> None:
    """The rule is the usual one with a scale in another unit."""
    usual = contest(GuidedSampler())
    other = contest(GuidedSampler(guidance=lambda model, labels, scale: classifier_free(model, labels, 40 * scale)))
    draws = usual.draws(Trial(seed=1), 200, stream=0)
    found, expected = other.scale_of(0.8, draws), usual.scale_of(0.8, draws) / 40
    assert found < other.scales[0]
    assert found == pytest.approx(expected, rel=0.06)


def test_scales_end_at_the_largest_that_the_entrant_has() -> None:
    assert contest(GuidedSampler()).scales == [1.5**k for k in range(1, 9)]
    assert max(contest(GuidedSampler(largest=1.0)).scales) == 1.0
    assert LARGEST == 1.5**8


class GuidedWhereFirstPositive(LimitedInterval):
    """Its cost depends on the sample: the second evaluation is made for those with a positive first coordinate."""

    def __call__(self, x, t, /, *args, **kwargs):
        cond = self.conditional(x, t)
        rows = (x[:, 0] > 0).nonzero()[:, 0]
        if len(rows):
            cond[rows] += (self.scale - 1) * (cond[rows] - self.unconditional(x, t, rows))
        return cond


def test_an_adaptive_cost_is_counted_sample_by_sample() -> None:
    held = contest(GuidedSampler(guidance=GuidedWhereFirstPositive, adaptive=True))
    steps = held.steps_at(2.0)
    assert 10 < steps < 20  # about half of the samples cost one evaluation a step, the others two
    assert held.count(steps, 2.0) <= 20 < held.count(steps + 1, 2.0)
    draws = held.draws(Trial(seed=1), 200, stream=0)
    assert held.sample(draws, 2.0)[1] == pytest.approx(20, abs=2)


def test_the_weaker_model_confuses_more_and_counts() -> None:
    model = GuidedModel(contest(GuidedSampler()).model)
    x, t, labels = torch.randn(4, 2, dtype=torch.float64), torch.full((4,), 0.4, dtype=torch.float64), torch.arange(4)
    cond, uncond, weak = model(x, t, labels), model(x, t), model.weaker(x, t, labels)
    assert model.count == 3
    assert model.per_sample == 3
    assert bool(((weak - uncond).norm(dim=1) < (cond - uncond).norm(dim=1)).all())
    torch.testing.assert_close(Autoguidance(model, labels, 3.0)(x, t), weak + 3.0 * (cond - weak))


def test_guiding_classifiers_are_not_the_judge_but_know_the_classes() -> None:
    trial, data = Trial(seed=1), mixture("ring8")
    x = data.sample(400, generator=trial.generator())
    y = data.class_log_posterior(x).argmax(1)
    clean, noisy = clean_classifier(trial, data), noisy_classifier(trial, data, VPLinear())
    assert (clean(x).argmax(1) == y).double().mean() > 0.8
    t = torch.full((400,), 0.05, dtype=torch.float64)
    assert (noisy(VPLinear().alpha(t)[:, None] * x, t).argmax(1) == y).double().mean() > 0.8
    assert torch.equal(clean_classifier(Trial(seed=2), data)(x), clean(x))
    guided = contest(GuidedSampler(prepare=noise_aware))
    draws = guided.draws(trial, 200, stream=0)
    accuracy = [guided.accuracy(guided.sample(draws, scale)[0], draws.labels) for scale in (0.0, 2.0)]
    assert accuracy[1] > accuracy[0] + 0.1


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
