"""Does SGD with learning rates scaled at initialisation train a transformer as well as AdamW?

A transformer of three blocks of width 64 on 4,000 images for 6 epochs, and one of two blocks on Python's own sources
for 500 steps, far smaller than the authors' ViT and GPT-2. In an earlier form of this study SGD-SaI chose the lowest of
five rates, which were then moved down; today's grid holds all of them.
"""

from __future__ import annotations

from typing import Any

import torch

from trimtab import optim
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.domain_generalisation import rotated
from trimtab.studies.tasks.image_classification import ten_thousand, transformer
from trimtab.studies.tasks.logistic_regression import breast_cancer, digits
from trimtab.studies.tasks.small_language_model import python_text
from trimtab.studies.tools.domain_training import DomainPlan, DomainTraining
from trimtab.studies.tools.full_batch import descent
from trimtab.studies.tools.training import Plan, Training

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def sgd_sai(parameters: Any, plan: Plan | DomainPlan) -> torch.optim.Optimizer:
    """SGD-SaI with its authors' momentum and weight decay."""
    return optim.SGDSaI(parameters, lr=plan.lr)


images = Training(optimizer=sgd_sai, search={"lr": (*RATES, 1e-1)})
# Rates are multiplied by a signal-to-noise ratio, which is ten and more for tensors of thousands of entries.
full_batch = descent(lambda parameters, lr: optim.SGDSaI(parameters, lr=lr, weight_decay=0.0))

study = Study(
    paper="sgd_sai",
    entrants={
        "SGD-SaI": {
            transformer: images,
            ten_thousand: images,
            python_text: Training(optimizer=sgd_sai, search={"lr": RATES[:5]}),
            breast_cancer: full_batch,
            digits: full_batch,
            rotated: DomainTraining(optimizer=sgd_sai, search={"lr": (1e-3, 3e-2)}),
        }
    },
    on=[transformer, ten_thousand, python_text, breast_cancer, digits, rotated],
    headline=Claim("SGD-SaI", beats="AdamW", on="test_accuracy", by=-0.01, at=transformer),
    claims=[
        Claim("SGD-SaI", beats="SGD", on="test_accuracy", by=0.01, at=transformer),
        Claim("SGD-SaI", beats="SGD", on="test_accuracy", at=ten_thousand),
        Claim("SGD-SaI", below="SGD", on="test_loss", at=python_text),
        Claim("SGD-SaI", below="AdamW", on="test_loss", by=-0.05, at=python_text),
    ],
)
