"""Any-order models: orders, draws, likelihood and loss against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.generative import any_order_log_prob, any_order_loss, any_order_sample, random_ranks
from trimtab.ops.ordering import draw, hidden_log_prob, hide, scores_of

LENGTH, VALUES = 3, 2
MASK = VALUES
EVERY = torch.tensor(list(itertools.product(range(VALUES), repeat=LENGTH)))
JOINT = torch.rand(len(EVERY), generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
JOINT = JOINT / JOINT.sum()


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
    """Conditionals that do not belong to one joint."""
    known = (tokens != MASK).sum(1).double()[:, None, None]
    place = torch.arange(LENGTH, dtype=torch.float64)[None, :, None]
    return torch.arange(VALUES, dtype=torch.float64) * (0.3 + 0.5 * known + 0.2 * place)


def every_order() -> Tensor:
    return torch.tensor(list(itertools.permutations(range(LENGTH))))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(tokens: Tensor) -> Tensor:
    """How often each sequence came."""
    code = (tokens * VALUES ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    return torch.bincount(code, minlength=len(EVERY)).double() / len(tokens)


def far_from(tokens: Tensor, probs: Tensor) -> float:
    """Pearson's statistic in units of its spread, which for right draws is about standard normal."""
    statistic = len(tokens) * ((shares(tokens) - probs) ** 2 / probs).sum()
    degrees = len(probs) - 1
    return float((statistic - degrees) / math.sqrt(2 * degrees))


def test_random_ranks_are_uniform_over_orders_and_put_what_is_known_first() -> None:
    ranks = random_ranks(torch.zeros(60_000, 3, dtype=torch.bool), generator=seeded())
    counts = torch.bincount((ranks * torch.tensor([9, 3, 1])).sum(1))
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    assert (counts / 60_000 - 1 / 6).abs().max() < 0.01
    known = torch.rand(100, 7, generator=seeded(1)) < 0.5
    ranks = random_ranks(known, generator=seeded())
    assert torch.equal(ranks.sort(1).values, torch.arange(7).expand(100, 7))
    assert torch.equal(ranks < known.sum(1, keepdim=True), known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_by_inversion(dtype: torch.dtype) -> None:
    probs = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=dtype)
    edges = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs.log().expand(6, 4), uniform=edges).tolist() == [0, 0, 2, 2, 3, 3]
    # A value of probability 0 is drawn neither at the start nor at the end.
    ends = torch.tensor([-math.inf, 0.0, -math.inf]).expand(2, 3)
    assert draw(ends, uniform=torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]
    found = draw(probs.log().expand(100_000, 4), generator=seeded())
    assert (torch.bincount(found, minlength=4) / 1e5 - probs).abs().max() < 0.006
    assert torch.equal(found, draw(5 + probs.log().expand(100_000, 4), generator=seeded()))


def test_exact_conditionals_have_one_likelihood_whatever_the_order() -> None:
    for ranks in every_order():
        found = any_order_log_prob(perfect, EVERY, MASK, ranks=ranks.expand(len(EVERY), -1))
        torch.testing.assert_close(found.double(), JOINT.log())


def test_the_likelihood_of_a_part_is_its_marginal() -> None:
    part = torch.tensor([[1, MASK, 0], [MASK, MASK, MASK], [MASK, 0, MASK]])
    agree = ((EVERY[None] == part[:, None]) | (part[:, None] == MASK)).all(2)
    expected = (agree * JOINT).sum(1).log()
    torch.testing.assert_close(any_order_log_prob(perfect, part, MASK, generator=seeded()).double(), expected)


@pytest.mark.parametrize("model", [perfect, wrong])
def test_the_loss_is_the_mean_over_orders_of_the_negative_log_likelihood(model) -> None:
    """Both sides in full: all orders, and all numbers of hidden positions."""
    orders = every_order()
    expected = torch.stack(
        [-any_order_log_prob(model, EVERY, MASK, ranks=ranks.expand(len(EVERY), -1)) for ranks in orders]
    ).mean(0)
    found = torch.stack(
        [
            any_order_loss(
                model,
                EVERY,
                MASK,
                ranks=ranks.expand(len(EVERY), -1),
                hidden=torch.full((len(EVERY),), n),
            )
            for ranks in orders
            for n in range(1, LENGTH + 1)
        ]
    ).mean(0)
    torch.testing.assert_close(found, expected)
    drawn = any_order_loss(model, EVERY.repeat(8000, 1), MASK, generator=seeded()).view(8000, -1).mean(0)
    torch.testing.assert_close(drawn, expected, rtol=0.03, atol=0)


def test_samples_of_exact_conditionals_have_the_joint() -> None:
    start = torch.full((40_000, LENGTH), MASK)
    assert abs(far_from(any_order_sample(perfect, start, MASK, generator=seeded()), JOINT)) < 4
    for ranks in every_order()[::2]:
        drawn = any_order_sample(perfect, start, MASK, ranks=ranks.expand_as(start), generator=seeded())
        assert abs(far_from(drawn, JOINT)) < 4
    # Drawn all at once they are independent, which the joint is not.
    assert far_from(any_order_sample(perfect, start, MASK, tokens_per_call=3, generator=seeded()), JOINT) > 20


def test_what_is_known_is_kept_and_the_rest_drawn_given_it() -> None:
    start = torch.tensor([[MASK, 1, MASK], [0, MASK, MASK], [1, 1, 0]]).repeat(20_000, 1)
    drawn = any_order_sample(perfect, start, MASK, generator=seeded())
    assert torch.equal(torch.where(start == MASK, MASK, drawn), start)
    for row in range(3):
        agree = ((start[row] == EVERY) | (start[row] == MASK)).all(1)
        expected = (agree * JOINT) / (agree * JOINT).sum()
        assert (shares(drawn[row::3]) - expected).abs().max() < 0.015


def test_evaluations_are_as_many_as_masks_and_times_are_handed_on() -> None:
    calls: list[list[float]] = []

    def model(tokens: Tensor, t: Tensor) -> Tensor:
        calls.append(t.tolist())
        return torch.zeros(*tokens.shape, VALUES)

    start = torch.full((2, 6), MASK)
    start[0, :2], start[1, 5] = 0, 1
    times = torch.linspace(1, 0.1, 6).expand(2, 6)
    any_order_sample(model, start, MASK, times=times)
    assert len(calls) == 5  # the first sample has four masks, the second five
    assert calls[0] == [times[0, 1].item()] * 2
    calls.clear()
    any_order_sample(model, start, MASK, times=times, tokens_per_call=2)
    assert len(calls) == 3


def test_reproducible_and_the_input_is_left_as_it_was() -> None:
    start = torch.full((50, LENGTH), MASK)
    first, second, other = (any_order_sample(perfect, start, MASK, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert bool((start == MASK).all())


def test_a_column_for_the_mask_is_never_drawn_and_takes_no_probability() -> None:
    def with_column(tokens: Tensor) -> Tensor:
        return torch.cat([perfect(tokens), torch.full((len(tokens), LENGTH, 1), 9.0)], 2)

    torch.testing.assert_close(any_order_log_prob(with_column, EVERY, MASK).double(), JOINT.log())
    start = torch.full((200, LENGTH), MASK)
    drawn = any_order_sample(with_column, start, MASK, generator=seeded())
    assert torch.equal(drawn, any_order_sample(perfect, start, MASK, generator=seeded()))
    assert scores_of(with_column, EVERY, MASK)[..., MASK].max() == -math.inf


def test_gradients_reach_hidden_positions_alone() -> None:
    scores = torch.randn(2, LENGTH, VALUES, generator=seeded(), requires_grad=True)
    hidden = torch.tensor([[True, False, True], [False, False, False]])
    value = hidden_log_prob(scores, EVERY[:2], hidden)
    assert value[1] == 0
    value.sum().backward()
    assert torch.equal(scores.grad.abs().sum(2) > 0, hidden)
    assert torch.equal(hide(EVERY[:1], ~hidden[:1], MASK), torch.tensor([[MASK, 0, MASK]]))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="tokens must be int64"):
        any_order_sample(perfect, torch.zeros(2, 3), MASK)
    with pytest.raises(TypeError, match="tokens must be a tensor"):
        any_order_loss(perfect, np.zeros((2, 3), dtype=int), MASK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tokens must have shape \(batch, length\)"):
        any_order_log_prob(perfect, torch.zeros(3, dtype=torch.int64), MASK)
    with pytest.raises(ValueError, match="model must give scores"):
        any_order_loss(lambda tokens: torch.zeros(1, 1), EVERY, MASK)
    with pytest.raises(ValueError, match="ranks must be of shape"):
        any_order_loss(perfect, EVERY, MASK, ranks=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="ranks must put what is known before"):
        any_order_sample(perfect, torch.tensor([[0, MASK, 0]]), MASK, ranks=torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match="tokens_per_call must be at least 1"):
        any_order_sample(perfect, EVERY, MASK, tokens_per_call=0)
    with pytest.raises(ValueError, match="known must be bool"):
        random_ranks(torch.zeros(2, 3))


@pytest.mark.parametrize("mask_id", [True, None, 2.0])
def test_a_mask_that_is_no_integer_is_refused_by_name(mask_id: object) -> None:
    tokens = torch.tensor([[0, 1, 1]])
    for call in (any_order_sample, any_order_log_prob, any_order_loss):
        with pytest.raises(TypeError, match="mask_id must be an integer"):
            call(_perfect, tokens, mask_id)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mask_id must be an integer"):
        hide(tokens, tokens > 0, mask_id)  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, VALUES, 7])
def test_a_token_that_is_no_value_is_refused_where_it_would_be_looked_up(token: int) -> None:
    tokens = torch.tensor([[0, 1, token]])
    scores = torch.zeros(1, 3, VALUES)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 2\) where they are hidden"):
        hidden_log_prob(scores, tokens, torch.tensor([[False, False, True]]))
    assert hidden_log_prob(scores, tokens, torch.tensor([[False, False, False]])) == 0


COIN = lambda tokens: torch.zeros(*tokens.shape, 2)
SAID = torch.tensor([[0, 1, 1]])


@pytest.mark.parametrize("ranks", [[0, 0, 0], [5, 6, 7], [0, 2, 3]])
def test_a_likelihood_asks_for_an_order_of_all_that_is_known(ranks: list[int]) -> None:
    with pytest.raises(ValueError, match="^ranks must number what is known from 0"):
        any_order_log_prob(COIN, SAID, 2, ranks=torch.tensor([ranks]))


def test_a_likelihood_refuses_an_order_that_would_leave_out_what_comes_after_a_mask() -> None:
    partly = torch.tensor([[0, 2, 1]])
    with pytest.raises(ValueError, match="^ranks must number what is known from 0, before what is masked"):
        any_order_log_prob(COIN, partly, 2, ranks=torch.tensor([[0, 1, 2]]))
    found = any_order_log_prob(COIN, partly, 2, ranks=torch.tensor([[1, 2, 0]]))
    assert found.item() == pytest.approx(-2 * math.log(2))


@pytest.mark.parametrize(
    ("hidden", "error"),
    [([0], ValueError), ([4], ValueError), ([1, 2], ValueError), ([1.5], TypeError), ([True], TypeError)],
)
def test_the_loss_hides_one_to_all_positions(hidden: list[float], error: type[Exception]) -> None:
    with pytest.raises(error, match="^hidden must be"):
        any_order_loss(COIN, SAID, 2, hidden=torch.tensor(hidden))


def test_the_loss_refuses_masks_and_what_is_no_order() -> None:
    with pytest.raises(ValueError, match="^tokens must be without the mask"):
        any_order_loss(COIN, torch.tensor([[0, 2, 1]]), 2)
    with pytest.raises(ValueError, match="^ranks must be an order"):
        any_order_loss(COIN, SAID, 2, ranks=torch.tensor([[0, 0, 1]]))


@pytest.mark.parametrize("shape", [(3, 3, 4), (1, 5, 4), (1, 3)])
def test_scores_of_another_batch_or_length_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="^scores, tokens and hidden must be of one batch and length"):
        hidden_log_prob(torch.zeros(shape), SAID, torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("uniform", [1.0, -0.1, float("nan")])
def test_a_number_that_decides_a_draw_is_below_one(uniform: float) -> None:
    scores = torch.tensor([0.0, -torch.inf])
    with pytest.raises(ValueError, match=r"^uniform must be in \[0, 1\)"):
        draw(scores, uniform=torch.tensor(uniform))
    assert draw(scores, uniform=torch.tensor(1 - 2**-24)).item() == 0
