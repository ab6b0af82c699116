"""Do ordered and cut features, alone and with Co-teaching, keep wrong labels out?

Cross-entropy may choose a weight decay ten times as strong, nested dropout its width instead: in an earlier study a
searched weight decay did alone what nested dropout is for. Pairs of networks vote and cost twice as much; nested
Co-teaching has two thirds of the epochs alone, and then as many together as the others have in all. The paper takes the
networks of its second stage from their best epoch on clean validation images; here all are taken as they end, and no
clean label is seen before the test.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from trimtab import losses
from trimtab.nets import Classifier
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.image_classification import ten_thousand
from trimtab.studies.tasks.label_noise import pair_flip, symmetric
from trimtab.studies.tools import baselines
from trimtab.studies.tools.training import Supervised, Training, Workbench, fit, predict


class Cut(NamedTuple):
    """A network whose feature layer ends in nested dropout, and its parts."""

    network: Classifier
    trunk: nn.Module
    layer: losses.NestedDropout


def nested_network(bench: Workbench, which: int = 0) -> Cut:
    """A new network with nested dropout in front of its head."""
    network = bench.network(which)
    assert isinstance(network, Classifier)
    sigma, generator = float(bench.plan.setting["sigma"]), bench.plan.generator(10 + which)
    trunk, layer = network.features, losses.NestedDropout(network.feature_dim, sigma, generator=generator)
    network.features = nn.Sequential(trunk, layer.to(bench.device))
    return Cut(network, trunk, layer)


def choose_length(bench: Workbench, cuts: list[Cut]) -> None:
    """Cut the networks, which vote, at the length where they do best on the held-out images."""
    features = [predict(cut.trunk.eval(), bench.x_held) for cut in cuts]
    if not all(bool(held.isfinite().all()) for held in features):
        return  # a training that has diverged, as its accuracy tells
    heads = [cut.network.head for cut in cuts]
    length = losses.select_truncation(losses.truncated_accuracy(features, heads, bench.y_held))
    for cut in cuts:
        cut.layer.set_truncation(length)


class Nested(Supervised):
    """Plain training of a network with nested dropout, whose length is chosen anew after every epoch."""

    def __init__(self, bench: Workbench, which: int = 0) -> None:
        self.cut = nested_network(bench, which)
        self.bench = bench
        super().__init__(bench, self.cut.network)

    def after_epoch(self) -> None:
        choose_length(self.bench, [self.cut])


class NestedTaught(baselines.Taught):
    """The second stage: trained networks with nested dropout, which teach each other at a small learning rate."""

    def __init__(self, bench: Workbench) -> None:
        self.bench, plan = bench, bench.plan
        first = bench.with_plan(epochs=max(1, 2 * plan.epochs // 3))
        trained = [Nested(first, which) for which in range(2)]
        for rule in trained:
            fit(first, rule)
        self.cuts = [rule.cut for rule in trained]
        choose_length(bench, self.cuts)
        networks = [cut.network for cut in self.cuts]
        made = [torch.optim.SGD(network.parameters(), lr=plan.lr / 10, momentum=0.9) for network in networks]
        super().__init__(losses.NestedCoTeaching(networks, made, forget_rate=float(plan.setting["forget_rate"])))

    def after_epoch(self) -> None:
        choose_length(self.bench, self.cuts)


rates = {"lr": (0.01, 0.05, 0.2), "weight_decay": (5e-4,)}
study = Study(
    paper="nested_dropout",
    entrants={
        "nested dropout": {
            ten_thousand: Training(rule=Nested, search={**rates, "lr": (0.01, 0.03, 0.1, 0.3), "sigma": (10.0, 30.0)}),
            **dict.fromkeys((symmetric, pair_flip), Training(rule=Nested, search={**rates, "sigma": (10.0, 30.0)})),
        },
        "nested Co-teaching": dict.fromkeys(
            (symmetric, pair_flip),
            Training(
                rule=NestedTaught, search={**rates, "lr": (0.05,), "sigma": (10.0, 30.0), "forget_rate": (0.2, 0.4)}
            ),
        ),
    },
    on=[symmetric, pair_flip, ten_thousand],
    headline=Claim("nested dropout", beats="cross-entropy", on="final_accuracy", by=0.02, at=symmetric),
    claims=[
        Claim("nested dropout", beats="dropout", on="final_accuracy", at=symmetric),
        Claim("nested Co-teaching", beats="Co-teaching", on="final_accuracy", at=symmetric),
        Claim("nested Co-teaching", beats="nested dropout", on="final_accuracy", at=symmetric),
        Claim("nested dropout", beats="cross-entropy", on="final_accuracy", by=0.02, at=pair_flip),
        Claim("nested Co-teaching", beats="Co-teaching", on="final_accuracy", at=pair_flip),
    ],
)
