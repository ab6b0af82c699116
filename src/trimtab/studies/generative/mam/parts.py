"""How fast and how right the log-probabilities of parts of sequences are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.generative import MarginalLikelihood, Marginals, any_order_log_prob, any_order_sample
from trimtab.nets import SequenceScore
from trimtab.ops.ordering import hide, random_ranks
from trimtab.studies.engine.study import Experiment, Metric, Result, Trial
from trimtab.studies.tasks.discrete_sequences import Fitted, Lesson, blank, lesson_of, masked_network

DATA = 32
"""Sequences of the data in a step of the second stage; with as many samples, and two marginals of each, 128 in all."""


def trained(lesson: Lesson) -> Marginals:
    """MaM on data: half of the steps for the conditionals, half for the marginals."""
    first = lesson.steps // 2
    conditional = masked_network(lesson, first)
    marginal = lesson.network(SequenceScore)
    marginals = Marginals(conditional, marginal, conditional.mask_id)

    def train() -> nn.Module:
        marginal.load_state_dict(conditional.state_dict())
        steps = lesson.steps - first
        optimizer = lesson.optimizer(marginal.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = lesson.trial.generator(20)
        rule = MarginalLikelihood(marginals, optimizer, lesson.length, samples=DATA, gibbs_steps=1, generator=generator)
        for batch in lesson.batches(steps, stream=1):
            rule.step_marginals(batch[:DATA])
            schedule.step()
        return marginal

    lesson.kept(f"marginals of {lesson.steps - first} steps", marginal, train)
    return marginals


@torch.no_grad()
def fit(lesson: Lesson) -> Fitted:
    """MaM as a contestant: samples by the conditionals, likelihoods by the marginals, made to sum to one."""
    with torch.enable_grad():
        marginals = trained(lesson)
    conditional, mask_id = marginals.conditional, marginals.mask_id
    generator = lesson.trial.generator(21)

    def sample(count: int, evaluations: int, generator: torch.Generator) -> Tensor:
        per_call = -(-lesson.length // evaluations)
        start = blank(conditional, count)  # type: ignore[arg-type]
        return any_order_sample(conditional, start, mask_id, tokens_per_call=per_call, generator=generator)

    # Samples and their likelihoods in the same orders: the mean weight is then the sum itself on average.
    start = blank(conditional, lesson.trial.pick(smoke=50, laptop=1000, paper=10_000))  # type: ignore[arg-type]
    ranks = random_ranks(start != mask_id, generator=generator)
    own = any_order_sample(conditional, start, mask_id, ranks=ranks, generator=generator)
    weights = marginals.log_marginal(own) - any_order_log_prob(conditional, own, mask_id, ranks=ranks)
    total = weights.logsumexp(0) - math.log(len(own))
    return Fitted(
        sample, lambda tokens, generator: marginals.log_marginal(tokens) - total, [conditional, marginals.marginal]
    )


LogMarginal = Callable[[Marginals, Tensor, torch.Generator], Tensor]


def one_evaluation(marginals: Marginals, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """The network of marginals."""
    return marginals.log_marginal(tokens)


def in_orders(marginals: Marginals, tokens: Tensor, generator: torch.Generator, *, orders: int = 1) -> Tensor:
    """The conditionals, in one random order or a mean of probabilities over several."""
    found = [
        any_order_log_prob(marginals.conditional, tokens, marginals.mask_id, generator=generator) for _ in range(orders)
    ]
    return torch.stack(found).logsumexp(0) - math.log(orders)


def independent(marginals: Marginals, tokens: Tensor, generator: torch.Generator) -> Tensor:
    """One evaluation of the conditionals, with nothing known: tokens as if they were independent."""
    known = tokens != marginals.mask_id
    alone = marginals.log_conditional(torch.full_like(tokens[:1], marginals.mask_id)).expand(len(tokens), -1, -1)
    chosen = alone.gather(2, tokens.masked_fill(~known, 0)[:, :, None])[:, :, 0]
    return chosen.masked_fill(~known, 0.0).sum(1)


@torch.no_grad()
def judged(trial: Trial, *, source: str, log_marginal: LogMarginal) -> Result:
    """Log-marginals of unseen sequences of which half of the tokens are known."""
    lesson, unseen, truth = lesson_of(trial, source)
    with torch.enable_grad():
        marginals = trained(lesson)
    whole = unseen[: trial.pick(smoke=50, laptop=500, paper=5000)]
    nothing = torch.zeros_like(whole, dtype=torch.bool)
    known = random_ranks(nothing, generator=trial.generator(30)) < lesson.length // 2
    tokens = hide(whole, known, marginals.mask_id)
    act = partial(log_marginal, marginals, tokens, trial.generator(32))
    found = act()
    repeats = trial.pick(smoke=1, laptop=5, paper=20)
    clock = time.process_time()
    for _ in range(repeats):
        act()
    seconds = (time.process_time() - clock) / repeats / len(tokens)
    if truth.chain is not None:
        right = any_order_log_prob(truth.chain, tokens, truth.chain.mask_id)
    else:
        right = in_orders(marginals, tokens, trial.generator(33), orders=trial.pick(smoke=2, laptop=16, paper=64))
    return Result(
        {
            "seconds": seconds,
            "error": float((found - right).double().square().mean().sqrt()),
            "rank_correlation": float(
                torch.corrcoef(torch.stack([found, right]).double().argsort(1).argsort(1).double())[0, 1]
            ),
        }
    )


def compared(name: str, source: str) -> Experiment:
    """Ways to a log-marginal side by side."""
    ways: dict[str, LogMarginal] = {
        "MaM": one_evaluation,
        "any-order model": in_orders,
        "any-order model, 8 orders": partial(in_orders, orders=8),
        "independent tokens": independent,
    }
    return Experiment(
        name=name,
        arms={arm: partial(judged, source=source, log_marginal=way) for arm, way in ways.items()},
        metrics={
            "seconds": Metric("time for a log-marginal (s)", best="min"),
            "error": Metric("error of log-marginals, root mean square (nats)", best="min"),
            "rank_correlation": Metric("rank correlation of log-marginals", best="max"),
        },
        seeds={"smoke": 1, "laptop": 5, "paper": 5},
        reads=("digits",) if source == "digits" else (),
        alone=True,
        log="y",
        cost=3.0,
    )


digit_parts = compared("parts of binary digits", "digits")
chain_parts = compared("parts of a Markov chain", "chain")
