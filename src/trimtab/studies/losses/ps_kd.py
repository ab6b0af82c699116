"""Does distilling a network's own last predictions calibrate it, and does it help against wrong labels?

The weight of past predictions rises to the authors' 0.8. No augmentation.

On the shared task of distillation it asks no teacher: the student learns the text, and of every character of a window
remembers what it foretold an epoch ago. It has two epochs there, so that the past weighs 0.8 in the second one, and
nothing in the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab import losses
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.distillation import Distilling, Pupil, new_blocks, own_blocks
from trimtab.studies.tasks.image_classification import few_images, long_training, ten_thousand
from trimtab.studies.tasks.label_noise import symmetric
from trimtab.studies.tools.training import Training


class OwnPast:
    """The text, its targets mixed with what the student foretold of the same character an epoch ago."""

    def __init__(self, pupil: Pupil) -> None:
        plan = pupil.plan
        self.student = pupil.student
        self.context = len(pupil.teacher.get_parameter("positions"))
        self.loss = losses.PSKD(len(plan) * self.context, plan.num_classes, plan.epochs)

    def set_epoch(self, epoch: int) -> None:
        self.loss.set_epoch(epoch)

    def __call__(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        characters = self.context * index[:, None] + torch.arange(x.shape[1], device=index.device)
        value: Tensor = self.loss(self.student(x).flatten(0, 1), y.flatten(), characters.flatten())
        return value


study = Study(
    paper="ps_kd",
    entrants={
        "PS-KD": Training(loss=lambda plan: losses.PSKD(len(plan), plan.num_classes, plan.epochs)),
        "PS-KD of characters": Distilling(objective=OwnPast),
    },
    on=[long_training, few_images, ten_thousand, symmetric, own_blocks, new_blocks],
    headline=Claim("PS-KD", below="label smoothing", on="ece", at=long_training),
    claims=[
        Claim("PS-KD", below="SGD", on="ece", times=2.0, at=long_training),
        Claim("PS-KD", below="label smoothing", on="aurc", at=long_training),
        Claim("PS-KD", beats="label smoothing", on="test_accuracy", at=long_training),
        Claim("PS-KD", beats="SGD", on="test_accuracy", at=few_images),
        Claim("PS-KD", beats="GCE", on="final_accuracy", at=symmetric),
        Claim("PS-KD of characters", below="hard labels", on="test_loss", at=own_blocks),
    ],
)
