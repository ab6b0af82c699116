"""DR-Tune: does a head that must also sort pre-trained features make fine-tuning on few samples more accurate?

The paper fine-tunes ResNets and ViTs of self-supervised pre-training on eight image sets; here an MLP goes from upright
clothes to 400 turned ones, with a queue of half as many samples and a new rotation on every tenth step. The optimizer
and its search are those of full fine-tuning, with one rate for encoder and head. L2-SP, which holds the weights
themselves near their start, is the kind of regulariser that the paper sets itself against.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.finetune import DRTune
from trimtab.nets import Classifier
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.fine_tuning import far_turned_clothes, undecayed
from trimtab.studies.tools import baselines
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.training import Plan, Supervised, Training, Workbench


class Regularised(Supervised):
    """A queue of half the samples, filled by the pre-trained encoder before the first step."""

    def __init__(self, bench: Workbench, calibrate: bool = True) -> None:
        network = cast(Classifier, bench.network())
        super().__init__(bench, network)
        size = len(bench.y) // 2
        self.module = DRTune(network.features, network.head, size, calibrate=calibrate)
        order = torch.randperm(len(bench.y), generator=bench.plan.generator(3))[:size].to(bench.x.device)
        self.module.warmup([(bench.x[order], bench.y[order])])

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.module.train()
        found = self.module.loss(x, y)
        descent_step(self.optimizer, found["total"])
        return found["task"]


def without_calibration(bench: Workbench) -> Regularised:
    """Stored features as they are."""
    return Regularised(bench, calibrate=False)


class L2SP:
    """Half the squared distance of the encoder's weights from where they began, with the setting's weight."""

    def __init__(self, network: nn.Module, plan: Plan) -> None:
        self.weights = list(cast(Classifier, network).features.parameters())
        self.start = [p.detach().clone() for p in self.weights]
        self.weight = float(plan.setting["weight"])

    def __call__(self, logits: Any, x: Any, index: Any) -> Tensor:
        distances = [(p - start).square().sum() for p, start in zip(self.weights, self.start, strict=True)]
        return 0.5 * self.weight * torch.stack(distances).sum()


tuned = partial(Training, optimizer=baselines.adamw, search={"lr": (1e-3, 3e-3), "weight_decay": (0.0, 0.01, 0.1, 1.0)})

study = Study(
    paper="dr_tune",
    entrants={"DR-Tune": tuned(rule=Regularised)},
    controls={
        "DR-Tune without calibration": tuned(rule=without_calibration),
        "L2-SP": Training(
            penalty=L2SP, optimizer=undecayed, search={"lr": (1e-3, 3e-3), "weight": (0.001, 0.01, 0.1, 1.0)}
        ),
    },
    on=[far_turned_clothes],
    headline=Claim("DR-Tune", beats="full fine-tuning", on="target_accuracy", by=0.01),
    claims=[
        Claim("DR-Tune", beats="DR-Tune without calibration", on="target_accuracy"),
        Claim("DR-Tune without calibration", beats="full fine-tuning", on="target_accuracy"),
        Claim("DR-Tune", beats="L2-SP", on="target_accuracy"),
        Claim("DR-Tune", beats="linear probe", on="target_accuracy"),
        Claim("DR-Tune", beats="R3F", on="target_accuracy"),
        Claim("DR-Tune", beats="full fine-tuning", on="retention"),
        Claim("DR-Tune", beats="full fine-tuning", on="ood_accuracy"),
    ],
)
