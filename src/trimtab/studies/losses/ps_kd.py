"""Does distilling a network's own last predictions calibrate it, and does it help against wrong labels?

The weight of past predictions rises to the authors' 0.8. No augmentation.
"""

from __future__ import annotations

from trimtab import losses
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.image_classification import few_images, long_training, ten_thousand
from trimtab.studies.tasks.label_noise import symmetric
from trimtab.studies.tools.training import Training

study = Study(
    paper="ps_kd",
    entrants={"PS-KD": Training(loss=lambda plan: losses.PSKD(len(plan), plan.num_classes, plan.epochs))},
    on=[long_training, few_images, ten_thousand, symmetric],
    headline=Claim("PS-KD", below="label smoothing", on="ece", at=long_training),
    claims=[
        Claim("PS-KD", below="SGD", on="ece", times=2.0, at=long_training),
        Claim("PS-KD", below="label smoothing", on="aurc", at=long_training),
        Claim("PS-KD", beats="label smoothing", on="test_accuracy", at=long_training),
        Claim("PS-KD", beats="SGD", on="test_accuracy", at=few_images),
        Claim("PS-KD", beats="GCE", on="final_accuracy", at=symmetric),
    ],
)
