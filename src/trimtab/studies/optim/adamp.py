"""Do SGDP and AdamP stop scale-invariant weights from growing, and is the network better for it?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trimtab import optim
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.image_classification import ImageClassification, OptimizerWithRate
from trimtab.studies.tasks.scale_invariance import ScaleInvariance
from trimtab.studies.training import OptimizerFactory, Plan

growth = ScaleInvariance(dataset="digits", epochs=20)
fashion = ImageClassification(dataset="fashion_mnist", epochs=6)
grid = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
adaptive_grid = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def sgd(params: Iterable[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum and weight decay."""
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=1e-4)


def sgdp(params: Iterable[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
    """The same with its radial part taken out."""
    return optim.SGDP(params, lr=lr, momentum=0.9, weight_decay=1e-4)


def adamw(weight_decay: float) -> OptimizerWithRate:
    """AdamW with a weight decay; with none it is Adam."""
    return lambda params, plan, lr: torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


def adamp(weight_decay: float) -> OptimizerWithRate:
    """The same with its radial part taken out."""
    return lambda params, plan, lr: optim.AdamP(params, lr=lr, weight_decay=weight_decay)


def momentum(params: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """SGD with momentum, no weight decay."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def projected_momentum(params: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """SGDP at the rate of SGD."""
    return optim.SGDP(params, lr=0.1, momentum=0.9)


adam: OptimizerFactory = lambda params, plan: torch.optim.Adam(params, lr=3e-3)
projected_adam: OptimizerFactory = lambda params, plan: optim.AdamP(params, lr=3e-3)

study = Study(
    paper="adamp",
    arms={
        "SGD, digits": growth.train(optimizer=momentum),
        "SGDP, digits": growth.train(optimizer=projected_momentum),
        "Adam, digits": growth.train(optimizer=adam),
        "AdamP, digits": growth.train(optimizer=projected_adam),
        "SGD": fashion.train(optimizer=sgd, lr=grid),
        "SGDP": fashion.train(optimizer=sgdp, lr=grid),
        "Adam": fashion.train(optimizer=adamw(0.0), lr=adaptive_grid),
        "AdamP, no decay": fashion.train(optimizer=adamp(0.0), lr=adaptive_grid),
        "AdamW": fashion.train(optimizer=adamw(1e-2), lr=adaptive_grid),
        "AdamP": fashion.train(optimizer=adamp(1e-2), lr=adaptive_grid),
    },
    claims=[
        Claim("SGDP, digits", at_most=1.05, on="norm_growth"),
        Claim("AdamP, digits", at_most=1.05, on="norm_growth"),
        Claim("SGDP, digits", below="SGD, digits", on="norm_growth", by=0.15),
        Claim("AdamP, digits", below="Adam, digits", on="norm_growth", by=0.05),
        Claim("SGDP, digits", beats="SGD, digits", on="effective_step"),
        Claim("AdamP, digits", beats="Adam, digits", on="effective_step"),
        Claim("SGDP, digits", beats="SGD, digits", on="test_accuracy", by=-0.003),
        Claim("AdamP, digits", beats="Adam, digits", on="test_accuracy", by=-0.003),
        Claim("SGDP", beats="SGD", on="test_accuracy"),
        Claim("AdamP, no decay", beats="Adam", on="test_accuracy"),
        Claim("AdamP", beats="AdamW", on="test_accuracy"),
    ],
    plot=["norm_growth", "effective_step"],
    leaderboard=["SGD, digits", "SGDP, digits", "Adam, digits", "AdamP, digits", "SGD", "SGDP", "AdamW", "AdamP"],
    notes=(
        "A batch-normalised MLP on digits for 20 epochs (180 steps), with equal learning rates within a pair and no "
        "weight decay, for the lengths of the first layer's weights; a small batch-normalised CNN on ten thousand "
        "Fashion-MNIST images for 6 epochs for the accuracy, where each optimizer's learning rate is the best of five "
        "on held-out training data, a tenth as large for the adaptive ones."
    ),
)
