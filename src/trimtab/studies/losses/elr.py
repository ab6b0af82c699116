"""Does early-learning regularisation stop a network from memorising wrong labels?

ELR has the authors' CIFAR-10 values, weight 1 and momentum 0.9 for pair flips, 3 and 0.7 for the rest; ELR+ trains two
networks on mixed inputs, its average of weights reached after half of the training.
"""

from __future__ import annotations

from typing import Any

from trimtab import losses
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.image_classification import ten_thousand
from trimtab.studies.tasks.label_noise import human, instance, pair_flip, symmetric
from trimtab.studies.tools.training import Rule, Training, Workbench


class TwoNetworks:
    """Trains by ELR+, as the training loop asks for."""

    def __init__(self, bench: Workbench) -> None:
        networks = [bench.network(which) for which in range(2)]
        self.optimizers = [bench.make_optimizer(network.parameters()) for network in networks]
        plan = bench.plan
        steps = plan.epochs * plan.steps_per_epoch
        self.rule = losses.ELRPlus(
            networks,
            self.optimizers,
            len(plan),
            plan.num_classes,
            # The authors' 40,000 steps are about half of their training.
            ema_rampup=steps // 2,
            generator=plan.generator(),
        )
        self.predict = self.rule.predict

    def step(self, x: Any, y: Any, index: Any) -> Any:
        return self.rule.step(x, y, index)["loss_0"]


def elr_plus(bench: Workbench) -> Rule:
    """ELR+ with its authors' weights."""
    return TwoNetworks(bench)


elr = Training(loss=lambda plan: losses.ELR(len(plan), plan.num_classes))
elr_of_pair_flips = Training(loss=lambda plan: losses.ELR(len(plan), plan.num_classes, lam=1.0, beta=0.9))
noises = [symmetric, pair_flip, instance, human]

study = Study(
    paper="elr",
    entrants={
        "ELR": {**dict.fromkeys([*noises, ten_thousand], elr), pair_flip: elr_of_pair_flips},
        "ELR+": dict.fromkeys(noises[:2], Training(rule=elr_plus)),
    },
    on=[*noises, ten_thousand],
    headline=Claim("ELR", beats="cross-entropy", on="final_accuracy", by=0.05, at=symmetric),
    claims=[
        Claim("ELR", beats="GCE", on="final_accuracy", at=symmetric),
        Claim("ELR", below="cross-entropy", on="memorised", by=0.20, at=symmetric),
        Claim("ELR", beats="cross-entropy", on="final_accuracy", by=0.05, at=pair_flip),
        Claim("ELR", beats="cross-entropy", on="final_accuracy", by=0.05, at=instance),
        Claim("ELR", beats="cross-entropy", on="final_accuracy", by=0.05, at=human),
        Claim("ELR+", beats="MixUp", on="final_accuracy", at=symmetric),
    ],
)
