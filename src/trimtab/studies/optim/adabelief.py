"""Is AdaBelief as fast as Adam and as accurate as SGD, each at its best learning rate?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trimtab import optim
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.image_classification import ImageClassification
from trimtab.studies.tasks.small_language_model import SmallLanguageModel
from trimtab.studies.training import Plan

fashion = ImageClassification(dataset="fashion_mnist", epochs=6)
digits = ImageClassification(dataset="digits", net="mlp", epochs=20)
text = SmallLanguageModel()
grid = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
adaptive_grid = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def sgd(params: Iterable[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def adam(params: Iterable[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(params, lr=lr)


def adamw(params: Iterable[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay."""
    return torch.optim.AdamW(params, lr=lr)


def adabelief(params: Iterable[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
    """The authors' setting for convolutional networks but for the weight decay, which Adam and SGD lack too."""
    return optim.AdaBelief(params, lr=lr, eps=1e-8, rectify=False)


def adabelief_for_transformers(params: Iterable[nn.Parameter], plan: Plan, lr: float) -> torch.optim.Optimizer:
    """The authors' setting for transformers, with AdamW's weight decay, which is theirs too."""
    return optim.AdaBelief(params, lr=lr, eps=1e-16, weight_decay=0.01)


study = Study(
    paper="adabelief",
    arms={
        "SGD": fashion.train(optimizer=sgd, lr=grid),
        "Adam": fashion.train(optimizer=adam, lr=adaptive_grid),
        "AdamW": fashion.train(optimizer=adamw, lr=adaptive_grid),
        "AdaBelief": fashion.train(optimizer=adabelief, lr=adaptive_grid),
        "SGD, digits": digits.train(optimizer=sgd, lr=grid),
        "Adam, digits": digits.train(optimizer=adam, lr=adaptive_grid),
        "AdamW, digits": digits.train(optimizer=adamw, lr=adaptive_grid),
        "AdaBelief, digits": digits.train(optimizer=adabelief, lr=adaptive_grid),
        "AdamW, text": text.train(optimizer=adamw, lr=adaptive_grid[:5]),
        "AdaBelief, text": text.train(optimizer=adabelief_for_transformers, lr=adaptive_grid[:5]),
    },
    claims=[
        Claim("AdaBelief", beats="SGD", on="test_accuracy", by=-0.003),
        Claim("AdaBelief", beats="Adam", on="test_accuracy", by=-0.003),
        Claim("AdaBelief", beats="AdamW", on="test_accuracy", by=-0.003),
        Claim("AdaBelief", below="SGD", on="first_epoch_loss"),
        Claim("AdaBelief, digits", beats="SGD, digits", on="test_accuracy", by=-0.003),
        Claim("AdaBelief, digits", beats="Adam, digits", on="test_accuracy", by=-0.003),
        Claim("AdaBelief, digits", beats="AdamW, digits", on="test_accuracy", by=-0.003),
        Claim("AdaBelief, text", below="AdamW, text", on="test_loss", by=-0.02),
    ],
    seeds={"laptop": 5},
    plot=["test_accuracy", "train_loss", "test_loss by steps"],
    leaderboard=["SGD", "Adam", "AdamW", "AdaBelief"],
    notes=(
        "A small CNN on ten thousand Fashion-MNIST images for 6 epochs, an MLP on digits for 20, and a transformer on "
        "200,000 characters of Python source for 4. Each optimizer's learning rate is the best of six (five on text) "
        "on held-out training data, a tenth as large for the adaptive ones."
    ),
)
