"""Does SAF find flat minima without SAM's second pass, with clean and with wrong labels?"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from trimtab import optim
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.image_classification import ImageClassification
from trimtab.studies.training import Plan

clean = ImageClassification()
noisy = ImageClassification(noise=0.2)


def base(params: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """The optimizer of every arm."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def sam(params: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """SAM with its authors' radius."""
    return optim.SAM(base(params, plan), rho=0.05)


def start(plan: Plan) -> int:
    """The authors' epoch 5, or a quarter of a shorter training."""
    return min(5, max(1, plan.epochs // 4))


def saf(plan: Plan) -> nn.Module:
    """SAF with its authors' weight and temperature."""
    return optim.TrajectoryLoss(len(plan), plan.num_classes, start_epoch=start(plan), lag=min(3, start(plan)))


def mesa(model: nn.Module, plan: Plan) -> optim.MESA:
    """MESA, whose average reaches back over the share of the training that the authors' does: a fourteenth."""
    decay = max(0.5, 1 - 14 / (plan.epochs * plan.steps_per_epoch))
    return optim.MESA(model, decay=decay, start_epoch=start(plan))


study = Study(
    paper="saf",
    arms={
        "SGD": clean.train(optimizer=base),
        "SAM": clean.train(optimizer=sam),
        "SAF": clean.train(optimizer=base, loss=saf),
        "MESA": clean.train(optimizer=base, penalty=mesa),
        "SGD, noisy": noisy.train(optimizer=base),
        "SAM, noisy": noisy.train(optimizer=sam),
        "SAF, noisy": noisy.train(optimizer=base, loss=saf),
        "MESA, noisy": noisy.train(optimizer=base, penalty=mesa),
    },
    claims=[
        Claim("SAF", below="SGD", on="sharpness"),
        Claim("SAF", beats="SGD", on="test_accuracy"),
        Claim(
            "SAF",
            below="SGD",
            on="seconds_per_step",
            times=1 / 1.08,
            text="SAF: a step takes no more than 1.08 times SGD's",
        ),
        Claim("SAF", below="SAM", on="seconds_per_step", times=1.75),
        Claim("SAF, noisy", below="SGD, noisy", on="sharpness"),
        Claim("SAF, noisy", beats="SGD, noisy", on="test_accuracy", by=0.01),
        Claim("MESA", below="SGD", on="sharpness"),
    ],
    plot=["test_accuracy", "train_loss"],
    leaderboard=["SGD", "SAM", "SAF", "MESA"],
    notes=(
        "A small CNN on ten thousand images for 8 epochs, with clean labels and with 20 % of them drawn anew. Weight, "
        "temperature and radius are the authors'; the term starts after a quarter of the training and looks 2 epochs "
        "back. Accuracies are close at this scale. Step times are processor time on one thread."
    ),
)
