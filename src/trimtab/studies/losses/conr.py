"""Does a contrastive regulariser help a regression where its targets are rare?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.losses import ConRLoss
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.imbalanced_regression import (
    BIN,
    ImbalancedRegression,
    Objective,
    inverse_frequency,
    inverse_weights,
    l1,
)

angles = ImbalancedRegression()

# Of as many values for every arm: the powers of the inverse density, and the strengths of the contrastive terms.
POWERS, STRENGTHS = (0.25, 0.5, 1.0), (0.25, 1.0, 4.0)


def conr(optimizer: torch.optim.Optimizer, strength: float) -> Objective:
    """L1 with ConR; the knob is ConR's strength."""
    regulariser = ConRLoss(window=1.0)

    def objective(features: Tensor, preds: Tensor, targets: Tensor, density: Tensor) -> Tensor:
        term: Tensor = regulariser(features, targets, preds)
        return F.l1_loss(preds, targets) + strength * term

    return objective


def weighted_conr(optimizer: torch.optim.Optimizer, power: float) -> Objective:
    """Weighted L1 with ConR of the same weights and the authors' strength; the knob is the power, as without ConR."""
    regulariser = ConRLoss(window=1.0)

    def objective(features: Tensor, preds: Tensor, targets: Tensor, density: Tensor) -> Tensor:
        weights = inverse_weights(density, power)
        fit = (weights * (preds - targets).abs()).mean()
        term: Tensor = regulariser(features, targets, preds, weights)
        return fit + 4 * term

    return objective


def binned_contrast(optimizer: torch.optim.Optimizer, strength: float) -> Objective:
    """L1 with supervised contrastive learning, the bins of the labels as classes; the knob is its strength."""
    try:
        from pytorch_metric_learning.losses import SupConLoss
    except ImportError as error:
        raise ImportError(
            "the contrast on bins comes from pytorch-metric-learning: pip install 'trimtab[metric]'"
        ) from error

    contrast = SupConLoss(temperature=0.07)

    def objective(features: Tensor, preds: Tensor, targets: Tensor, density: Tensor) -> Tensor:
        term: Tensor = contrast(features, (targets / BIN).long())
        return F.l1_loss(preds, targets) + strength * term

    return objective


study = Study(
    paper="conr",
    arms={
        "L1": angles.train(l1),
        "inverse frequency": angles.train(inverse_frequency, POWERS),
        "SupCon on bins": angles.train(binned_contrast, STRENGTHS),
        "ConR": angles.train(conr, STRENGTHS),
        "inverse frequency + ConR": angles.train(weighted_conr, POWERS),
    },
    claims=[
        Claim(
            "ConR",
            below="L1",
            on="few_mae",
            times=1 / 0.97,
            text="ConR: error where samples are few is at least 3 % below L1's",
        ),
        Claim("ConR", below="L1", on="mae"),
        Claim("inverse frequency + ConR", below="inverse frequency", on="few_mae"),
        Claim("ConR", below="SupCon on bins", on="few_mae"),
    ],
    seeds={"laptop": 5},
    notes=(
        "The target is the angle by which a Fashion-MNIST image (of half the resolution) was turned; 2,000 training "
        "images have exponentially distributed angles (mean 20 degrees, cut off at 90), 2,000 test images evenly "
        "spread ones. A small CNN, AdamW, 24 epochs, two augmented views of each image in every arm. The learning "
        "rate is the best of three for L1, and every arm chooses its own setting among three, both on 1,000 evenly "
        "spread validation images by the error over the whole range: the weight decay (L1), the power of the inverse "
        "density (inverse frequency, with and without ConR), or the strength of the contrastive term, for which the "
        "authors use 4. ConR with weights has that strength. Window, temperature and push are the authors' for ages "
        "in years, here in degrees."
    ),
)
