"""The ways of unlearning that are compared on the networks, and what none of them can be nearer than."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.ops.averaging import frozen_copy
from trimtab.ops.tempered_kl import tempered_kl
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descend
from trimtab.studies.tools.network_stack import BATCH, stacked_cross_entropy
from trimtab.studies.unlearning.datamodel_matching.networks import Stack, Work, attribution, train
from trimtab.unlearning import datamodel_matching, oracle_matching, predict_without

# The matched set is 5 retained samples and 20 repetitions for each one to forget, as the authors have it on CIFAR-10.
REPEATS = {"retain_multiplier": 5.0, "forget_multiplier": 20.0}

Unlearn = Callable[[Work, float, Trial], Callable[[Tensor], Tensor]]
"""Maps the work and a learning rate to what gives the logits of all points, seen and unseen."""


def changed(given: Work, rate: float, trial: Trial, loss: Callable[[Stack, Tensor, Tensor, int], Tensor]) -> Stack:
    """Adam on a loss of samples to forget and retained samples."""
    stack = Stack(len(given.trained.first), trial.generator(99))
    stack.load_state_dict(given.trained.state_dict())
    optimizer, draws = torch.optim.Adam(stack.parameters(), lr=rate), trial.generator(30)

    def value(step: int) -> Tensor:
        kept = given.retained[torch.randint(len(given.retained), (BATCH,), generator=draws)]
        return loss(stack, given.forget, kept, step)

    descend(optimizer, value, range(given.steps))
    return stack


def as_trained(given: Work, rate: float, trial: Trial) -> Stack:
    """Nothing is done."""
    return given.trained


def retrained_again(given: Work, rate: float, trial: Trial) -> Stack:
    """Retrained from other starts: what is left between two sets of models that mean the same."""
    masks = torch.ones(len(given.trained.first), len(given.x), dtype=torch.bool).index_fill(1, given.forget, False)
    steps = trial.pick(smoke=10, laptop=150, paper=600)
    return train(masks, given.x, given.y, steps, trial.generator(40))


def fine_tuning(given: Work, rate: float, trial: Trial) -> Stack:
    """Cross-entropy on retained samples."""
    return changed(
        given, rate, trial, lambda s, forget, kept, step: stacked_cross_entropy(s(given.x[kept]), given.y[kept])
    )


def ascent(given: Work, rate: float, trial: Trial) -> Stack:
    """Against the gradient of the loss on the forget set; a sixth of the steps, of which more only destroy."""

    def loss(stack: Stack, forget: Tensor, kept: Tensor, step: int) -> Tensor:
        value = stacked_cross_entropy(stack(given.x[forget]), given.y[forget])
        return -value if step < given.steps // 6 else 0 * value

    return changed(given, rate, trial, loss)


def scrub(given: Work, rate: float, trial: Trial) -> Stack:
    """Away from the trained model on the forget set, in turn with staying near it on retained samples."""
    teacher = frozen_copy(given.trained)

    def apart(stack: Stack, rows: Tensor) -> Tensor:
        own, other = (part(given.x[rows]).flatten(0, 1) for part in (stack, teacher))
        return tempered_kl(own, other, 4.0).sum() / len(rows)

    def loss(stack: Stack, forget: Tensor, kept: Tensor, step: int) -> Tensor:
        if step % 6 == 0 and step < 2 * given.steps // 3:
            return -apart(stack, forget)
        return 0.99 * stacked_cross_entropy(stack(given.x[kept]), given.y[kept]) + 0.001 * apart(stack, kept)

    return changed(given, rate, trial, loss)


def direct(given: Work, rate: float, trial: Trial) -> Callable[[Tensor], Tensor]:
    """The datamodel's own answer, of a model that is not there."""
    coef = attribution(trial)[:, :, None, :]
    return lambda x: predict_without(given.trained(x), coef, given.forget)


def _passes(given: Work) -> int:
    """Epochs that make about as many steps as the other methods take."""
    matched = round(sum(REPEATS.values()) * len(given.forget))
    return max(1, given.steps // -(-matched // BATCH))


def matching(given: Work, rate: float, trial: Trial) -> Stack:
    """Datamodel matching."""
    coef = attribution(trial)[:, : len(given.x), None, :]
    options: dict[str, Any] = {
        "epochs": _passes(given),
        "lr": rate,
        "batch_size": BATCH,
        "generator": trial.generator(30),
    }
    return datamodel_matching(given.trained, given.x, coef, given.forget, **{**REPEATS, **options})


def oracles(given: Work, rate: float, trial: Trial) -> Stack:
    """The same with the mean outputs of the retrained models themselves; not a method, for they are not there."""
    with torch.no_grad():
        means = given.retrained(given.x).mean(1, keepdim=True).expand(-1, len(given.trained.first), -1)
    options: dict[str, Any] = {
        "epochs": _passes(given),
        "lr": rate,
        "batch_size": BATCH,
        "generator": trial.generator(30),
    }
    return oracle_matching(given.trained, given.x, means, given.forget, **{**REPEATS, **options})
