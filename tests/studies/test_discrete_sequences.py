"""The task of discrete sequences: its chain, its counting of evaluations, and its reference samplers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from trimtab.generative import any_order_log_prob
from trimtab.nets import MADE, MaskedMLP
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.discrete_sequences import (
    DiscreteSequences,
    Fitted,
    SequenceModel,
    binary_digits,
    counted,
    left_to_right,
    markov_chain,
    most_confident_first,
    sequence_log_prob,
)
from trimtab.studies.tools.markov import MarkovChain

CHAIN = MarkovChain.random(3, length=4)
EVERY = torch.tensor(list(itertools.product(range(3), repeat=4)))
PROBS = CHAIN.log_prob(EVERY).exp()


def test_the_chain_is_a_stationary_distribution() -> None:
    assert float(PROBS.sum()) == pytest.approx(1.0)
    assert float(-(PROBS * PROBS.log()).sum()) == pytest.approx(CHAIN.entropy)
    torch.testing.assert_close(CHAIN.stationary @ CHAIN.transition, CHAIN.stationary)
    for place, value in itertools.product(range(4), range(3)):
        assert float(PROBS[EVERY[:, place] == value].sum()) == pytest.approx(float(CHAIN.stationary[value]))


def test_its_moments_are_those_of_its_sequences() -> None:
    indicators = nn.functional.one_hot(EVERY, 3)[:, :, :-1].flatten(1).double()
    mean = PROBS @ indicators
    second = (indicators * PROBS[:, None]).T @ indicators
    torch.testing.assert_close(CHAIN.moments[0], mean)
    torch.testing.assert_close(CHAIN.moments[1], second - mean[:, None] * mean)


def test_its_conditionals_are_exact_for_whatever_is_known() -> None:
    for part in itertools.product(range(4), repeat=4):
        tokens = torch.tensor(part)
        weight = ((tokens == EVERY) | (tokens == 3)).all(1) * PROBS
        found = CHAIN(tokens[None])[0].exp()
        for place in (tokens == 3).nonzero()[:, 0].tolist():
            expected = torch.stack([weight[EVERY[:, place] == v].sum() for v in range(3)]) / weight.sum()
            torch.testing.assert_close(found[place], expected)
    torch.testing.assert_close(any_order_log_prob(CHAIN, EVERY, 3).double(), CHAIN.log_prob(EVERY))


def test_its_samples_have_its_frequencies() -> None:
    tokens = CHAIN.sample(50_000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount((tokens * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81) / 50_000
    assert float((share - PROBS).abs().max()) < 0.006


def test_evaluations_are_counted_and_limited() -> None:
    net = nn.Identity()
    assert counted([net], lambda: net(net(torch.ones(1))))[0] == 2

    def greedy(lesson: object) -> Fitted:
        def sample(count: int, evaluations: int, generator: torch.Generator) -> Tensor:
            for _ in range(evaluations + 1):
                net(torch.ones(1))
            return torch.zeros(count, 64, dtype=torch.int64)

        return Fitted(sample, lambda tokens, generator: torch.zeros(len(tokens)), [net])

    with pytest.raises(RuntimeError, match="may cost 8 evaluations, and took 9"):
        binary_digits.run(Trial(), SequenceModel(fit=greedy))


def test_the_most_confident_first_draws_all_within_its_evaluations() -> None:
    torch.manual_seed(0)
    net = MaskedMLP(12, 3, hidden=8)
    for evaluations in (1, 3, 12, 40):
        used, tokens = counted(
            [net], lambda n=evaluations: most_confident_first(net, 5, n, torch.Generator().manual_seed(0))
        )
        assert used == min(evaluations, 12)
        assert bool((tokens < 3).all())


def test_left_to_right_samples_have_the_likelihood_that_is_said() -> None:
    torch.manual_seed(0)
    net = MADE(3, 2, hidden=8)
    tokens = left_to_right(net, 40_000, torch.Generator().manual_seed(0))
    every = torch.cartesian_prod(*[torch.arange(2)] * 3)
    with torch.no_grad():
        expected = sequence_log_prob(net, every).exp()
    share = torch.bincount((tokens * torch.tensor([4, 2, 1])).sum(1), minlength=8) / 40_000
    assert float((share - expected).abs().max()) < 0.01


@pytest.mark.parametrize("task", [binary_digits, markov_chain], ids=["digits", "chain"])
def test_references_run(task: DiscreteSequences) -> None:
    for entrant in task.references().values():
        result = task.run(Trial(setting={"lr": 1e-3}), entrant)
        assert set(result.metrics) <= set(task.metrics)
        assert result.metrics["frechet"] > 0
    searching = task.run(Trial(setting={"lr": 1e-3}, searching=True), task.references()["autoregressive"])
    assert searching.score is not None
    assert searching.score < 0
