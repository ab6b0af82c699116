"""Is AdaBelief as fast as Adam and as accurate as SGD, each at its best setting?

The authors train for hundreds of epochs; here it is 8 epochs on ten thousand images. AdaBelief chooses among the rates
and decays of AdamW; for convolutional networks its eps is 1e-8 without rectification, for transformers 1e-16 with it,
as in the authors' experiments.
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


def of_convolutions(parameters: Any, plan: Plan | DomainPlan) -> torch.optim.Optimizer:
    """The authors' constants for convolutional networks, with decoupled weight decay, as AdamW has it."""
    return optim.AdaBelief(parameters, lr=plan.lr, weight_decay=plan.weight_decay, eps=1e-8, rectify=False)


def of_transformers(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
    """The authors' constants for transformers; a weight decay of 0.01 unless the setting says otherwise."""
    return optim.AdaBelief(parameters, lr=plan.lr, weight_decay=float(plan.setting.get("weight_decay", 0.01)))


adaptive = {"lr": (3e-4, 1e-3, 3e-3, 1e-2), "weight_decay": (1e-2, 1e-1)}
full_batch = descent(lambda parameters, lr: optim.AdaBelief(parameters, lr=lr, rectify=False), scale=0.1)

study = Study(
    paper="adabelief",
    entrants={
        "AdaBelief": {
            ten_thousand: Training(optimizer=of_convolutions, search=adaptive),
            transformer: Training(optimizer=of_transformers, search=adaptive),
            python_text: Training(optimizer=of_transformers),
            breast_cancer: full_batch,
            digits: full_batch,
            rotated: DomainTraining(optimizer=of_convolutions),
        }
    },
    on=[ten_thousand, transformer, python_text, breast_cancer, digits, rotated],
    headline=Claim("AdaBelief", beats="SGD", on="test_accuracy", by=-0.003, at=ten_thousand),
    claims=[
        Claim("AdaBelief", below="SGD", on="first_epoch_loss", at=ten_thousand),
        Claim("AdaBelief", beats="Adam", on="test_accuracy", at=ten_thousand),
        Claim("AdaBelief", beats="AdamW", on="test_accuracy", at=ten_thousand),
        Claim("AdaBelief", beats="AdamW", on="test_accuracy", at=transformer),
        Claim("AdaBelief", below="AdamW", on="test_loss", at=python_text),
    ],
)
