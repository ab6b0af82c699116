"""Guidance with fewer evaluations: how close it stays to full guidance, and how good its samples are at equal accuracy.

Everyone takes a rule that makes as few evaluations as its share allows, and is shown at the scale at which 99 % of its
samples are of the class asked for. Full guidance takes 25 steps, two evaluations each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from trimtab.diffusion import (
    AdaptiveGuidance,
    ClassifierFreeGuidance,
    LinearAG,
    PolicyGuidance,
    ddim,
    fit_linear_guidance,
    record_guidance,
    search_policy,
)
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tasks.guided_sampling import Contest, Draws, GuidedModel, GuidedSampler, picture
from trimtab.studies.tools.sample_quality import frechet_distance, knn_recall

METRICS = {
    "frechet": Metric("Frechet distance at equal class accuracy", best="min"),
    "deviation": Metric("RMSE to full guidance from the same noise", best="min"),
    "accuracy": Metric("samples of the class asked for (%)", percent=True),
    "recall": Metric("recall (%)", percent=True),
    "evaluations": Metric("evaluations", best="min"),
    "scale": Metric("guidance scale", best=None),
}
STEPS, ACCURACY = 25, 0.99
SCALE = 4.5
"""About that of full guidance at this accuracy: where deviations are taken, and policies searched."""
BUDGETS = (30.0, 34.0, 37.5, 42.0, 46.0)


@dataclass(frozen=True)
class Plan:
    """What a rule may use: a contest, noise to prepare on, and the evaluations for a sample.

    Attributes:
        trial: the run.
        contest: the model, its data and the time grid.
        pilot: noise and classes to prepare on.
        evaluations: that a sample may cost, on average.
    """

    trial: Trial
    contest: Contest
    pilot: Draws
    evaluations: float


Guide = Callable[[GuidedModel, Tensor, float], DenoiserLike]
Rule = Callable[[Plan], tuple[int, Guide]]
"""Makes of a plan a number of steps and a guidance for them."""


def full(plan: Plan) -> tuple[int, Guide]:
    """Classifier-free guidance at all steps."""
    return STEPS, _classifier_free


def fewer_steps(plan: Plan) -> tuple[int, Guide]:
    """Classifier-free guidance in as many steps as the evaluations pay for."""
    return int(plan.evaluations) // 2, _classifier_free


def first_steps(plan: Plan) -> tuple[int, Guide]:
    """Guidance in as many steps from the first as the evaluations pay for, for all samples alike."""
    guided = min(int(plan.evaluations) - STEPS, STEPS)

    def guide(model: GuidedModel, labels: Tensor, scale: float) -> DenoiserLike:
        return PolicyGuidance(model, labels, scales=[scale] * guided + [1.0] * (STEPS - guided))

    return STEPS, guide


def adaptive(plan: Plan) -> tuple[int, Guide]:
    """AG, with the highest threshold that the evaluations pay for on the pilot, found anew at each scale."""
    thresholds: dict[float, float] = {}

    def guide(model: GuidedModel, labels: Tensor, scale: float) -> DenoiserLike:
        if scale not in thresholds:
            thresholds[scale] = _highest_threshold(plan, scale)
        return AdaptiveGuidance(model, labels, scale=scale, threshold=thresholds[scale])

    return STEPS, guide


def linear(plan: Plan) -> tuple[int, Guide]:
    """LinearAG with its authors' policy and coefficients of the pilot's runs; it costs what it costs."""
    tables: dict[float, Tensor] = {}

    def guide(model: GuidedModel, labels: Tensor, scale: float) -> DenoiserLike:
        if scale not in tables:
            contest, pilot = plan.contest, plan.pilot
            sample = partial(ddim, x=pilot.noise, times=contest.times(STEPS))
            tables[scale] = fit_linear_guidance(*record_guidance(contest.model, pilot.labels, sample, scale=scale))
        return LinearAG(model, labels, coefficients=tables[scale], scale=scale)

    return STEPS, guide


def searched(plan: Plan) -> tuple[int, Guide]:
    """The policy that a search finds once, as multiples of the scale."""
    trial, contest = Trial(budget=plan.trial.budget), plan.contest
    size, iterations = trial.pick(smoke=4, laptop=24, paper=200), trial.pick(smoke=2, laptop=60, paper=1000)
    draws = contest.draws(trial, size, stream=9)

    def search() -> list[float]:
        found = search_policy(
            contest.model,
            draws.labels,
            draws.noise,
            contest.times(STEPS),
            evaluations=int(plan.evaluations),
            scale=SCALE,
            iterations=iterations,
            generator=trial.generator(12),
        )
        return [scale / SCALE if scale not in (0.0, 1.0) else -scale for scale in found]

    # What a step does without guidance, 0 or 1, is kept below 0: it is no multiple of the scale.
    policy = plan.trial.cached(search, key=f"policy {plan.evaluations} {size} {iterations}")

    def guide(model: GuidedModel, labels: Tensor, scale: float) -> DenoiserLike:
        return PolicyGuidance(model, labels, scales=[scale * part if part > 0 else -part for part in policy])

    return STEPS, guide


def save(trial: Trial, rule: Rule, evaluations: float, budgets: tuple[float, ...] = ()) -> Result:
    """A rule at its share of the evaluations; its deviation also at others."""
    contest = Contest.of(trial, GuidedSampler(), 2 * STEPS)
    pilot = contest.draws(trial, trial.pick(smoke=16, laptop=100, paper=200), stream=20)
    tuning = contest.draws(trial, trial.pick(smoke=32, laptop=400, paper=5000), stream=3)
    shown = contest.draws(trial, trial.pick(smoke=64, laptop=1000, paper=5000), stream=0)
    few = Draws(shown.noise[:300], shown.labels[:300])
    plan = Plan(trial, contest, pilot, evaluations)

    ruled = _Ruled.by(rule, plan)
    scale = ruled.scale_of(ACCURACY, tuning)
    trial.report(0.5)
    x, spent = ruled.sample(shown, scale)
    aim, _ = _Ruled.by(full, plan).sample(few, SCALE)

    def deviation(allowed: float) -> tuple[float, float]:
        samples, cost = _Ruled.by(rule, Plan(trial, contest, pilot, allowed)).sample(few, SCALE)
        return cost, float((samples - aim).square().mean().sqrt())

    curve = [deviation(budget) for budget in budgets]
    data = contest.data
    return Result(
        {
            "frechet": frechet_distance(x, data.mean, data.cov),
            "deviation": deviation(evaluations)[1],
            "accuracy": contest.accuracy(x, shown.labels),
            "recall": knn_recall(x, data.sample(len(x), generator=trial.generator(1))),
            "evaluations": spent,
            "scale": scale,
        },
        _curves(curve),
        pictures={"samples": picture(x, shown.labels)},
    )


@dataclass(frozen=True)
class _Ruled(Contest):
    """A contest whose guidance and number of steps are a rule's."""

    taken: int
    guide: Guide

    @classmethod
    def by(cls, rule: Rule, plan: Plan) -> _Ruled:
        own = plan.contest
        parts = (own.data, own.model, own.entrant, own.guidance, own.grid, own.evaluations, own.pilot)
        return cls(*parts, *rule(plan))

    def sample(self, draws: Draws, scale: float) -> tuple[Tensor, float]:
        model = GuidedModel(self.model)
        x = ddim(self.guide(model, draws.labels, scale), draws.noise, self.times(self.taken))
        return x, model.per_sample


def _classifier_free(model: GuidedModel, labels: Tensor, scale: float) -> DenoiserLike:
    return ClassifierFreeGuidance(model, labels, scale=scale)


class _Watched(AdaptiveGuidance):
    """Full guidance that keeps every cosine."""

    def __init__(self, denoiser: DenoiserLike, cond: Tensor, *, scale: float) -> None:
        super().__init__(denoiser, cond, scale=scale, threshold=2.0)
        self.cosines: list[Tensor] = []

    def agree(self, x: Tensor, t: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        self.cosines.append(super().agree(x, t, cond, uncond))
        return self.cosines[-1]


def _highest_threshold(plan: Plan, scale: float) -> float:
    """From one run with full guidance, which an adaptive one is up to where it ends it."""
    watched = _Watched(plan.contest.model, plan.pilot.labels, scale=scale)
    ddim(watched, plan.pilot.noise, plan.contest.times(STEPS))
    highest = torch.stack(watched.cosines).cummax(dim=0).values

    def cost(threshold: float) -> float:
        # A sample is guided up to the step at which it first agrees, that one included.
        guided = (highest < threshold).sum(dim=0).add(1).clamp(max=STEPS)
        return STEPS + float(guided.double().mean())

    allowed = [value for value in highest.flatten().unique().tolist() if cost(value) <= plan.evaluations]
    return max(allowed, default=-2.0)


def _curves(points: list[tuple[float, float]]) -> Mapping[str, Curve]:
    if not points:
        return {}
    costs, deviations = zip(*points, strict=True)
    return {"deviation": Curve(costs, deviations, x_label="evaluations")}
