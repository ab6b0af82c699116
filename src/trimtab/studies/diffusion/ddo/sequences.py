"""DDO of a small autoregressive model of sequences, within the passes that its rivals have for likelihood training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.diffusion import SelfPlay, autoregressive_log_ratio
from trimtab.studies.tasks.discrete_sequences import (
    Fitted,
    Lesson,
    autoregressive_network,
    left_to_right,
    sequence_log_prob,
)

LIKELIHOOD = 0.6
"""Share of the steps for likelihood training; the rounds have the rest, which samples use up."""
POOL = 512
"""Sequences of the reference that a round draws beforehand."""


def tuned_autoregressive(lesson: Lesson, *, rounds: int = 2) -> Fitted:
    """A model that goes from left to right, tuned in rounds within the same number of passes."""
    first = int(LIKELIHOOD * lesson.steps)
    model = autoregressive_network(lesson, first)
    generator = lesson.trial.generator(40)
    pool: list[Tensor] = []

    def log_ratio(model: nn.Module, reference: nn.Module, tokens: Tensor) -> Tensor:
        return autoregressive_log_ratio(model(tokens), reference(tokens), tokens)

    def sample(reference: nn.Module, count: int) -> Tensor:
        return pool[-1][torch.randint(POOL, (count,), generator=generator)]

    beta = float(lesson.trial.setting.get("beta", 0.3))
    rule = SelfPlay(model, lesson.optimizer(model.parameters(), 2e-4), log_ratio, sample, beta=beta)
    # A training step has three passes of a batch, a step of tuning eight, a sample one a token.
    left = 3 * lesson.batch_size * (lesson.steps - first) // rounds - POOL * lesson.length
    steps = max(1, left // (8 * lesson.batch_size))
    for turn in range(rounds):
        rule.next_round()
        pool.append(left_to_right(rule.reference, POOL, generator))  # type: ignore[arg-type]
        for batch in lesson.batches(steps, stream=turn + 1):
            rule.step(batch)
    model.eval()
    return Fitted(
        lambda count, evaluations, generator: left_to_right(model, count, generator),
        lambda tokens, generator: sequence_log_prob(model, tokens),
        [model],
        fewest=lesson.length,
    )
