"""Does a random calibrated loss over-fit less than any fixed one?

The paper trains on 14 OpenML tables and 46 pairs of image classes with larger networks, for longer. Here an MLP of two
layers of 256 is trained by SGD with momentum and cosine annealing. EnsLoss and each fixed loss choose among six
learning rates; 'fixed loss of choice' chooses one of three losses and one of two rates, on the same held-out samples.
The exponential loss has its gradients clipped at 10, and the Box-Cox parameter is redrawn every ten epochs, as in the
authors' code. 'MLP' is the same network under cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import losses
from trimtab.losses.ensloss import signed_margins
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.tabular_classification import Learner, clothes, few_clothes, incomes, tumours, wrong_labels
from trimtab.studies.tools.clipped_sgd import ClippedSGD
from trimtab.studies.tools.training import Parameters, Plan


class MarginLoss(nn.Module):
    """The mean of a function of the margin `(2 y - 1) f`."""

    def __init__(self, of_margin: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of_margin = of_margin

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.of_margin(signed_margins(logits, targets)).mean()


def hinge(margin: Tensor) -> Tensor:
    """The loss of support vector machines."""
    return (1 - margin).relu()


def exponential(margin: Tensor) -> Tensor:
    """The loss of AdaBoost, which is trained with clipped gradients."""
    return (-margin).exp()


def logistic(margin: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.softplus(-margin)


FIXED = {"logistic": logistic, "hinge": hinge, "exponential": exponential}


def clipped(parameters: Parameters, plan: Plan) -> torch.optim.Optimizer:
    """SGD, with gradients of the exponential loss clipped at 10 as in the authors' code."""
    norm = 10.0 if plan.setting.get("loss", "exponential") == "exponential" else math.inf
    return ClippedSGD(parameters, lr=plan.lr, max_norm=norm)  # type: ignore[arg-type]


fixed_loss = Learner(
    loss=lambda plan: MarginLoss(FIXED[plan.setting["loss"]]),
    optimizer=clipped,
    search={"loss": tuple(FIXED), "lr": (0.01, 0.1)},
)
hard = [clothes, wrong_labels]
places = [clothes, wrong_labels, few_clothes, tumours, incomes]

study = Study(
    paper="ensloss",
    entrants={"EnsLoss": Learner(loss=lambda plan: losses.EnsLoss(generator=plan.generator()))},
    controls={
        "fixed loss of choice": fixed_loss,
        "hinge": dict.fromkeys(hard, Learner(loss=lambda plan: MarginLoss(hinge))),
        "exponential": dict.fromkeys(hard, Learner(loss=lambda plan: MarginLoss(exponential), optimizer=clipped)),
    },
    on=places,
    headline=Claim("EnsLoss", beats="fixed loss of choice", on="test_accuracy", by=0.002, at=clothes),
    claims=[
        *(
            Claim("EnsLoss", beats=other, on="test_accuracy", by=0.002, at=place)
            for place in hard
            for other in ("MLP", "hinge", "exponential")
        ),
        Claim("EnsLoss", beats="fixed loss of choice", on="test_accuracy", by=0.002, at=wrong_labels),
        Claim("EnsLoss", beats="logistic regression", on="test_accuracy", at=clothes),
        *(
            Claim("EnsLoss", beats="fixed loss of choice", on="test_accuracy", by=-0.005, at=place)
            for place in (few_clothes, tumours, incomes)
        ),
    ],
)
