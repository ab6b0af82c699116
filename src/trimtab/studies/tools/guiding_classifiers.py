"""Classifiers that guide samplers: trained on samples of a mixture, so that its exact one remains for judging."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.diffusion import AnalyticGMM
from trimtab.diffusion.schedules import NoiseSchedule, per_sample
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descent_step

NoisyClassifier = Callable[[Tensor, Tensor], Tensor]
"""Maps noisy samples and their times to logits."""

_HIDDEN, _BATCH = 128, 128


def clean_classifier(trial: Trial, data: AnalyticGMM) -> nn.Module:
    """A network with ReLUs that has seen clean samples alone, as those have that are trained to recognise images."""
    model = _network(data.dim, data.num_classes, nn.ReLU)
    model.load_state_dict(trial.cached(partial(_train_clean, trial, data), key="clean classifier"))
    return model.eval().requires_grad_(False)


def noisy_classifier(trial: Trial, data: AnalyticGMM, schedule: NoiseSchedule) -> NoisyClassifier:
    """A network that was trained on noisy samples of every time, and is told the time."""
    model = _network(data.dim + 1, data.num_classes, nn.SiLU)
    model.load_state_dict(
        trial.cached(partial(_train_noisy, trial, data, schedule), key=f"noisy classifier {schedule}")
    )
    model.eval().requires_grad_(False)

    def classify(x: Tensor, t: Tensor) -> Tensor:
        logits: Tensor = model(torch.cat([_unit(x, t, schedule), t[:, None].to(x.dtype)], dim=1))
        return logits

    return classify


def _network(inputs: int, classes: int, activation: type[nn.Module]) -> nn.Sequential:
    first, second, last = nn.Linear(inputs, _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN), nn.Linear(_HIDDEN, classes)
    return nn.Sequential(first, activation(), second, activation(), last).double()


def _unit(x: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    return x / per_sample((schedule.alpha(t).square() + schedule.sigma(t).square()).sqrt(), x)


def _train_clean(trial: Trial, data: AnalyticGMM) -> dict[str, Tensor]:
    return _train(trial, data, data.dim, nn.ReLU, lambda x, generator: x, steps=400)


def _train_noisy(trial: Trial, data: AnalyticGMM, schedule: NoiseSchedule) -> dict[str, Tensor]:
    def corrupt(x: Tensor, generator: torch.Generator) -> Tensor:
        t = torch.rand(len(x), generator=generator, dtype=x.dtype) * schedule.t_max
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return torch.cat([_unit(schedule.add_noise(x, noise, t), t, schedule), t[:, None]], dim=1)

    return _train(trial, data, data.dim + 1, nn.SiLU, corrupt, steps=1200)


def _train(
    trial: Trial,
    data: AnalyticGMM,
    inputs: int,
    activation: type[nn.Module],
    seen_as: Callable[[Tensor, torch.Generator], Tensor],
    steps: int,
) -> dict[str, Tensor]:
    """The weights after Adam on fresh samples; the same for every seed of a study."""
    fixed = Trial(budget=trial.budget)
    model = fixed.seeded(lambda: _network(inputs, data.num_classes, activation))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = fixed.generator()
    for _ in range(trial.pick(smoke=steps // 8, laptop=steps, paper=5 * steps)):
        x = data.sample(_BATCH, generator=generator)
        y = data.class_log_posterior(x).argmax(1)
        loss = nn.functional.cross_entropy(model(seen_as(x, generator)), y)
        descent_step(optimizer, loss)
    return model.state_dict()
