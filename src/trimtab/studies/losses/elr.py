"""Does early-learning regularisation stop a network from memorising wrong labels?

ELR has the authors' CIFAR-10 values, weight 1 and momentum 0.9 for pair flips, 3 and 0.7 for the rest; ELR+ trains two
networks on mixed inputs, its average of weights reached after half of the training.

Where labels are wrong at random, cross-entropy that may choose a low rate and a strong decay hardly memorises them, and
there is little to prevent; where wrong labels look right (the instance variant) it does, and ELR is far ahead.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab import losses
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.domain_adaptation import needs_target, source_free
from trimtab.studies.tasks.image_classification import ten_thousand
from trimtab.studies.tasks.label_noise import human, instance, pair_flip, symmetric
from trimtab.studies.tools.adapting import Adaptation, Lesson, Predictor, in_eval, source_only
from trimtab.studies.tools.descent import descent_step
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


def on_own_labels(lesson: Lesson) -> Predictor:
    """Trains on what the source network says of the target's images at first, as on labels of which some are wrong.

    Yi et al., "When Source-Free Domain Adaptation Meets Learning with Noisy Labels", ICLR 2023, arXiv 2302.01381, add
    ELR to methods that label the target anew; here the labels stay.
    """
    network, x = lesson.network.requires_grad_(True), lesson.target
    assert x is not None
    labels = source_only(lesson)(x).argmax(1)
    criterion = losses.ELR(len(x), lesson.num_classes).to(x.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=lesson.lr)
    for batch, index in lesson.target_batches():
        index = index.to(x.device)
        descent_step(optimizer, criterion(network.train()(batch), labels[index], index))
    return in_eval(network)


elr = Training(loss=lambda plan: losses.ELR(len(plan), plan.num_classes))
elr_of_pair_flips = Training(loss=lambda plan: losses.ELR(len(plan), plan.num_classes, lam=1.0, beta=0.9))
noises = [symmetric, pair_flip, instance, human]

study = Study(
    paper="elr",
    entrants={
        "ELR": {
            **dict.fromkeys([*noises, ten_thousand], elr),
            pair_flip: elr_of_pair_flips,
            source_free: Adaptation(adapt=on_own_labels, unfit=needs_target),
        },
        "ELR+": dict.fromkeys(noises[:2], Training(rule=elr_plus)),
    },
    on=[*noises, ten_thousand, source_free],
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
