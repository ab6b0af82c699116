"""Any-order models of an Ising model, trained on its energy alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trimtab.generative import (
    MarginalFM,
    MarginalKL,
    Marginals,
    any_order_log_prob,
    any_order_sample,
    random_ranks,
    reverse_kl_surrogate,
)
from trimtab.nets import MaskedMLP, SequenceScore
from trimtab.ops.ordering import hidden_log_prob, hide, scores_of
from trimtab.studies.engine.study import Curve, Experiment, Metric, Result, Trial
from trimtab.studies.tools.descent import descent_step

SIDE, MASK, BATCH = 4, 2, 128
SITES = SIDE * SIDE
STATES = torch.tensor(list(itertools.product(range(2), repeat=SITES)))


def log_density(tokens: Tensor) -> Tensor:
    """0.1 x' A x with spins of -1 and 1 on a torus, as in the paper: every bond counts twice."""
    spins = (2.0 * tokens - 1).view(-1, SIDE, SIDE)
    return 0.2 * (spins * (spins.roll(1, 1) + spins.roll(1, 2))).sum((1, 2))


def exact(parts: Tensor) -> Tensor:
    """Exact log-marginals, by enumeration."""
    logs = log_density(STATES).double()
    logs = logs - logs.logsumexp(0)
    return torch.stack([logs[((part == STATES) | (part == MASK)).all(1)].logsumexp(0) for part in parts])


Step = Callable[[], object]


def by_kl(marginals: Marginals, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Step:
    """A step of MaM by reverse KL."""
    rule = MarginalKL(marginals, optimizer, SITES, log_density, samples=BATCH, gibbs_steps=4, generator=generator)
    return rule.step


def by_matching(marginals: Marginals, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Step:
    """A step of MaM by matching, half of its sequences uniformly random and half the model's own."""
    half = BATCH // 2
    rule = MarginalFM(marginals, optimizer, SITES, log_density, samples=half, gibbs_steps=4, generator=generator)
    return lambda: rule.step(torch.randint(2, (half, SITES), generator=generator))


def by_orders(marginals: Marginals, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Step:
    """A step of an any-order model by reverse KL: its own likelihood in one order, an evaluation a site."""
    model = marginals.conditional

    def step() -> None:
        start = torch.full((BATCH, SITES), MASK)
        ranks = random_ranks(start != MASK, generator=generator)
        tokens = any_order_sample(model, start, MASK, ranks=ranks, generator=generator)
        # All prefixes in one batch.
        at = torch.arange(SITES).repeat_interleave(BATCH)[:, None]
        every, order = tokens.repeat(SITES, 1), ranks.repeat(SITES, 1)
        scores = scores_of(model, hide(every, order < at, MASK), MASK)
        log_prob = hidden_log_prob(scores, every, order == at).view(SITES, BATCH).sum(0)
        descent_step(optimizer, reverse_kl_surrogate(log_prob, log_density(tokens)))

    return step


Rule = Callable[[Marginals, torch.optim.Optimizer, torch.Generator], Step]


def learnt(trial: Trial, *, rule: Rule, passes: int = 16) -> Result:
    """Train by a rule whose step takes so many passes of a batch, backward ones counted twice, and compare."""
    marginals = trial.seeded(lambda: Marginals(MaskedMLP(SITES, 2), SequenceScore(SITES, 2), MASK))
    steps = trial.pick(smoke=160, laptop=6400, paper=160_000) // passes
    optimizer = torch.optim.Adam(marginals.parameters(), lr=1e-3)
    step = rule(marginals, optimizer, trial.generator(1))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    whole = STATES[torch.multinomial(log_density(STATES).double().softmax(0), 2000, True, generator=trial.generator(2))]
    known = torch.rand(200, SITES, generator=trial.generator(3)) < 0.5
    parts = hide(whole[:200], known, MASK)
    right, right_parts = exact_whole(whole), exact(parts)
    done, divergences = [], []

    @torch.no_grad()
    def divergence() -> float:
        own = any_order_log_prob(marginals.conditional, whole, MASK, generator=trial.generator(4))
        return float((right - own).mean())

    for k in range(steps):
        step()
        schedule.step()
        if (k + 1) % max(1, steps // 8) == 0:
            done.append((k + 1) * passes)
            divergences.append(divergence())
            trial.report((k + 1) / steps)
    metrics = {"divergence": divergences[-1]}
    if rule is not by_orders:
        with torch.no_grad():
            gap = marginals.log_marginal(parts) - right_parts
        metrics["error"] = float(gap.square().mean().sqrt())
    return Result(metrics, curves={"divergence": Curve(done, divergences, x_label="network passes of a batch")})


def exact_whole(tokens: Tensor) -> Tensor:
    """Exact log-probabilities of whole states."""
    return log_density(tokens).double() - log_density(STATES).double().logsumexp(0)


lattice = Experiment(
    name="Ising model",
    arms={
        "MaM, KL": partial(learnt, rule=by_kl),
        "MaM, FM": partial(learnt, rule=by_matching, passes=13),
        # Sampling takes an evaluation a site, the likelihood three times that.
        "any-order model, KL": partial(learnt, rule=by_orders, passes=4 * SITES),
    },
    metrics={
        "divergence": Metric("KL divergence of the target from the model (nats)", best="min"),
        "error": Metric("error of log-marginals, root mean square (nats)", best="min"),
    },
    seeds={"smoke": 1, "laptop": 5, "paper": 5},
    log="y",
    cost=7.0,
)
