"""The comp-sum family: is its bound right and tight, which member learns best, and does the smooth version defend?"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab import losses
from trimtab.studies.clipped_sgd import ClippedSGD
from trimtab.studies.study import Arm, Claim, Study
from trimtab.studies.tasks.adversarial_training import AdversarialTraining, pgd_training, trades
from trimtab.studies.tasks.consistency_bound import ConsistencyBound
from trimtab.studies.tasks.label_noise import LabelNoise


def loss_of_every_label(scores: Tensor, tau: float) -> Tensor:
    """The comp-sum loss at each label, shape (draws, classes)."""
    draws, classes = scores.shape
    each = losses.comp_sum_loss(
        scores.repeat_interleave(classes, 0), torch.arange(classes).repeat(draws), tau, reduction="none"
    )
    return each.view(draws, classes)


def bound(tau: float) -> Arm:
    """The bound of the member `tau`."""
    return ConsistencyBound().check(
        loss=lambda scores: loss_of_every_label(scores, tau),
        min_risk=lambda probs: losses.comp_sum_min_risk(probs, tau),
        transform=lambda beta, classes: losses.h_consistency_transform(beta, tau, classes),
    )


def member(task: LabelNoise, tau: float) -> Arm:
    """Training with the member `tau`; gradients are clipped, for below tau = 1 they have no bound."""
    return task.train(
        loss=lambda data: losses.CompSumLoss(tau=tau), optimizer=lambda parameters, data: ClippedSGD(parameters)
    )


clean = LabelNoise(dataset="fashion_mnist", rate=0.0)
noisy = LabelNoise(dataset="fashion_mnist", kind="symmetric", rate=0.4)
attacked = AdversarialTraining()

BOUND_TAUS = (0.0, 0.5, 1.0, 1.5, 2.0)

study = Study(
    paper="comp_sum",
    arms={
        **{f"bound, tau = {tau:g}": bound(tau) for tau in BOUND_TAUS},
        **{f"clean labels, tau = {tau:g}": member(clean, tau) for tau in (0.0, 1.0, 1.5, 2.0)},
        **{f"40 % noise, tau = {tau:g}": member(noisy, tau) for tau in (0.0, 1.0, 1.7, 2.0)},
        "PGD training": attacked.train(objective=lambda ball: pgd_training(ball)),
        "TRADES": attacked.train(objective=lambda ball: trades(ball)),
        "smooth adversarial comp-sum": attacked.train(
            objective=lambda ball: losses.SmoothAdversarialCompSumLoss(
                nu=0.5, eps=ball.eps, steps=ball.steps, bounds=ball.bounds, generator=ball.generator
            )
        ),
    },
    claims=[
        *(Claim(f"bound, tau = {tau:g}", at_most=0.0, on="violations") for tau in BOUND_TAUS),
        *(
            Claim(
                f"bound, tau = {tau:g}",
                at_least=0.95,
                on="tightness",
                text=f"tau = {tau:g}: the bound is reached to 95 % with 3, 10 and 100 classes",
            )
            for tau in BOUND_TAUS
        ),
        Claim("clean labels, tau = 1", beats="clean labels, tau = 0", on="final_accuracy"),
        Claim("clean labels, tau = 1", beats="clean labels, tau = 2", on="final_accuracy"),
        Claim("40 % noise, tau = 1.7", beats="40 % noise, tau = 0", on="final_accuracy"),
        Claim("40 % noise, tau = 1.7", beats="40 % noise, tau = 1", on="final_accuracy"),
        Claim("smooth adversarial comp-sum", beats="TRADES", on="robust_accuracy"),
        Claim("smooth adversarial comp-sum", beats="TRADES", on="test_accuracy"),
        Claim("smooth adversarial comp-sum", beats="PGD training", on="robust_accuracy"),
    ],
    plot=["test_accuracy"],
    leaderboard=[
        "PGD training",
        "TRADES",
        "smooth adversarial comp-sum",
        *(f"bound, tau = {tau:g}" for tau in BOUND_TAUS),
    ],
    notes=(
        "Tightness is the largest ratio of what the bound requires to the excess risk there is, at the number of "
        "classes where it is smallest; half of the draws are of two families that reach bounds of this kind. "
        "For 1 < tau < 2 no distribution found, by gradient ascent either, comes closer than (2 / n)^(tau - 1) with n "
        "classes, so that the bound is loose there for more than two. All members of the family share the learning "
        "rate, and gradient clipping at norm 1, without which tau = 0 diverges; tau = 1.7 is generalised "
        "cross-entropy with q = 0.7. The defences are compared on 8 x 8 digits. The weights of TRADES (beta "
        "of 1, 2, 4, 6, 10) and of the smooth loss (nu of 0.03, 0.1, 0.2, 0.5, 1, with tau = rho = 1) were chosen by "
        "the accuracy under attack on a quarter of the training images: 6, its authors' value, and 0.5. With nu = 1 "
        "the smooth term wins and the network becomes constant. The paper's networks and CIFAR-10 are out of reach of "
        "this budget."
    ),
)
