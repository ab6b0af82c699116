"""Digits carried to noise by DDIM and back again, with guidance on both ways."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimtab.diffusion import ddim, ddim_invert
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tasks.guided_sampling import Contest, GuidedModel, GuidedSampler

METRICS = {
    "rmse": Metric("RMSE of the reconstruction", best="min"),
    "edit_distance": Metric("RMSE between the digit and its edit", best="min"),
    "edited": Metric("edits of the class asked for (%)", percent=True),
    "accuracy": Metric("samples of the class asked for (%)", best=None, percent=True),
    "scale": Metric("guidance scale", best=None),
}
STEPS, ACCURACY = 25, 0.9
_SHOWN = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def invert(trial: Trial, entrant: GuidedSampler) -> Result:
    """What comes back, at the scale at which the rule's samples have the accuracy, and over the accuracies below it.

    Every scale of the rule is tried: its class accuracy is that of samples from fresh noise. Numbers at an accuracy
    are read off between the two scales around it.
    """
    contest = Contest.of(trial, entrant, 2 * STEPS)
    draws = contest.draws(trial, trial.pick(smoke=32, laptop=500, paper=5000), stream=3)
    x, labels = _images(trial, contest)
    tried = []
    for done, scale in enumerate(contest.scales):
        accuracy = contest.accuracy(contest.sample(draws, scale)[0], draws.labels)
        tried.append([accuracy, *_there_and_back(contest, x, labels, scale)[0], np.log(scale)])
        trial.report((done + 1) / len(contest.scales))
    columns = np.array(tried).T
    reached = np.maximum.accumulate(columns[0])

    def at(accuracy: float, column: int) -> float:
        return float(np.interp(accuracy, reached, columns[column]))

    scale = float(np.exp(at(ACCURACY, 4)))
    names = ("rmse", "edit_distance", "edited")
    return Result(
        {
            **{name: at(ACCURACY, 1 + column) for column, name in enumerate(names)},
            "accuracy": at(ACCURACY, 0),
            "scale": scale,
        },
        {
            name: Curve(_SHOWN, [at(accuracy, 1 + column) for accuracy in _SHOWN], x_label="class accuracy of samples")
            for column, name in enumerate(names[:2])
        },
        pictures=_pictures(x, *_there_and_back(contest, x, labels, scale)[1]),
    )


def invert_unguided(trial: Trial) -> Result:
    """What comes back with the conditional model alone."""
    contest = Contest.of(trial, GuidedSampler(), 2 * STEPS)
    draws = contest.draws(trial, trial.pick(smoke=32, laptop=500, paper=5000), stream=3)
    numbers, _ = _there_and_back(contest, *_images(trial, contest), scale=1.0)
    accuracy = contest.accuracy(contest.sample(draws, 1.0)[0], draws.labels)
    return Result({**dict(zip(METRICS, numbers, strict=False)), "accuracy": accuracy, "scale": 1.0})


def _images(trial: Trial, contest: Contest) -> tuple[Tensor, Tensor]:
    """Samples of the data and their classes."""
    x = contest.data.sample(trial.pick(smoke=32, laptop=200, paper=1797), generator=trial.generator(9))
    return x, contest.data.class_log_posterior(x).argmax(1)


def _there_and_back(
    contest: Contest, x: Tensor, labels: Tensor, scale: float
) -> tuple[tuple[float, float, float], tuple[Tensor, Tensor]]:
    """Error of the reconstruction, distance and success of the edit to the next class; and both results."""
    times, target = contest.times(STEPS), (labels + 1) % contest.data.num_classes
    guided, other = (contest.guidance(GuidedModel(contest.model), to, scale) for to in (labels, target))
    noise = ddim_invert(guided, x, times)
    back, edit = ddim(guided, noise, times), ddim(other, noise, times)
    return (_rmse(back, x), _rmse(edit, x), contest.accuracy(edit, target)), (back, edit)


def _rmse(x: Tensor, y: Tensor) -> float:
    return float((x - y).square().mean().sqrt())


def _pictures(x: Tensor, back: Tensor, edit: Tensor) -> dict[str, Picture]:
    """Digits above, what came back below them, their edits at the bottom."""
    if x.shape[1] == 2:
        return {}
    return {
        "digits, reconstructed, edited": Picture.grid(
            (torch.cat([x[:10], back[:10], edit[:10]]).reshape(-1, 8, 8) + 1) / 2
        )
    }
