"""Classifiers that mix their training inputs, built from a trunk, and the way they are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import nets, optim
from trimtab.domain.environments import DomainBatch
from trimtab.optim.adamixup import mixup
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.domain_training import DomainBench
from trimtab.studies.tools.training import Workbench


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

    def __init__(self, parts: Parts, alpha: float) -> None:
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


class WholeInterval(nn.Module):
    """A policy that learns nothing: weights of pairs are uniform on [0, 1]."""

    folds = 2
    logits: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor([-torch.inf, -torch.inf, 0.0]))

    def forward(self, parts: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return self.logits.expand(parts.shape[1], 3)


Model = MixUpRule | optim.AdaMixUp
ModelFactory = Callable[[Parts], Model]


def mixup_rule(alpha: float, parts: Parts) -> Model:
    """MixUp with this parameter of its Beta distribution."""
    return MixUpRule(parts, alpha)


def adamixup(parts: Parts) -> Model:
    """AdaMixUp as released: the policy sees an average of the pair under random gates."""
    policy = optim.MixPolicy(parts.trunk(1), parts.feature_dim)
    return optim.AdaMixUp(parts.trunk(1), parts.feature_dim, parts.num_classes, policy)


def adamixup_of_pairs(parts: Parts) -> Model:
    """AdaMixUp whose policy sees the pair itself."""
    policy = optim.MixPolicy(parts.trunk(2), parts.feature_dim, gated=False)
    return optim.AdaMixUp(parts.trunk(1), parts.feature_dim, parts.num_classes, policy)


def no_policy(parts: Parts) -> Model:
    """AdaMixUp with all but its policy: uniform weights, real samples in the batch, and the discriminator."""
    return optim.AdaMixUp(parts.trunk(1), parts.feature_dim, parts.num_classes, WholeInterval())


class Mixing:
    """Trains a model that mixes for itself by Adam, as the training loop asks for."""

    def __init__(self, make: ModelFactory, bench: Workbench, parts: Parts | None = None) -> None:
        model = bench.trial.seeded(lambda: make(parts or _parts(bench))).to(bench.device)
        self.model = model
        adam = torch.optim.Adam(model.parameters(), lr=bench.plan.lr, weight_decay=bench.plan.weight_decay)
        self.optimizers = [adam]
        self.generator = bench.plan.generator(2)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.model.train()
        return descent_step(self.optimizers[0], self.model.loss(x, y, generator=self.generator)["total"])

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.eval()(x)
        return logits


def _parts(bench: Workbench) -> Parts:
    width, *pixels = bench.x.shape[1:]

    def network(side_by_side: int) -> nets.Classifier:
        if not pixels:  # rows of numbers
            return nets.mlp(side_by_side * width)
        return nets.small_cnn((side_by_side * width, *pixels))

    return Parts(lambda side_by_side: network(side_by_side).features, network(1).feature_dim, bench.plan.num_classes)


class MixingDomains:
    """The same on the samples of several domains, pooled, so that a pair may be of two of them.

    Args:
        make: makes a model of which no part sees two samples side by side.
        bench: data, plan and network.
    """

    def __init__(self, make: ModelFactory, bench: DomainBench) -> None:
        plan, width = bench.plan, bench.network().feature_dim
        parts = Parts(lambda side_by_side: bench.make_network().features, width, plan.num_classes)
        self.model = bench.trial.seeded(lambda: make(parts)).to(bench.trial.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=plan.lr, weight_decay=plan.weight_decay)
        self.generator = plan.generator(2)

    def step(self, batch: DomainBatch) -> Tensor:
        self.model.train()
        x, y = (torch.cat(held) for held in zip(*batch, strict=True))
        return descent_step(self.optimizer, self.model.loss(x, y, generator=self.generator)["total"])

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model.eval()(x)
        return logits
