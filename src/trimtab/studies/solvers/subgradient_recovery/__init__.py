"""The subgradient method under half outliers: small against large starts, the rank known or not, other losses.

Matrices of 20 x 20 and rank 3 seen through 1,200 Gaussian measurements, half of them off by ten times (or, where
larger, a thousand times) their size; 500 steps of the authors' schedule. A full-width factor has 210 degrees of
freedom, so that 1,200 measurements determine even a matrix without structure. The case of few measurements has 1,440 of
them, a tenth wrong, for the 1,830 degrees of freedom of a 60 x 60 matrix of rank 1. The subgradient method chooses the
decay of its steps, and the other losses step size, schedule, Huber's threshold and penalty, by the mean absolute error
on a fifth of the measurements held out; descent starts from the same point. Without outliers the step follows the
residual. The shared task shows single entries, for which the paper's guarantee does not hold.

In a first run the decay was fixed at 0.985: on some of its three seeds the steps had become too short before the matrix
had grown, which the solver warns of. In a second one settings were chosen by the median error, which means nothing when
half of the measurements are outliers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch

from trimtab.solvers import subgradient_recovery
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.solvers.subgradient_recovery.sensing import (
    HUBER,
    HUBER_NUCLEAR,
    METRICS,
    NUCLEAR,
    SQUARED,
    Sensing,
    factored_descent,
)
from trimtab.studies.tasks.matrix_recovery import (
    Instance,
    MatrixRecovery,
    Recovery,
    Solution,
    outliers,
    penalised,
    similarities,
)

# Shares of the last step that the next one keeps; the authors' are in this range.
DECAYS = (0.97, 0.985, 0.995, 0.999)
STEPS: Sequence[Mapping[str, Any]] = [{"decay": decay} for decay in DECAYS]


def subgradient(
    instance: Instance,
    *,
    rank: int | None = None,
    init_scale: float = 1e-6,
    schedule: Literal["geometric", "residual"] = "geometric",
    decay: float = 1.0,
) -> Solution:
    """The subgradient method on a factor of full width, unless it is told the rank."""
    found = subgradient_recovery(
        instance.values,
        instance.operator,
        rank or instance.shape[0],
        init_scale=init_scale,
        schedule=schedule,
        decay=decay,
        n_iter=instance.steps,
    )
    return Solution(torch.as_tensor(found.matrix), found.n_iter, found.losses[1:])


half, huge = Sensing(), Sensing(magnitude=1000.0)
few, exact = Sensing(size=60, rank=1, measurements=1440, outliers=0.1), Sensing(outliers=0.0)
ten: Any = {"smoke": 1, "laptop": 10, "paper": 10}

wrong = Experiment(
    "half of the measurements wrong",
    {
        "SubGM": partial(half.recover, subgradient, STEPS),
        "SubGM, rank known": partial(half.recover, partial(subgradient, rank=3), STEPS),
        "SubGM, start 0.1": partial(half.recover, partial(subgradient, init_scale=0.1), STEPS),
        "SubGM, start 0.1, rank known": partial(half.recover, partial(subgradient, rank=3, init_scale=0.1), STEPS),
        "SubGM, outliers a hundred times larger": partial(huge.recover, subgradient, STEPS),
        "squared loss": partial(half.recover, factored_descent, SQUARED),
        "Huber's loss": partial(half.recover, factored_descent, HUBER),
        "nuclear norm": partial(half.recover, penalised, NUCLEAR),
        "Huber's loss and nuclear norm": partial(half.recover, penalised, HUBER_NUCLEAR),
    },
    METRICS,
    seeds=ten,
    log="y",
    cost=1.3,
)
fewer = Experiment(
    "few measurements of rank 1",
    {
        "SubGM": partial(few.recover, subgradient, STEPS),
        "SubGM, rank known": partial(few.recover, partial(subgradient, rank=1), STEPS),
    },
    METRICS,
    log="y",
    cost=7.0,
)
right = Experiment(
    "exact measurements",
    {
        "SubGM": partial(exact.recover, partial(subgradient, schedule="residual"), [{}]),
        "SubGM, start 0.1": partial(exact.recover, partial(subgradient, schedule="residual", init_scale=0.1), [{}]),
    },
    METRICS,
    seeds=ten,
    log="y",
    cost=0.2,
)


def not_square(task: MatrixRecovery) -> str:
    """Why it cannot enter a variant."""
    return "it recovers square matrices, and a table of images is none" if task.kind == "digits" else ""


study = Study(
    paper="subgradient_recovery",
    entrants={
        "SubGM": Recovery(
            recover=lambda instance: subgradient(instance, **instance.setting),
            search={"decay": DECAYS},
            unfit=not_square,
        )
    },
    on=[outliers, similarities],
    experiments=[wrong, fewer, right],
    headline=Claim(
        "SubGM",
        below="SubGM, rank known",
        on="error",
        times=0.5,
        at=wrong,
        text="With half of the measurements wrong, not knowing the rank at most doubles the error",
    ),
    claims=[
        Claim("SubGM", at_most=1e-3, on="error", at=wrong),
        Claim("SubGM", below="SubGM, start 0.1", on="error", times=50, at=wrong),
        Claim(
            "SubGM",
            below="SubGM, start 0.1, rank known",
            on="error",
            times=0.5,
            at=wrong,
            text="The error is at most twice that of a large start with the rank known",
        ),
        Claim("SubGM", below="Huber's loss and nuclear norm", on="error", at=wrong),
        Claim("SubGM", below="squared loss", on="error", times=100, at=wrong),
        Claim(
            "SubGM",
            below="SubGM, rank known",
            on="error",
            times=0.5,
            at=fewer,
            text="Not knowing the rank at most doubles the error where a full-width factor could fit anything",
        ),
        Claim("SubGM", at_most=1e-6, on="error", at=right),
        Claim("SubGM", below="robust PCA", on="error", at=outliers),
    ],
)
