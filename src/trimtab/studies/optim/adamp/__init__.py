"""Do SGDP and AdamP, which keep scale-invariant weights from growing, make a better network?

AdamP and SGDP choose among the rates and decays of AdamW and SGD. The effective step is measured at equal, constant
rates without weight decay, on digits for 20 epochs of a batch-normalised MLP; SGD at twice the rate has larger steps
without a projection. That projected steps lengthen scale-invariant weights by no more than their own length is a
theorem, and is tested.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab import optim
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.optim.adamp.effective_steps import effective_steps
from trimtab.studies.tasks.domain_generalisation import rotated
from trimtab.studies.tasks.image_classification import few_images, ten_thousand
from trimtab.studies.tasks.logistic_regression import digits
from trimtab.studies.tasks.small_language_model import python_text
from trimtab.studies.tools.domain_training import DomainPlan, DomainTraining
from trimtab.studies.tools.full_batch import descent
from trimtab.studies.tools.training import Plan, Training


def adamp(parameters: Any, plan: Plan | DomainPlan) -> torch.optim.Optimizer:
    """AdamP; a weight decay of 0.01, as AdamW has it, unless the setting says otherwise."""
    return optim.AdamP(parameters, lr=plan.lr, weight_decay=float(plan.setting.get("weight_decay", 0.01)))


def sgdp(parameters: Any, plan: Plan | DomainPlan) -> torch.optim.Optimizer:
    """SGDP with the momentum of SGD."""
    return optim.SGDP(parameters, lr=plan.lr, momentum=0.9, weight_decay=plan.weight_decay)


images = Training(optimizer=adamp, search={"lr": (3e-4, 1e-3, 3e-3, 1e-2), "weight_decay": (1e-2, 1e-1)})

study = Study(
    paper="adamp",
    entrants={
        "AdamP": {
            ten_thousand: images,
            few_images: images,
            python_text: Training(optimizer=adamp),
            digits: descent(lambda parameters, lr: optim.AdamP(parameters, lr=lr), scale=0.1),
            rotated: DomainTraining(optimizer=adamp),
        },
        "SGDP": {
            ten_thousand: Training(optimizer=sgdp),
            python_text: Training(optimizer=sgdp, search={"lr": (0.01, 0.03, 0.1, 0.3, 1.0)}),
            digits: descent(lambda parameters, lr: optim.SGDP(parameters, lr=lr, momentum=0.9), scale=0.1),
            rotated: DomainTraining(optimizer=sgdp, search={"lr": (0.01, 0.1), "weight_decay": (1e-4, 1e-3)}),
        },
    },
    on=[ten_thousand, few_images, python_text, digits, rotated],
    experiments=[effective_steps],
    headline=Claim("AdamP", beats="AdamW", on="test_accuracy", at=ten_thousand),
    claims=[
        Claim("SGDP", beats="SGD", on="test_accuracy", at=ten_thousand),
        Claim("AdamP", beats="AdamW", on="test_accuracy", at=few_images),
        Claim("AdamP", below="AdamW", on="test_loss", by=-0.02, at=python_text),
        Claim("SGDP", beats="SGD", on="effective_step", times=1.1, at=effective_steps),
        Claim("AdamP", beats="Adam", on="effective_step", times=1.1, at=effective_steps),
        Claim("SGDP", beats="SGD", on="test_accuracy", at=effective_steps),
        Claim("SGDP", beats="SGD, twice the rate", on="test_accuracy", at=effective_steps),
    ],
)
