"""Classifiers that mix their training inputs, and the loop that trains any of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.optim.adamixup import AdaMixUp, Region, mix, mixup
from trimtab.studies.study import Trial


@dataclass(frozen=True)
class Parts:
    """What a contestant builds its model from.

    Attributes:
        trunk: makes a feature extractor for this many samples side by side (1 for a classifier's).
        feature_dim: width of its output.
        num_classes: number of classes.
    """

    trunk: Callable[[int], nn.Module]
    feature_dim: int
    num_classes: int


class MixUpRule(nn.Module):
    """A classifier trained on MixUp's mixtures, or with `alpha=0` on the samples themselves."""

    def __init__(self, parts: Parts, alpha: float = 0.0) -> None:
        super().__init__()
        self.trunk = parts.trunk(1)
        self.head = nn.Linear(parts.feature_dim, parts.num_classes)
        self.num_classes = parts.num_classes
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(x))
        return logits

    def loss(self, x: Tensor, targets: Tensor, *, generator: torch.Generator) -> dict[str, Tensor]:
        if not self.alpha:
            return {"total": F.cross_entropy(self(x), targets)}
        mixed, soft = mixup(x, F.one_hot(targets, self.num_classes).to(x), self.alpha, generator=generator)
        return {"total": F.cross_entropy(self(mixed), soft)}


Rule = MixUpRule | AdaMixUp
RuleFactory = Callable[[Parts], Rule]


class WholeInterval(nn.Module):
    """A policy that learns nothing: weights of pairs are uniform on [0, 1]."""

    folds = 2
    logits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor([-torch.inf, -torch.inf, 0.0]))

    def forward(self, parts: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.logits.expand(parts.shape[1], 3)


@torch.no_grad()
def mixtures(rule: Rule, parts: Float[Tensor, "2 batch ..."], generator: torch.Generator) -> Float[Tensor, "batch ..."]:
    """What a contestant would make of these pairs in training."""
    if isinstance(rule, AdaMixUp):
        e = torch.rand(parts.shape[1], 1, generator=generator).to(parts)
        region = Region.from_logits(rule.policy(parts, generator=generator))
        return mix(parts, region.weights(torch.cat([e, 1 - e], 1)))
    if not rule.alpha:
        return parts[0]
    count, labels = parts.shape[1], torch.ones(2 * parts.shape[1], 1)
    partner = torch.arange(2 * count).roll(count)
    mixed, _ = mixup(parts.flatten(0, 1), labels, rule.alpha, partner=partner, generator=generator)
    return mixed[:count]


def make_rule(rule: RuleFactory | None, parts: Parts, trial: Trial) -> Rule:
    """The contestant's model, or the plain classifier, its weights decided by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        return (rule or MixUpRule)(parts).to(trial.device)


def fit_rule(
    rule: Rule,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    epochs: int,
    trial: Trial,
    lr: float = 1e-3,
    batch_size: int = 128,
    after_epoch: Callable[[int], None] | None = None,
) -> float:
    """Train in place by Adam with a cosine schedule, and return the seconds of a step.

    Args:
        rule: a module.
        x, y: the training set.
        epochs: passes over the data; the last batch of one is dropped where it is not full.
        trial: seed (the order of the samples, and what is mixed) and progress.
        lr: learning rate.
        batch_size: samples in a step; at most the size of the training set.
        after_epoch: called with the 0-based epoch, in eval mode.
    """
    batch_size = min(batch_size, len(y))
    steps = len(y) // batch_size
    optimizer = torch.optim.Adam(rule.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    order, mixing, seconds = trial.generator(1), trial.generator(2), 0.0
    clock = time.process_time if torch.device(trial.device).type == "cpu" else time.perf_counter
    for epoch in range(epochs):
        rule.train()
        started = clock()
        for index in torch.randperm(len(y), generator=order)[: steps * batch_size].view(steps, batch_size):
            optimizer.zero_grad()
            rule.loss(x[index], y[index], generator=mixing)["total"].backward()
            optimizer.step()
            schedule.step()
        seconds += clock() - started
        rule.eval()
        if after_epoch is not None:
            after_epoch(epoch)
        trial.report((epoch + 1) / epochs)
    return seconds / (epochs * steps)
