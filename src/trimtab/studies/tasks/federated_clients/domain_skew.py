"""Clients whose images look different: upright, turned, inverted or blurred."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.studies.engine.study import Metric, Result, Trial
from trimtab.studies.tasks.federated_images import Federated, FederatedImages, Federation, perceptron, train
from trimtab.studies.tools import shifts
from trimtab.studies.tools.training import predict


def as_they_are(x: Tensor) -> Tensor:
    """The images."""
    return x


def quarter_turn(x: Tensor) -> Tensor:
    """Turned by 90 degrees."""
    return x.rot90(1, (2, 3))


LOOKS: tuple[Callable[[Tensor], Tensor], ...] = (as_they_are, quarter_turn, shifts.invert, shifts.blur)


@dataclass(frozen=True)
class DomainSkew(FederatedImages):
    """The same federation, in which every fourth client has images of the same look.

    A look is the images as they are, turned by 90 degrees, inverted or blurred. The model is chosen and tested on
    images of all four, as many of each, and tested on each of them besides.
    """

    alpha: float = 0.5

    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("test accuracy, mean of the last 3 rounds (%)", percent=True),
        "worst_domain_accuracy": Metric("accuracy on the hardest look, after the last round (%)", percent=True),
        "megabytes": Metric("data sent by and to clients (MB)", best="min"),
        "gradients": Metric("mini-batch gradients", best="min"),
    }

    def federation(self, trial: Trial) -> Federation:
        """All samples of a run; held-out and test samples in each look, one look after the other."""
        plain = super().federation(trial)
        clients = [(LOOKS[i % len(LOOKS)](x), y) for i, (x, y) in enumerate(plain.clients)]
        held, test = (
            (torch.cat([look(x) for look in LOOKS]), y.repeat(len(LOOKS))) for x, y in (plain.held, plain.test)
        )
        return replace(plain, clients=clients, held=held, test=test)

    def run(self, trial: Trial, entrant: Federated) -> Result:
        federation = self.federation(trial)
        plan = self.plan(trial, federation)
        network = entrant.network or perceptron
        model = trial.seeded(lambda: network(plan)).to(trial.device)
        found = train(trial, entrant.algorithm(plan), model, plan, federation)
        if trial.searching:
            return found
        x, y = federation.test
        # `train` leaves the last model in the network; of clients' proportions of classes there is no say here.
        right = (predict(model, x).argmax(1) == y).float().view(len(LOOKS), -1).mean(1)
        kept = {name: value for name, value in found.metrics.items() if name in self.metrics}
        return replace(found, metrics={**kept, "worst_domain_accuracy": right.min().item()})


domain_skew = DomainSkew()
