"""Adversarial training on a tenth of the digits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trimtab.data import load
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Experiment, Metric, Result, Trial
from trimtab.studies.generative.augself_gan.training import RULES, MakeRule, Makings, Trained, start, train
from trimtab.studies.tasks.digits_generation import Judge

_RATE = 1e-3
_BATCH = 32


def fit(make: MakeRule, trial: Trial) -> Result:
    """A run: 120 images, and what is made of them after every fifth of the training."""
    data = load("digits")
    chosen = torch.randperm(len(data.x_train), generator=trial.generator())[
        : trial.pick(smoke=60, laptop=120, paper=120)
    ]
    images, labels = data.x_train[chosen] * 2 - 1, data.y_train[chosen]
    unseen = data.x_test * 2 - 1
    judge = Judge.of(trial, unseen, data.y_test)
    trained = trial.seeded(lambda: start(make(Makings(8, 10, _RATE, trial.generator(1)))))
    steps, order = trial.pick(smoke=8, laptop=500, paper=20_000), trial.generator(2)
    asked = data.y_test[torch.randint(len(data.y_test), (1000,), generator=trial.generator(3))]
    shown: list[int] = []
    distances: list[float] = []
    gaps: list[float] = []
    for step in range(1, steps + 1):
        batch = torch.randint(len(images), (_BATCH,), generator=order)
        train(trained, images[batch], labels[batch])
        if step % max(1, steps // 5) == 0:
            shown.append(step)
            distances.append(judge.frechet(trained.sample(asked, trial.generator(4))))
            gaps.append(believed(trained, images, labels) - believed(trained, unseen, data.y_test))
            trial.report(step / steps)
    samples = trained.sample(asked, trial.generator(4))
    return Result(
        {"frechet": distances[-1], "gap": gaps[-1], **judge.quality(samples, asked)},
        {"frechet": Curve(shown, distances, "step"), "gap": Curve(shown, gaps, "step")},
        pictures={
            "samples": Picture.grid(trained.sample(torch.arange(10).repeat(4), trial.generator(5))[:, 0] / 2 + 0.5)
        },
    )


@torch.no_grad()
def believed(trained: Trained, images: Tensor, labels: Tensor) -> float:
    """Share of real images that the discriminator takes for real, augmented as it sees them."""
    rule = trained.rule
    score = rule.discriminator.score(rule.discriminator.features(rule.view(images)[0]), labels)
    return float((score > 0).float().mean())


few_digits = Experiment(
    "a tenth of the digits",
    {name: partial(fit, make) for name, make in RULES.items()},
    {
        "frechet": Metric("Frechet distance", best="min"),
        "gap": Metric("real images believed, training less unseen (%)", best="min", percent=True),
        "recall": Metric("recall (%)", percent=True),
        "precision": Metric("precision (%)", percent=True),
        "fidelity": Metric("samples of the class asked for (%)", percent=True),
    },
    reads=("digits",),
    cost=8.0,
)
