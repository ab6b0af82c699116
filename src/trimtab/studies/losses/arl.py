"""Does it help a network to rely on two views in inverse proportion to their variance?"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.losses import AsymmetricLearning
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.multimodal import Multimodal, Objective, TwoViewNet, Views, joint, ogm_ge, unimodal_losses

copies = Multimodal(dataset="mnist", views="copies", noise=(0.0, 1.5))
halves = Multimodal(dataset="fashion_mnist", views="halves", noise=(0.1, 0.5))

# Of as many values for every arm: the strength of OGM-GE, and the weight of the unimodal losses.
ALPHAS, GAMMAS = (0.1, 0.8), (1.0, 4.0)


def arl(model: TwoViewNet, optimizer: torch.optim.Optimizer, gamma: float, generator: torch.Generator) -> Objective:
    """ARL; the knob is the weight of its unimodal losses."""
    criterion = AsymmetricLearning(gamma=gamma)

    def objective(views: Views, y: Tensor, progress: float) -> None:
        criterion.set_epoch(int(100 * progress))  # the authors train for 100 epochs
        logits, alone = model.fusion(criterion.modulate(model.features(views), model.fusion))
        criterion(logits, alone, y).backward()

    return objective


study = Study(
    paper="arl",
    arms={
        "joint": copies.train(joint),
        "OGM-GE": copies.train(ogm_ge, ALPHAS),
        "joint + unimodal losses": copies.train(unimodal_losses, GAMMAS),
        "ARL": copies.train(arl, GAMMAS),
        "joint, halves": halves.train(joint),
        "OGM-GE, halves": halves.train(ogm_ge, ALPHAS),
        "joint + unimodal losses, halves": halves.train(unimodal_losses, GAMMAS),
        "ARL, halves": halves.train(arl, GAMMAS),
    },
    claims=[
        Claim("ARL", beats="joint", on="accuracy", by=0.005),
        Claim("joint + unimodal losses", beats="joint", on="accuracy", by=0.0025),
        Claim("ARL", beats="joint + unimodal losses", on="accuracy"),
        Claim("ARL", beats="OGM-GE", on="accuracy"),
        Claim("ARL", below="joint + unimodal losses", on="imbalance"),
        Claim("ARL, halves", beats="joint, halves", on="accuracy", by=0.005),
        Claim("ARL, halves", beats="joint + unimodal losses, halves", on="accuracy"),
        Claim("ARL, halves", beats="OGM-GE, halves", on="accuracy"),
    ],
    seeds={"laptop": 5},
    leaderboard=["joint", "OGM-GE", "joint + unimodal losses", "ARL"],
    notes=(
        "2,000 training images. MNIST is seen twice, once clean and once with noise of deviation 1.5; of Fashion-MNIST "
        "one view has the left half with noise of 0.1, the other the right half with 0.5. The encoders are MLPs "
        "(64-32) under one linear head, trained for 16 epochs by SGD with momentum. Every arm chooses on 1,000 "
        "held-out images among three learning rates and two values of its own: weight decay (joint), alpha (OGM-GE), "
        "or the weight of the unimodal losses, 1 or the authors' 4. ARL has the authors' temperature of 8, and a "
        "warm-up of 5 % of the epochs as theirs. OGM-GE modulates in the first half of training, as in its release. "
        "The variance of a view is judged by the entropy of its predictions, as in the paper; imbalance is the "
        "distance between the logarithms of the dependence ratio and the inverse entropy ratio on the test images."
    ),
)
