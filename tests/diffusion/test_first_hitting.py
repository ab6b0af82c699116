"""Masked diffusion: the loss in both forms, the samplers' laws, and the law of the Gumbel trick in low precision."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from trimtab.diffusion import (
    CosineMasking,
    MaskedDiffusionLoss,
    MaskingSchedule,
    PolynomialMasking,
    ancestral,
    first_hitting,
    gumbel_categorical,
    hitting_times,
    truncated_gumbel_probs,
)
from trimtab.diffusion.gumbel import GUMBEL_LIMIT
from trimtab.generative import any_order_log_prob

LENGTH, VALUES, MASK = 3, 2, 2
EVERY = torch.tensor(list(itertools.product(range(VALUES), repeat=LENGTH)))
JOINT = torch.tensor([0.3, 0.02, 0.08, 0.1, 0.05, 0.15, 0.2, 0.1], dtype=torch.float64)
SCHEDULES = [PolynomialMasking(), PolynomialMasking(2.5), CosineMasking()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def _perfect(tokens: Tensor) -> Tensor:
    agree = ((EVERY[None] == tokens[:, None]) | (tokens[:, None] == MASK)).all(2)
    weight = agree * JOINT
    scores = [[weight[:, EVERY[:, i] == v].sum(1) for v in range(VALUES)] for i in range(LENGTH)]
    return torch.stack([torch.stack(row, 1) for row in scores], 1).log()


PARTS = torch.tensor(list(itertools.product(range(VALUES + 1), repeat=LENGTH)))
TABLE = _perfect(PARTS)


def perfect(tokens: Tensor) -> Tensor:
    """The exact conditionals of the joint, by enumeration."""
    return TABLE[(tokens * (VALUES + 1) ** torch.arange(LENGTH - 1, -1, -1)).sum(1)]


def wrong(tokens: Tensor) -> Tensor:
    """Conditionals that belong to no joint, and depend on how much is known."""
    known = (tokens != MASK).sum(1).double()[:, None, None]
    return torch.arange(VALUES, dtype=torch.float64) * (0.5 + known) * torch.ones(1, LENGTH, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blank(count: int) -> Tensor:
    return torch.full((count, LENGTH), MASK)


def distance(tokens: Tensor) -> float:
    """Pearson's statistic against the joint, centred and divided by its spread."""
    code = (tokens * VALUES ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    share = torch.bincount(code, minlength=len(JOINT)).double() / len(tokens)
    degrees = len(JOINT) - 1
    return float((len(tokens) * ((share - JOINT) ** 2 / JOINT).sum() - degrees) / math.sqrt(2 * degrees))


@every_schedule
def test_schedules_fall_from_one_to_zero_and_their_parts_agree(schedule: MaskingSchedule) -> None:
    t = torch.linspace(0.02, 0.98, 40, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    slope = torch.autograd.grad(alpha.sum(), t)[0]
    torch.testing.assert_close(schedule.rate(t), -slope / (1 - alpha))
    torch.testing.assert_close(schedule.t_of_alpha(alpha), t)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert bool((alpha.diff() < 0).all())


@pytest.mark.parametrize("model", [perfect, wrong])
@every_schedule
def test_the_time_form_has_the_expectation_of_the_count_form(schedule: MaskingSchedule, model) -> None:
    """The integral over time in full: masks of each number n have probability C(L,n) (1-alpha)^n alpha^(L-n)."""
    tokens = EVERY[[1]]
    subsets = [torch.tensor(s) for s in itertools.product([False, True], repeat=LENGTH)]

    def at(t: float) -> float:
        time = torch.tensor([t], dtype=torch.float64)
        alpha, total = float(schedule.alpha(time)), 0.0
        for known in subsets:
            n = int((~known).sum())
            scores = model(tokens.masked_fill(~known, MASK)).log_softmax(2)
            loss = -scores.gather(2, tokens[:, :, None])[0, :, 0][~known].sum()
            total += (1 - alpha) ** n * alpha ** (LENGTH - n) * float(loss)
        return total * float(schedule.rate(time))

    integral = integrate.quad(at, 1e-9, 1)[0]
    orders = torch.tensor(list(itertools.permutations(range(LENGTH))))
    exact = -any_order_log_prob(model, tokens.expand(len(orders), -1), MASK, ranks=orders).mean()
    assert integral == pytest.approx(float(exact), rel=1e-4)
    many = tokens.expand(60_000, -1)
    by_time = MaskedDiffusionLoss(MASK, form="time", schedule=schedule)(model, many, generator=seeded())
    by_count = MaskedDiffusionLoss(MASK)(model, many, generator=seeded())
    assert float(by_time) == pytest.approx(float(exact), rel=0.05)
    assert float(by_count) == pytest.approx(float(exact), rel=0.01)


def test_a_perfect_model_has_the_likelihood_itself_and_no_other_is_better() -> None:
    expected = -(JOINT * JOINT.log()).sum()
    data = EVERY[torch.multinomial(JOINT, 50_000, replacement=True, generator=seeded())]
    own = MaskedDiffusionLoss(MASK)(perfect, data, generator=seeded())
    assert float(own) == pytest.approx(float(expected), rel=0.02)
    assert float(MaskedDiffusionLoss(MASK)(wrong, data, generator=seeded())) > float(own) + 0.1


def test_reductions_and_given_times() -> None:
    loss = MaskedDiffusionLoss(MASK, form="time", reduction="none")
    each = loss(perfect, EVERY, times=torch.full((8,), 0.5), generator=seeded())
    assert each.shape == (8,)
    total = MaskedDiffusionLoss(MASK, form="time", reduction="sum")(
        perfect, EVERY, times=torch.full((8,), 0.5), generator=seeded()
    )
    torch.testing.assert_close(total, each.sum())
    # Everything is masked at time 1, and the weight of the linear schedule is 1 there.
    last = loss(perfect, EVERY, times=torch.ones(8))
    independent = perfect(blank(1)).log_softmax(2)[0]
    torch.testing.assert_close(last, -independent[torch.arange(LENGTH), EVERY].sum(1))


@every_schedule
def test_the_first_hitting_time_is_the_largest_of_as_many_draws(schedule: MaskingSchedule) -> None:
    """With L masks the first has P(time <= t) = (1 - alpha(t))^L, and all of them are L ordered draws."""
    length = 5
    hidden = torch.ones(4000, length, dtype=torch.bool)
    times = hitting_times(hidden, schedule, generator=seeded())
    assert bool((times.diff(dim=1) <= 0).all())

    def masked(t: object) -> object:
        return 1 - schedule.alpha(torch.as_tensor(t)).numpy()

    assert stats.kstest(times[:, 0].numpy(), lambda t: masked(t) ** length).pvalue > 0.001
    assert stats.kstest(times[:, -1].numpy(), lambda t: 1 - (1 - masked(t)) ** length).pvalue > 0.001
    shuffled = times[torch.arange(4000), torch.randint(length, (4000,), generator=seeded(1))]
    assert stats.kstest(shuffled.numpy(), masked).pvalue > 0.001


def test_the_clock_starts_with_the_masks_that_there_are() -> None:
    hidden = torch.tensor([[True, True, True], [False, True, True]])
    uniform = torch.full((2, 3), 0.5, dtype=torch.float64)
    found = hitting_times(hidden, PolynomialMasking(), uniform=uniform)
    expected = [[0.5 ** (1 / 3), 0.5 ** (1 / 3 + 1 / 2), 0.5 ** (1 / 3 + 1 / 2 + 1)], [1.0, 0.5**0.5, 0.5**1.5]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_first_hitting_has_the_joint_in_as_many_calls_as_tokens() -> None:
    calls: list[Tensor | None] = []

    def model(tokens: Tensor, t: Tensor | None = None) -> Tensor:
        calls.append(t)
        return perfect(tokens)

    assert abs(distance(first_hitting(model, blank(40_000), MASK, generator=seeded()))) < 4
    assert calls == [None] * LENGTH
    timed = first_hitting(model, blank(40_000), MASK, schedule=CosineMasking(), generator=seeded())
    assert abs(distance(timed)) < 4
    assert len(calls) == 2 * LENGTH
    assert calls[-1].shape == (40_000,)
    assert bool((calls[-1] < calls[-2]).all())


@every_schedule
def test_the_ancestral_sampler_comes_to_the_joint_with_steps(schedule: MaskingSchedule) -> None:
    few, many = (
        distance(ancestral(perfect, blank(8000), MASK, steps=steps, schedule=schedule, generator=seeded()))
        for steps in (2, 200)
    )
    assert few > 20
    assert abs(many) < 4


def test_the_ancestral_sampler_reveals_at_the_rate_of_its_schedule() -> None:
    """With a model that marks the number of known tokens, the mean share revealed by time t is alpha(t)."""
    schedule, revealed = PolynomialMasking(2.0), []

    def coin(tokens: Tensor) -> Tensor:
        revealed.append(float((tokens != 2).double().mean()))
        return torch.zeros(*tokens.shape, 2)

    ancestral(coin, torch.full((4000, 16), 2), 2, steps=10, schedule=schedule, generator=seeded())
    expected = schedule.alpha(torch.linspace(1, 0, 11, dtype=torch.float64))[:-1]
    assert revealed == pytest.approx(expected.tolist(), abs=0.01)


def test_nothing_is_called_where_nothing_changed_or_nothing_is_left() -> None:
    calls = []

    def coin(tokens: Tensor) -> Tensor:
        calls.append(1)
        return torch.zeros(*tokens.shape, 2)

    ancestral(coin, torch.full((1, 8), 2), 2, steps=1000, generator=seeded())
    assert len(calls) <= 8
    whole = torch.zeros(3, 8, dtype=torch.int64)
    assert torch.equal(ancestral(coin, whole, 2, steps=5), whole)
    assert len(calls) <= 8


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral"])
def test_prompts_are_kept_and_generators_decide(sampler: str) -> None:
    def sample(start: Tensor, seed: int) -> Tensor:
        if sampler == "ancestral":
            return ancestral(perfect, start, MASK, steps=20, generator=seeded(seed))
        return first_hitting(perfect, start, MASK, generator=seeded(seed))

    start = blank(100)
    start[:, 1] = 1
    drawn = sample(start, 1)
    assert bool((drawn[:, 1] == 1).all())
    assert bool((drawn != MASK).all())
    assert torch.equal(drawn, sample(start, 1))
    assert not torch.equal(drawn, sample(start, 2))
    assert bool((start[:, 0] == MASK).all())


probabilities = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(probabilities, st.floats(0.5, 12.0))
def test_the_truncated_law_sums_to_one_and_favours_the_probable(raw: list[float], limit: float) -> None:
    p = torch.tensor(raw, dtype=torch.float64)
    p = p / p.sum()
    found = truncated_gumbel_probs(p, limit)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-9)
    ratio = (found / p)[p.argsort()]
    assert bool((ratio.diff() >= -1e-9).all())


def test_the_truncated_law_is_the_integral_of_the_truncated_density() -> None:
    p, limit = torch.tensor([0.05, 0.6, 0.01, 0.34], dtype=torch.float64), 1.5
    top = math.exp(-math.exp(-limit))

    def cdf(g: float) -> float:
        return min(1.0, math.exp(-math.exp(-g)) / top)

    def density(g: float, k: int) -> float:
        others = (cdf(g + math.log(p[k]) - math.log(p[i])) for i in range(4) if i != k)
        return math.exp(-g - math.exp(-g)) / top * math.prod(others)

    for k in range(4):
        corners = sorted(limit + math.log(p[i]) - math.log(p[k]) for i in range(4))
        inside = [c for c in corners if c < limit]
        expected = integrate.quad(density, -8, limit, args=(k,), points=inside, limit=200)[0]
        assert float(truncated_gumbel_probs(p, limit)[k]) == pytest.approx(expected, abs=1e-7)


def test_without_a_limit_the_law_is_the_distribution_and_at_none_the_mode_wins() -> None:
    p = torch.tensor([0.2, 0.5, 0.3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(truncated_gumbel_probs(p, 40.0), p)
    assert float(truncated_gumbel_probs(p, 0.01)[1]) > 0.5
    assert float(truncated_gumbel_probs(p, 1.0)[3]) == 0.0
    # Values of equal probability share, whatever the limit.
    torch.testing.assert_close(truncated_gumbel_probs(torch.full((2, 5), 0.2), 0.7), torch.full((2, 5), 0.2))


def test_draws_from_truncated_numbers_have_the_truncated_law() -> None:
    p, limit, draws = torch.tensor([0.9, 0.09, 0.0096, 0.0004], dtype=torch.float64), 5.0, 1_000_000
    uniform = torch.rand(draws, 4, generator=seeded(), dtype=torch.float64) * math.exp(-math.exp(-limit))
    found = torch.bincount(gumbel_categorical(p.log().expand(draws, 4), uniform=uniform), minlength=4) / draws
    law = truncated_gumbel_probs(p, limit)
    spread = (law * (1 - law) / draws).sqrt().clamp_min(1 / draws)
    assert float(((found - p) / spread).abs().max()) > 15
    assert float(((found - law) / spread).abs().max()) < 4.5


def test_sixteen_bit_draws_lie_between_the_truncated_law_and_the_truth() -> None:
    """A uniform number of b bits is also rounded down: a rare value of probability p comes with x / (e^x - 1) p.

    Here x = 2^-b / p; truncation alone would leave it exp(-x) p.
    """
    p, draws, bits = torch.tensor([0.9, 0.0992, 0.0008], dtype=torch.float64), 1_000_000, 11
    # The numbers themselves have 16 bits, 11 of them behind the point; the logarithms are taken in more.
    uniform = torch.rand(draws, 3, generator=seeded(), dtype=torch.float16).double()
    assert uniform.max() == 1 - 2.0**-bits
    share = float((gumbel_categorical(p.log().expand(draws, 3), uniform=uniform) == 2).double().mean())
    x = 2.0**-bits / float(p[2])
    assert share == pytest.approx(x / math.expm1(x) * float(p[2]), rel=0.12)
    law = truncated_gumbel_probs(p, -math.log(-math.log1p(-(2.0**-bits))))
    assert float(law[2]) == pytest.approx(math.exp(-x) * float(p[2]), rel=0.01)
    assert float(law[2]) < 0.8 * share < 0.8 * 0.8 * float(p[2])


def test_in_32_bits_rare_values_lose_and_in_64_they_do_not() -> None:
    """What happens in a step of 10,000 that leaves most masks: given that a mask falls, rare values come less often."""
    p = torch.tensor([0.99, 0.0099, 1e-4], dtype=torch.float64)
    step = torch.cat([p / 1e4, torch.tensor([1 - 1e-4], dtype=torch.float64)])
    assert pytest.approx(16.6355, abs=1e-4) == GUMBEL_LIMIT
    law = truncated_gumbel_probs(step)[:3]
    law = law / law.sum()
    assert float(law[2]) < 0.1 * 1e-4
    assert float(law[0]) > 0.99
    double = truncated_gumbel_probs(step, limit=-math.log(-math.log1p(-(2.0**-53))))[:3]
    torch.testing.assert_close(double / double.sum(), p)
    largest = torch.tensor(1 - 2.0**-24)
    assert float(-(-largest.log()).log()) == pytest.approx(GUMBEL_LIMIT, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_are_of_the_precision_of_the_scores(dtype: torch.dtype) -> None:
    scores = torch.zeros(200, 7, dtype=dtype)
    uniform = torch.rand(scores.shape, dtype=dtype, generator=torch.Generator().manual_seed(4))
    found = gumbel_categorical(scores, generator=torch.Generator().manual_seed(4))
    assert torch.equal(found, gumbel_categorical(scores, uniform=uniform))
    assert torch.equal(found, uniform.argmax(1))  # of equal scores the largest number wins


def test_gumbel_draws_are_the_distribution_and_invariant_to_a_constant() -> None:
    p = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
    drawn = gumbel_categorical(p.log().expand(100_000, 3), generator=seeded())
    assert (torch.bincount(drawn, minlength=3) / 1e5 - p).abs().max() < 0.006
    assert torch.equal(drawn, gumbel_categorical(7 + p.log().expand(100_000, 3), generator=seeded()))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="form must be one of 'count', 'time'"):
        MaskedDiffusionLoss(MASK, form="counts")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule must be left out"):
        MaskedDiffusionLoss(MASK, schedule=CosineMasking())
    with pytest.raises(ValueError, match="reduction must be one of"):
        MaskedDiffusionLoss(MASK, reduction="men")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 1"):
        ancestral(perfect, blank(1), MASK, steps=0)
    with pytest.raises(TypeError, match="tokens must be int64"):
        first_hitting(perfect, torch.zeros(2, 3), MASK)
    with pytest.raises(ValueError, match="power must be positive"):
        PolynomialMasking(0.0)
    with pytest.raises(ValueError, match="probs must be non-negative and sum to 1"):
        truncated_gumbel_probs(torch.tensor([0.4, 0.4]))
    with pytest.raises(ValueError, match="limit must be positive"):
        truncated_gumbel_probs(torch.tensor([0.5, 0.5]), -1.0)
    with pytest.raises(TypeError, match="scores must be floating point"):
        gumbel_categorical(torch.tensor([1, 2]))


@pytest.mark.parametrize("mask_id", [math.nan, 2.0, True, None])
def test_a_mask_that_is_no_token_is_refused(mask_id) -> None:
    """Nothing equals NaN: all would count as known, and come back as it was."""
    masked = torch.full((2, 3), 2)
    with pytest.raises(TypeError, match="mask_id must be an integer"):
        ancestral(lambda tokens: torch.zeros(*tokens.shape, 2), masked, mask_id, steps=4)
    with pytest.raises(TypeError, match="mask_id must be an integer"):
        first_hitting(lambda tokens: torch.zeros(*tokens.shape, 2), masked, mask_id)


def test_draws_of_another_shape_are_refused() -> None:
    tokens, loss = torch.zeros(2, 3, dtype=torch.int64), MaskedDiffusionLoss(2, form="time")
    with pytest.raises(ValueError, match=r"times must have shape \(2,\)"):
        loss(lambda tokens: torch.zeros(*tokens.shape, 2), tokens, times=torch.rand(2, 1))
    with pytest.raises(ValueError, match="uniform must have the shape of scores"):
        gumbel_categorical(torch.zeros(2, 3), uniform=torch.rand(3))
    with pytest.raises(ValueError, match="uniform must have the shape of hidden"):
        hitting_times(torch.ones(2, 3, dtype=torch.bool), PolynomialMasking(), uniform=torch.rand(3, 3))
    with pytest.raises(TypeError, match="hidden must be bool"):
        hitting_times(torch.ones(2, 3), PolynomialMasking())  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["count", "time"])
def test_data_that_hold_the_mask_are_refused(form) -> None:
    """The mask has probability 0 in them, and the loss would be infinite."""
    loss, masked = MaskedDiffusionLoss(2, form=form), torch.tensor([[0, 2, 1]])
    with pytest.raises(ValueError, match="tokens must be data without the mask, got 2 among them"):
        loss(lambda tokens: torch.zeros(*tokens.shape, 3), masked)


@pytest.mark.parametrize("time", [0.0, -0.1, 1.1, math.nan])
def test_times_and_uniform_numbers_outside_their_range_are_refused(time: float) -> None:
    coin = lambda tokens: torch.zeros(*tokens.shape, 2)
    with pytest.raises(ValueError, match=r"times must be in \(0, 1\]"):
        MaskedDiffusionLoss(2, form="time")(coin, torch.zeros(1, 3, dtype=torch.int64), times=torch.tensor([time]))
    with pytest.raises(ValueError, match="times must be left out with the count form"):
        MaskedDiffusionLoss(2)(coin, torch.zeros(1, 3, dtype=torch.int64), times=torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"uniform must be in \(0, 1\]"):
        hitting_times(torch.ones(1, 1, dtype=torch.bool), PolynomialMasking(), uniform=torch.tensor([[time]]))


def test_other_kinds_of_schedule_and_precision_are_refused() -> None:
    coin, masked = lambda tokens: torch.zeros(*tokens.shape, 2), torch.full((2, 3), 2)
    for call in (
        lambda: MaskedDiffusionLoss(2, form="time", schedule="cosine"),  # type: ignore[arg-type]
        lambda: hitting_times(masked == 2, "cosine"),  # type: ignore[arg-type]
        lambda: first_hitting(coin, masked, 2, schedule="cosine"),  # type: ignore[arg-type]
        lambda: ancestral(coin, masked, 2, steps=2, schedule="cosine"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="schedule must be a MaskingSchedule, got str"):
            call()
    with pytest.raises(TypeError, match="dtype must be a floating-point type"):
        ancestral(coin, masked, 2, steps=2, dtype=torch.int64)


@pytest.mark.parametrize("tokens_per_call", [1, 2])
@pytest.mark.parametrize("schedule", [None, PolynomialMasking(2.0)])
def test_a_callback_sees_every_evaluation_of_first_hitting(
    tokens_per_call: int, schedule: MaskingSchedule | None
) -> None:
    start = torch.full((5, LENGTH), MASK)
    start[0, 1] = 0  # a sample with a prompt waits for the others
    model = perfect if schedule is None else lambda tokens, t: perfect(tokens)
    settings = {"tokens_per_call": tokens_per_call, "schedule": schedule}
    seen: list[tuple[int, float, Tensor]] = []
    told = {"callback": lambda *told: seen.append(told)}
    watched = first_hitting(model, start, MASK, generator=seeded(), **told, **settings)
    assert torch.equal(watched, first_hitting(model, start, MASK, generator=seeded(), **settings))
    calls = math.ceil(LENGTH / tokens_per_call)
    assert [step for step, _, _ in seen] == list(range(calls))
    assert [time for _, time, _ in seen] == [max(0, LENGTH - tokens_per_call * (k + 1)) / LENGTH for k in range(calls)]
    # Each is a copy that later steps leave alone, and the last is what comes out.
    for _, time, tokens in seen:
        assert int((tokens[1:] == MASK).sum(1).max()) == round(time * LENGTH)
    assert torch.equal(seen[-1][2], watched)
    assert bool((watched[0, 1] == 0).all())


def test_a_callback_of_the_ancestral_sampler_sees_every_step_until_nothing_is_masked() -> None:
    start, seen = torch.full((5, LENGTH), MASK), []
    watched = ancestral(perfect, start, MASK, steps=8, generator=seeded(), callback=lambda *told: seen.append(told))
    assert torch.equal(watched, ancestral(perfect, start, MASK, steps=8, generator=seeded()))
    assert [step for step, _, _ in seen] == list(range(len(seen)))
    assert [time for _, time, _ in seen] == pytest.approx([1 - (k + 1) / 8 for k in range(len(seen))])
    assert all(bool((tokens == MASK).any()) for _, _, tokens in seen[:-1])
    assert torch.equal(seen[-1][2], watched)


@pytest.mark.parametrize("sample", [first_hitting, lambda *of, **more: ancestral(*of, steps=8, **more)])
def test_what_a_callback_of_a_masked_sampler_returns_goes_on(sample) -> None:
    start = torch.full((50, LENGTH), MASK)

    def hold(step: int, time: float, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :1].clamp_max(1), torch.ones_like(tokens[:, 1:2]), tokens[:, 2:]], 1)

    told: list[Tensor] = []

    def watched(tokens: Tensor) -> Tensor:
        told.append(tokens.clone())
        return perfect(tokens)

    out = sample(watched, start, MASK, generator=seeded(), callback=hold)
    assert bool((out[:, 1] == 1).all())
    assert not bool((out == MASK).any())
    assert all(bool((tokens[:, 1] == 1).all()) for tokens in told[1:])  # the model is asked given what was put in
    with pytest.raises(ValueError, match="callback must return None or the shape of x"):
        sample(perfect, start, MASK, generator=seeded(), callback=lambda step, time, tokens: tokens[:1])
    with pytest.raises(TypeError, match="the callback's tokens must"):
        sample(perfect, start, MASK, generator=seeded(), callback=lambda step, time, tokens: tokens.double())


def test_nothing_masked_is_nothing_to_tell() -> None:
    whole = torch.zeros(2, LENGTH, dtype=torch.int64)
    told: list[int] = []
    for out in (
        first_hitting(perfect, whole, MASK, callback=lambda step, *rest: told.append(step)),
        ancestral(perfect, whole, MASK, steps=4, callback=lambda step, *rest: told.append(step)),
    ):
        assert torch.equal(out, whole)
    assert told == []
