"""Datamodels on the shared task: one regression over many trainings serves every set to forget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.studies.tasks.forget_samples import Answer, Lesson
from trimtab.studies.tools.network_stack import BATCH, NetworkStack
from trimtab.studies.unlearning.datamodel_matching.methods import REPEATS
from trimtab.unlearning import LinearDatamodel, datamodel_matching, predict_without, subset_masks

_KEEP, _PENALTY = 0.7, 10.0


def attribution(lesson: Lesson) -> Tensor:
    """What each training sample adds to the logits at all samples, (training samples, all samples, 1, classes)."""
    inputs, count = lesson.samples.inputs, len(lesson.samples.x)
    models = lesson.trial.pick(smoke=40, laptop=800, paper=5000)

    def build() -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(0)
        masks = subset_masks(count, models, _KEEP, generator=draws)
        stack = lesson.train(lesson.fresh(models, draws), masks, draws)
        with torch.no_grad():
            outputs = stack(inputs).transpose(0, 1)
        return {"coef": LinearDatamodel(alpha=_PENALTY).fit(masks, outputs).coef_.float()}

    # The samples are the same in all runs: what they look like tells one data set from another.
    key = f"datamodel of {count} samples, sum of pixels {float(inputs.double().sum()):.6f}"
    return lesson.trial.cached(build, key=key)["coef"][:, :, None, :]


def direct(lesson: Lesson) -> Answer:
    """The datamodel's own answer, of networks that are not there; it takes the task's samples alone."""
    coef, known = lesson.prepared, lesson.samples.inputs

    def answer(x: Tensor) -> Tensor:
        at = torch.cdist(x.double(), known.double()).argmin(1)
        return predict_without(lesson.trained(x), coef[:, at], lesson.forget)

    return answer


def _options(lesson: Lesson) -> dict[str, Any]:
    """As many epochs as the allowance pays for, one of which goes to the outputs that are matched."""
    matched = round(sum(REPEATS.values()) * len(lesson.forget))
    epochs = max(1, lesson.allowance // matched - 1)
    rate = float(lesson.setting["lr"])
    return {**REPEATS, "epochs": epochs, "lr": rate, "batch_size": BATCH, "generator": lesson.draws}


def matching(lesson: Lesson) -> NetworkStack:
    """Datamodel matching."""
    x = lesson.samples.x
    coef = lesson.prepared[:, : len(x)]
    return datamodel_matching(lesson.student(), x, coef, lesson.forget, **_options(lesson))
