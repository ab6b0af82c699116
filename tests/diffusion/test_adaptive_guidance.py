"""Adaptive guidance: when it stops and what that costs, policies, and the regression."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from trimtab.diffusion import (
    EDM,
    AdaptiveGuidance,
    AnalyticGMM,
    ClassifierFreeGuidance,
    CountNFE,
    Denoiser,
    LinearAG,
    PolicyGuidance,
    VPLinear,
    agreement,
    convert,
    ddim,
    degrade,
    deis_rk,
    fit_linear_guidance,
    grids,
    policy_evaluations,
    record_guidance,
    search_policy,
)
from trimtab.diffusion.adaptive_guidance.policy import _within

SCHEDULE = VPLinear()
RING = AnalyticGMM.ring(dtype=torch.float64)
MODEL = degrade(RING.denoiser(SCHEDULE, "eps"), class_blur=0.5)
LABELS = torch.arange(8).repeat(4)
NOISE = SCHEDULE.prior(32, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
STEPS = 12
TIMES = grids.power(SCHEDULE, STEPS)
FULL = ddim(ClassifierFreeGuidance(MODEL, LABELS, scale=4.0), NOISE, TIMES)


def run(rule, **setting) -> tuple[Tensor, float]:
    counted = CountNFE(MODEL)
    x = ddim(rule(counted, LABELS, **setting), NOISE, TIMES)
    return x, counted.per_sample


adaptive = partial(run, AdaptiveGuidance, scale=4.0)


def test_agreement() -> None:
    a, b = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(agreement(a, 3 * a), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(agreement(a, -a), -torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(agreement(2 * a, b), agreement(a, b))
    large = torch.full((1, 100), 300.0, dtype=torch.float16)  # its squared norm overflows in half precision
    assert agreement(large, large).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="second must be of shape"):
        agreement(a, b[:2])


def test_never_and_at_once() -> None:
    """Above 1 it is classifier-free guidance; below -1 the first step alone is guided, as both are evaluated there."""
    x, evaluations = adaptive(threshold=1.01)
    assert torch.equal(x, FULL)
    assert evaluations == 2 * STEPS
    x, evaluations = adaptive(threshold=-1.01)
    first, _ = run(PolicyGuidance, scales=[4.0] + [1.0] * (STEPS - 1))
    torch.testing.assert_close(x, first)
    assert evaluations == STEPS + 1


def test_each_sample_stops_for_itself_and_for_good() -> None:
    """A sample's run is guided to the step at which its cosine first passes, and conditional after it."""
    cosines: list[Tensor] = []

    class Watched(AdaptiveGuidance):
        def agree(self, x, t, cond, uncond):
            cosines.append(super().agree(x, t, cond, uncond))
            return cosines[-1]

    run(Watched, scale=4.0, threshold=2.0)
    table = torch.stack(cosines)
    threshold = table.max(dim=0).values.median().item() - 1e-9
    passed = table >= threshold
    guided = torch.where(passed.any(0), passed.double().argmax(0) + 1, STEPS)
    assert guided.unique().numel() > 1  # they do stop at different steps
    x, evaluations = adaptive(threshold=threshold)
    assert evaluations == pytest.approx(STEPS + guided.double().mean().item())
    for count in guided.unique().tolist():
        rows = guided == count
        policy = PolicyGuidance(MODEL, LABELS[rows], scales=[4.0] * count + [1.0] * (STEPS - count))
        torch.testing.assert_close(x[rows], ddim(policy, NOISE[rows], TIMES))


def test_lower_thresholds_cost_less_and_go_further_from_full_guidance() -> None:
    runs = [adaptive(threshold=threshold) for threshold in (0.5, 0.9, 0.99, 0.9999)]
    costs = [evaluations for _, evaluations in runs]
    errors = [(x - FULL).square().mean().item() for x, _ in runs]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    assert errors == sorted(errors, reverse=True)


def test_where_the_condition_changes_nothing_the_first_step_says_so() -> None:
    plain = RING.denoiser(SCHEDULE, "eps")
    counted = CountNFE(Denoiser(lambda x, t, cond: plain(x, t), SCHEDULE))
    x = ddim(AdaptiveGuidance(counted, LABELS, scale=4.0), NOISE, TIMES)
    assert counted.per_sample == STEPS + 1
    torch.testing.assert_close(x, ddim(plain, NOISE, TIMES))


def test_noises_agree_before_anything_is_denoised() -> None:
    """Why the cosine is not of the noises: they are nearly the sample itself at first, and guidance ends at once."""
    x, evaluations = adaptive(space="eps", threshold=0.99)
    assert evaluations < STEPS + 2
    assert (x - FULL).square().mean() > (adaptive(threshold=0.99)[0] - FULL).square().mean()


def test_the_cosine_does_not_depend_on_the_schedules_units() -> None:
    """The same noise level on a variance-preserving schedule and on EDM's."""
    t = torch.full((32,), 0.4, dtype=torch.float64)
    rho = SCHEDULE.rho(t)
    edm = degrade(RING.denoiser(EDM()), class_blur=0.5)
    found = []
    for model, time, x in ((MODEL, t, NOISE), (edm, rho, NOISE / SCHEDULE.alpha(t)[:, None])):
        rule = AdaptiveGuidance(model, LABELS)
        found.append(rule.agree(x, time, model(x, time, LABELS), model(x, time)))
    torch.testing.assert_close(*found)


def test_conditions_of_any_form_are_cut_to_the_rows_that_need_them() -> None:
    seen: list[object] = []

    def model(x: Tensor, t: Tensor, cond: dict[str, object]) -> Tensor:
        seen.append(cond)
        push = torch.zeros(len(x), dtype=x.dtype) if cond["label"] is None else cond["label"].to(x.dtype)
        return x * 0.5 + push[:, None] * torch.tensor([0.0, 1.0], dtype=x.dtype)

    labels = torch.tensor([0, 0, 3])  # the condition moves the last sample alone
    cond, uncond = {"label": labels, "style": "ink"}, {"label": torch.zeros(3), "style": "ink"}
    rule = AdaptiveGuidance(Denoiser(model, SCHEDULE), cond, uncond, scale=2.0, threshold=0.9999)
    x, t = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.full((3,), 0.5)
    rule(x, t)
    rule(x, t)
    assert seen[-1]["style"] == "ink"
    assert len(seen[-1]["label"]) == 1


def test_policies() -> None:
    x, evaluations = run(PolicyGuidance, scales=[4.0] * STEPS)
    assert torch.equal(x, FULL)
    assert evaluations == policy_evaluations([4.0] * STEPS) == 2 * STEPS
    mixed = [4.0, 0.0, 1.0, 2.0] * 3
    x, evaluations = run(PolicyGuidance, scales=mixed)
    assert evaluations == policy_evaluations(mixed) == 18
    at = NOISE
    for i, scale in enumerate(mixed):
        at = ddim(ClassifierFreeGuidance(MODEL, LABELS, scale=scale), at, TIMES[i : i + 2])
    torch.testing.assert_close(x, at)


def test_a_policy_is_for_one_length_of_run() -> None:
    rule = PolicyGuidance(MODEL, LABELS, scales=[4.0] * 3)
    with pytest.raises(ValueError, match="times must ask for at most the 3 evaluations"):
        ddim(rule, NOISE, TIMES)
    assert ddim(rule, NOISE, TIMES[:4]).shape == NOISE.shape  # a new run begins anew


def test_the_search_keeps_guidance_where_it_matters() -> None:
    """The condition matters in this model's first steps alone: there the policy is guided, and it stays in budget."""
    plain = RING.denoiser(SCHEDULE, "eps")
    late = TIMES[4].item()

    def model(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return torch.where(t[:, None] > late, plain(x, t, cond), plain(x, t))

    find = partial(
        search_policy, Denoiser(model, SCHEDULE), LABELS, NOISE, TIMES, evaluations=STEPS + 4, scale=3.0, iterations=60
    )
    scales = find(options=(1.0, 3.0), generator=torch.Generator().manual_seed(0))
    assert scales[1:4] == (3.0,) * 3  # in pure noise, at the first, no class is seen
    assert scales[4:] == (1.0,) * (STEPS - 4)
    assert policy_evaluations(scales) <= STEPS + 4
    assert find(options=(1.0, 3.0), generator=torch.Generator().manual_seed(0)) == scales


def test_entropy_alone_leaves_what_was_likeliest_at_the_start() -> None:
    """At a large weight of entropy a step's shares fall towards their largest, whatever the samples would want."""
    options = (0.0, 1.0, 4.0)
    found = search_policy(MODEL, LABELS, NOISE, TIMES, evaluations=2 * STEPS, scale=4.0, options=options,
                          iterations=30, entropy_weight=1e6, generator=torch.Generator().manual_seed(5))  # fmt: skip
    draws = torch.randn(STEPS, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert found == tuple(options[k] for k in draws.argmax(1).tolist())


def test_what_is_cut_is_where_one_evaluation_is_nearly_as_likely() -> None:
    logits = torch.tensor([[4.9, 5.0], [0.0, 1.0], [0.0, 0.5]])  # guided by 0.1, 1.0 and 0.5 over conditional
    cut = [_within(logits, (1.0, 3.0), evaluations) for evaluations in (6, 5, 4, 3)]
    assert cut == [(3.0, 3.0, 3.0), (1.0, 3.0, 3.0), (1.0, 3.0, 1.0), (1.0, 1.0, 1.0)]


def test_the_search_leaves_a_network_without_gradients() -> None:
    layer = torch.nn.Linear(2, 2)
    network = Denoiser(lambda x, t, cond: layer(x) + (0 if cond is None else 0.1), SCHEDULE)
    search_policy(network, "c", NOISE.float(), TIMES[:4], evaluations=4, iterations=2)
    assert layer.weight.grad is None


def test_a_linear_relation_is_found_and_used_without_error() -> None:
    generator = torch.Generator().manual_seed(0)
    cond = torch.randn(5, 40, 3, dtype=torch.float64, generator=generator)
    uncond = torch.zeros_like(cond)
    uncond[0] = 0.8 * cond[0]
    for i in range(1, 5):
        uncond[i] = (
            0.5 * cond[i] - 0.3 * cond[i - 1] + 0.2 * torch.randn(40, 3, dtype=torch.float64, generator=generator)
        )
    uncond[4] = 0.7 * cond[4] - 0.2 * cond[1] + 0.4 * uncond[3]
    table = fit_linear_guidance(cond, uncond)
    expected = torch.zeros(10, dtype=torch.float64)
    expected[[4, 1, 8]] = torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64)
    torch.testing.assert_close(table[4], expected, atol=1e-8, rtol=0)
    # Nothing looks ahead.
    assert bool((table[:, :5].triu(1) == 0).all())
    assert bool((table[:, 5:].triu(0) == 0).all())


def test_it_is_least_squares() -> None:
    """Residuals are orthogonal to every noise that was known."""
    cond, uncond = torch.randn(2, 4, 30, 3, dtype=torch.float64)
    table = fit_linear_guidance(cond, uncond)
    past = torch.cat([cond, uncond]).flatten(1)
    residual = uncond.flatten(1) - table @ past
    for call in range(4):
        known = [*range(call + 1), *range(4, 4 + call)]
        torch.testing.assert_close(past[known] @ residual[call], torch.zeros(len(known)).double(), atol=1e-9, rtol=0)


def recorded(scale: float = 4.0) -> tuple[Tensor, Tensor]:
    return record_guidance(MODEL, LABELS, lambda guided: ddim(guided, NOISE, TIMES), scale=scale)


def test_recording_changes_nothing_and_holds_every_prediction() -> None:
    kept: list[Tensor] = []
    cond, uncond = record_guidance(MODEL, LABELS, lambda g: kept.append(ddim(g, NOISE, TIMES)) or kept[0], scale=4.0)
    assert torch.equal(kept[0], FULL)
    assert cond.shape == uncond.shape == (STEPS, 32, 2)
    t = TIMES[0].expand(32)
    assert torch.equal(cond[0], MODEL(NOISE, t, LABELS))
    assert torch.equal(uncond[0], MODEL(NOISE, t))
    with pytest.raises(ValueError, match="sample must evaluate the denoiser"):
        record_guidance(MODEL, LABELS, lambda guided: NOISE)


def test_linear_guidance_step_by_step() -> None:
    table = fit_linear_guidance(*recorded())
    x, evaluations = run(LinearAG, coefficients=table, scale=4.0)
    assert evaluations == 2 * 3 + 3 + 6  # six of twelve by turns, six with the condition alone
    at, cond, uncond = NOISE, [], []
    for i in range(STEPS):
        t = TIMES[i].expand(32)
        cond.append(MODEL(at, t, LABELS))
        if i >= STEPS // 2:
            noise = cond[-1]
        else:
            past = [*cond, *uncond]
            weights = [*table[i, : i + 1].tolist(), *table[i, STEPS : STEPS + i].tolist()]
            estimate = sum(weight * value for weight, value in zip(weights, past, strict=True))
            uncond.append(estimate if i % 2 else MODEL(at, t))
            noise = uncond[-1] + 4.0 * (cond[-1] - uncond[-1])
        at = ddim(Denoiser(lambda x, t, n=noise: n, SCHEDULE), at, TIMES[i : i + 2])
    torch.testing.assert_close(x, at)


def test_guided_throughout_it_is_classifier_free_guidance_and_never_conditional() -> None:
    table = fit_linear_guidance(*recorded())
    x, evaluations = run(LinearAG, coefficients=table, scale=4.0, policy=["guided"] * STEPS)
    assert torch.equal(x, FULL)
    assert evaluations == 2 * STEPS
    plain, evaluations = run(LinearAG, coefficients=table, scale=4.0, policy=["conditional"] * STEPS)
    assert evaluations == STEPS
    torch.testing.assert_close(plain, ddim(Denoiser(lambda x, t: MODEL(x, t, LABELS), SCHEDULE), NOISE, TIMES))


def test_one_estimate_among_true_predictions_hardly_moves_the_samples_it_was_fitted_on() -> None:
    table = fit_linear_guidance(*recorded())
    policy = ["guided"] * STEPS
    policy[STEPS - 4] = "estimated"
    x, evaluations = run(LinearAG, coefficients=table, scale=4.0, policy=policy)
    assert evaluations == 2 * STEPS - 1
    policy[STEPS - 4] = "conditional"
    without, _ = run(LinearAG, coefficients=table, scale=4.0, policy=policy)
    assert (x - FULL).square().mean() < 0.5 * (without - FULL).square().mean()


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_any_kind_of_prediction(kind) -> None:
    model = degrade(RING.denoiser(SCHEDULE, kind), class_blur=0.5)
    table = fit_linear_guidance(*recorded())
    for rule in (
        partial(AdaptiveGuidance, scale=4.0, threshold=0.9),
        partial(LinearAG, coefficients=table, scale=4.0),
        partial(PolicyGuidance, scales=[4.0, 1.0] * 6),
    ):
        first, second = (ddim(rule(m, LABELS), NOISE, TIMES) for m in (MODEL, model))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    value = record_guidance(model, LABELS, lambda guided: ddim(guided, NOISE, TIMES), scale=4.0)
    torch.testing.assert_close(value[1], recorded()[1])


def test_several_evaluations_a_step_count_one_by_one() -> None:
    sample = partial(deis_rk, x=NOISE, times=grids.karras(SCHEDULE, 4), method="heun")
    table = fit_linear_guidance(*record_guidance(MODEL, LABELS, sample, scale=4.0))
    assert table.shape == (8, 16)
    counted = CountNFE(MODEL)
    sample(LinearAG(counted, LABELS, coefficients=table, scale=4.0))
    assert counted.count == 4 + 2 + 4


def test_bad_input() -> None:
    table = torch.zeros(3, 6)
    cases = {
        "threshold must be finite": lambda: AdaptiveGuidance(MODEL, LABELS, threshold=float("nan")),
        "space must be one of": lambda: AdaptiveGuidance(MODEL, LABELS, space="x0"),
        "scales must be at least one": lambda: PolicyGuidance(MODEL, LABELS, scales=[]),
        "scales must be finite": lambda: PolicyGuidance(MODEL, LABELS, scales=[float("inf")]),
        "coefficients must have shape": lambda: LinearAG(MODEL, LABELS, coefficients=torch.zeros(3, 3)),
        "policy must have 3 choices": lambda: LinearAG(MODEL, LABELS, coefficients=table, policy=["guided"]),
        "policy must be one of": lambda: LinearAG(MODEL, LABELS, coefficients=table, policy=["cfg"] * 3),
        "uncond must be of shape": lambda: fit_linear_guidance(torch.zeros(2, 3, 1), torch.zeros(2, 4, 1)),
        "cond must have shape": lambda: fit_linear_guidance(torch.zeros(2, 0), torch.zeros(2, 0)),
        "evaluations must be at least 12": lambda: search_policy(MODEL, LABELS, NOISE, TIMES, evaluations=5),
        "options must hold 1": lambda: search_policy(MODEL, LABELS, NOISE, TIMES, evaluations=20, options=[2.0]),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_batch_that_changes_within_a_run_is_refused_and_changes_nothing() -> None:
    table = fit_linear_guidance(*recorded())
    t = torch.full((32,), 0.5, dtype=torch.float64)
    for rule in (AdaptiveGuidance(MODEL, LABELS), LinearAG(MODEL, LABELS, coefficients=table)):
        rule(NOISE, t)
        with pytest.raises(ValueError, match=r"call reset\(\) before a new run"):
            AdaptiveGuidance.__call__(rule, NOISE[:8], t[:8]) if isinstance(rule, AdaptiveGuidance) else _other(rule, t)
        rule(NOISE, t)


def _other(rule: LinearAG, t: Tensor) -> None:
    rule.cond, labels = LABELS[:8], rule.cond
    try:
        rule(NOISE[:8], t[:8])
    finally:
        rule.cond = labels


def test_eps_of_the_two_spaces_differ_by_the_sample() -> None:
    t = torch.full((32,), 0.4, dtype=torch.float64)
    cond, uncond = MODEL(NOISE, t, LABELS), MODEL(NOISE, t)
    residual = AdaptiveGuidance(MODEL, LABELS).agree(NOISE, t, cond, uncond)
    torch.testing.assert_close(residual, agreement(NOISE - cond, NOISE - uncond))  # of unit variance already
    noises = AdaptiveGuidance(MODEL, LABELS, space="eps").agree(NOISE, t, cond, uncond)
    torch.testing.assert_close(noises, agreement(cond, uncond))
    assert convert(cond, NOISE, SCHEDULE.alpha(t), SCHEDULE.sigma(t), "eps", "eps") is cond


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e20, 1e30])
def test_agreement_has_no_unit(size: float) -> None:
    first, second = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    torch.testing.assert_close(agreement(size * first, second), torch.tensor([0.96]))
    torch.testing.assert_close(agreement(size * first, size * second), torch.tensor([0.96]))


def test_an_empty_list_is_no_default() -> None:
    with pytest.raises(ValueError, match="options must hold 1"):
        search_policy(MODEL, LABELS, NOISE, TIMES, evaluations=2 * STEPS, options=[])
    with pytest.raises(ValueError, match="policy must have 2 choices, one a call, got 0"):
        LinearAG(MODEL, LABELS, coefficients=torch.zeros(2, 4), policy=[])
