"""A cluster of digits is to be forgotten by networks: how near methods come to networks that never saw it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.studies.engine.study import Experiment, Metric, Result, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.network_stack import stacked_cross_entropy
from trimtab.studies.unlearning.datamodel_matching.methods import (
    Unlearn,
    as_trained,
    ascent,
    direct,
    fine_tuning,
    matching,
    oracles,
    retrained_again,
    scrub,
)
from trimtab.studies.unlearning.datamodel_matching.networks import Stack, Work, work
from trimtab.unlearning import klom, margins, membership_auc, relearning_steps

_RATES = (3e-4, 1e-3, 5e-3)


@torch.no_grad()
def judged(given: Work, answer: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Divergences of margins from retrained models', and accuracies."""
    points, truth = torch.cat([given.x, given.unseen]), torch.cat([given.y, given.unseen_y])
    logits, wanted = answer(points), given.retrained(points)
    models = truth[:, None].expand(logits.shape[:2])
    apart = klom(margins(logits, models).T, margins(wanted, models).T)
    right = (logits.argmax(-1) == models).double().mean(1)
    unseen = torch.arange(len(given.x), len(points))
    sets = {"forget": given.forget, "retain": given.retained, "validation": unseen}
    found = {f"klom_{name}": float(apart[rows].mean()) for name, rows in sets.items()}
    # What a member's loss betrays, of unlearned models and of retrained ones.
    losses = [F.cross_entropy(z.transpose(1, 2), models, reduction="none").mean(1) for z in (logits, wanted)]
    betrayed = [membership_auc(loss[given.forget], loss[unseen]) for loss in losses]
    return {
        "klom": sum(found.values()) / 3,
        **found,
        "klom_tail": float(apart[given.forget].quantile(0.95)),
        **{f"accuracy_{name}": float(right[rows].mean()) for name, rows in sets.items()},
        "membership": abs(betrayed[0] - betrayed[1]),
    }


def relearning(given: Work, stack: Stack) -> int:
    """Steps of training on what was forgotten, until its loss is what it was before."""
    stack = copy.deepcopy(stack).requires_grad_(True)
    x, y = given.x[given.forget], given.y[given.forget]
    wanted = stacked_cross_entropy(given.trained(x), y).detach()
    optimizer = torch.optim.Adam(stack.parameters(), lr=1e-3)

    def loss() -> Tensor:
        return stacked_cross_entropy(stack(x), y)

    return relearning_steps(lambda: descent_step(optimizer, loss()), lambda: bool(loss() <= wanted), limit=given.steps)


def unlearn(trial: Trial, *, by: Unlearn, rates: tuple[float, ...] = _RATES) -> Result:
    """A run: the rate that does best on another set to forget, whose retrained models are known; then the set."""
    tuning = work(trial, 5) if len(rates) > 1 else None
    best = rates[0] if tuning is None else min(rates, key=lambda r: judged(tuning, by(tuning, r, trial))["klom"])
    given = work(trial, 0)
    answer = by(given, best, trial)
    found = judged(given, answer)
    # DM-direct leaves no network that could be trained.
    return Result({**found, "relearning": relearning(given, answer)} if isinstance(answer, Stack) else found)


digits = Experiment(
    "forgetting a cluster of digits",
    {
        "datamodel matching": partial(unlearn, by=matching),
        "DM-direct": partial(unlearn, by=direct, rates=(0.0,)),
        "oracle matching": partial(unlearn, by=oracles),
        "SCRUB": partial(unlearn, by=scrub),
        "gradient ascent": partial(unlearn, by=ascent),
        "fine-tuning on retained": partial(unlearn, by=fine_tuning),
        "as trained": partial(unlearn, by=as_trained, rates=(0.0,)),
        "retrained again": partial(unlearn, by=retrained_again, rates=(0.0,)),
    },
    {
        "klom": Metric("KL divergence of margins, mean of the three sets (nats)", best="min"),
        "klom_forget": Metric("KL divergence of margins, forget set (nats)", best="min"),
        "klom_retain": Metric("KL divergence of margins, retained set (nats)", best="min"),
        "klom_validation": Metric("KL divergence of margins, unseen samples (nats)", best="min"),
        "klom_tail": Metric("KL divergence of margins, 95th percentile of the forget set (nats)", best="min"),
        "accuracy_forget": Metric("accuracy on the forget set (%)", best=None, percent=True),
        "accuracy_retain": Metric("accuracy on retained samples (%)", percent=True),
        "accuracy_validation": Metric("accuracy on unseen samples (%)", percent=True),
        "membership": Metric("membership AUC, distance to the retrained models'", best="min"),
        "relearning": Metric("steps until the forget set's loss is what it was before", best=None),
    },
    reads=("digits",),
    cost=3.0,
)
