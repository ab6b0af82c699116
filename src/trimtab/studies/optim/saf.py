"""Does SAF reach SAM's accuracy and flatness without SAM's second pass?

The weight of the term is one of the authors' two (0.3, 0.8), their temperature is 5; it starts after a quarter of the
training and looks back equally far, at most three epochs. SAM chooses its radius from 0.05 and 0.2. Step times are
processor time on one thread.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab import optim
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.image_classification import few_images, ten_thousand, wrong_labels
from trimtab.studies.tasks.label_noise import symmetric
from trimtab.studies.tools.training import Plan, Training

rates = {"lr": (0.01, 0.03, 0.1, 0.3), "weight_decay": (5e-4,), "lam": (0.3, 0.8)}
three_rates = {**rates, "lr": (0.01, 0.05, 0.2)}


def start(plan: Plan) -> int:
    """The authors' epoch 5, or a quarter of a shorter training."""
    return min(5, max(1, plan.epochs // 4))


class Trajectory:
    """SAF's term of the loss, as the training loop asks for."""

    def __init__(self, network: nn.Module, plan: Plan) -> None:
        lag = min(3, start(plan))
        device = next(network.parameters()).device
        self.term = optim.TrajectoryLoss(
            len(plan), plan.num_classes, lam=float(plan.setting["lam"]), start_epoch=start(plan), lag=lag
        ).to(device)
        self.set_epoch = self.term.set_epoch

    def __call__(self, logits: Tensor, x: Any, index: Tensor) -> Tensor:
        return self.term.penalty(logits, index)


def mesa(network: nn.Module, plan: Plan) -> optim.MESA:
    """MESA, whose average reaches back over the share of the training that the authors' does: a fourteenth."""
    decay = max(0.5, 1 - 14 / (plan.epochs * plan.steps_per_epoch))
    return optim.MESA(network, lam=float(plan.setting["lam"]), decay=decay, start_epoch=start(plan))


images = (ten_thousand, few_images, wrong_labels)
study = Study(
    paper="saf",
    entrants={
        "SAF": {
            **dict.fromkeys(images, Training(penalty=Trajectory, search=rates)),
            symmetric: Training(penalty=Trajectory, search=three_rates),
        },
        "MESA": {
            **dict.fromkeys(images, Training(penalty=mesa, search=rates)),
            symmetric: Training(penalty=mesa, search=three_rates),
        },
    },
    on=[*images, symmetric],
    headline=Claim("SAF", beats="SAM", on="test_accuracy", by=-0.002, at=ten_thousand),
    claims=[
        Claim("SAF", below="SAM", on="sharpness", at=ten_thousand),
        Claim("SAF", below="SGD", on="sharpness", at=ten_thousand),
        Claim("SAF", below="SAM", on="seconds_per_step", times=1.75, at=ten_thousand),
        Claim("SAF", beats="SGD", on="test_accuracy", by=0.01, at=wrong_labels),
        Claim("SAF", beats="SAM", on="test_accuracy", at=wrong_labels),
        Claim("MESA", below="SGD", on="sharpness", at=ten_thousand),
        Claim("SAF", beats="SAM", on="final_accuracy", at=symmetric),
    ],
)
