"""Sampling from a mixture in few evaluations, with its exact denoiser and with one made worse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.diffusion import AnalyticGMM, CountNFE, VPLinear, ddim, degrade, deis_rk, dpm_solver, euler, grids
from trimtab.diffusion.denoiser import DenoiserLike, StepCallback
from trimtab.diffusion.mixtures import MixtureDenoiser
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Budget, Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.mixtures import mixture
from trimtab.studies.tools.sample_quality import frechet_distance, sliced_wasserstein
from trimtab.studies.tools.samplers import GRIDS
from trimtab.studies.tools.trajectories import sampler_trajectories

Wrap = Callable[[DenoiserLike], DenoiserLike]
"""Makes a denoiser that samples better out of a denoiser."""

ChooseTimes = Callable[["Draws", int, torch.Generator], Tensor]
"""Finds the times of so many steps, by sampling from noise that no result is taken from."""


@dataclass(frozen=True, kw_only=True)
class MixtureSampler(Entrant):
    """What a contestant of sampling brings; what it leaves out is DDIM, the model as it is, and the task's time grids.

    Attributes:
        sampler: maps denoiser, noise and times to samples; trajectories are drawn of one that takes a `callback`.
        wrap: changes what the model says.
        times: chooses the times; None takes the best of the task's four grids.
        random: whether the sampler draws noise, and takes a `generator`.
    """

    sampler: Callable[..., Tensor] | None = None
    wrap: Wrap | None = None
    times: ChooseTimes | None = None
    random: bool = False


@dataclass(frozen=True)
class Draws:
    """Noise, and a model and a sampler that make samples of it.

    Attributes:
        data: what the model should give.
        model: the denoiser, the entrant's wrapper around it.
        sampler: the entrant's, or DDIM.
        noise: what to sample from.
        seed: of a random sampler's draws; None for one that makes none.
    """

    data: AnalyticGMM
    model: DenoiserLike
    sampler: Callable[..., Tensor]
    noise: Tensor
    seed: int | None = None

    def sample(self, times: Tensor, **told: StepCallback) -> Tensor:
        """The samples at these times."""
        drawn = {} if self.seed is None else {"generator": torch.Generator().manual_seed(self.seed)}
        return self.sampler(self.model, self.noise, times, **told, **drawn)

    def trajectories(self, times: Tensor) -> Mapping[str, Picture]:
        """A picture of the trajectories of 20 samples."""
        few = replace(self, noise=self.noise[:20])
        return sampler_trajectories(self.sampler, few.noise, partial(few.sample, times), self.data)

    def frechet(self, x: Tensor) -> float:
        """Frechet distance of samples to the data."""
        return frechet_distance(x, self.data.mean, self.data.cov)

    @cached_property
    def evaluations_a_step(self) -> int:
        """What a step costs."""
        counted = CountNFE(self.model)
        replace(self, model=counted, noise=self.noise[:2]).sample(grids.power(self.model.schedule, 4))
        return counted.count // 4

    def steps(self, evaluations: int) -> int:
        """As many as the evaluations allow, one at least."""
        return max(1, evaluations // self.evaluations_a_step)


@dataclass(frozen=True)
class MixtureSampling(Task[MixtureSampler]):
    """Sample in few evaluations of a model.

    The data are a mixture fitted to digits (at the smoke budget a ring), of which everything is known: where the exact
    model's ODE takes a piece of noise, and the mean and covariance that samples should have. With the exact model only
    the sampler can err; the imperfect one pulls its predictions to the data's mean, as an under-trained network does,
    and its samples are still held against those of the exact one. Everyone takes as many steps as the evaluations
    allow, on the best of four time grids, chosen on other noise: by the error to the exact solution where the model is
    exact, by the Frechet distance where it is not.

    Attributes:
        evaluations: of the model for a sample.
        shrink: how far the model pulls to the mean, 0 to 1.
    """

    evaluations: int = 10
    shrink: float = 0.0

    name: ClassVar[str] = "mixture-sampling"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "frechet": Metric("Frechet distance to the data", best="min"),
        "sliced_wasserstein": Metric("sliced Wasserstein distance to the data", best="min"),
        "rmse": Metric("RMSE to the exact solution", best="min"),
        "median": Metric("median error of a sample", best="min"),
    }
    accepts: ClassVar[type[MixtureSampler]] = MixtureSampler
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"grid": tuple(GRIDS)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 10, "paper": 10}
    cost: ClassVar[float] = 1.3

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "exact model, 10 evaluations": exact_10,
            "exact model, 5 evaluations": exact_5,
            "imperfect model, 10 evaluations": imperfect_10,
            "imperfect model, 5 evaluations": imperfect_5,
            "imperfect model, 100 evaluations": imperfect_100,
        }

    @classmethod
    def references(cls) -> Mapping[str, MixtureSampler]:
        return {
            "DDIM": MixtureSampler(),
            "Euler": MixtureSampler(sampler=euler),
            "Heun": MixtureSampler(sampler=partial(deis_rk, method="heun")),
            "DPM-Solver++": MixtureSampler(sampler=dpm_solver),
        }

    def run(self, trial: Trial, entrant: MixtureSampler) -> Result:
        data = mixture(trial.pick(smoke="ring8", laptop="digits", paper="digits"))
        exact = data.denoiser(VPLinear())
        size = trial.pick(smoke=64, laptop=800, paper=3000)
        noise = exact.schedule.prior(size, data.dim, generator=trial.generator(), dtype=torch.float64)
        wrapped = degrade(exact, shrink=self.shrink) if self.shrink else exact
        model = entrant.wrap(wrapped) if entrant.wrap else wrapped
        seed = trial.seed + 1 if entrant.random else None
        draws = Draws(data, model, entrant.sampler or ddim, noise, seed)
        solution = _solution(trial, exact, noise)

        def times(evaluations: int) -> Tensor:
            steps = draws.steps(evaluations)
            if entrant.times is None:
                return GRIDS[str(trial.setting.get("grid", "quadratic"))](exact.schedule, steps)
            tuning = trial.pick(smoke=32, laptop=128, paper=1000)
            other = exact.schedule.prior(tuning, data.dim, generator=trial.generator(3), dtype=torch.float64)
            return entrant.times(replace(draws, noise=other), steps, trial.generator(4))

        chosen = times(self.evaluations)
        x = draws.sample(chosen)
        metrics = {
            "frechet": draws.frechet(x),
            "rmse": _rmse(x, solution),
            "median": float((x - solution).square().mean(1).sqrt().median()),
        }
        if trial.searching:
            return Result(score=-metrics["frechet" if self.shrink else "rmse"])
        true = data.sample(2 * size, generator=trial.generator(1))
        metrics["sliced_wasserstein"] = sliced_wasserstein(x, true, generator=trial.generator(2))
        trial.report(0.3)

        shares = (0.5, 0.7, 1, 1.5, 2) if self.evaluations <= 20 else (0.25, 0.5, 1)
        # A search for times is too long to be made for more than one number of steps.
        counts = [self.evaluations] if entrant.times else [math.ceil(self.evaluations * share) for share in shares]
        shown = {count: x if count == self.evaluations else draws.sample(times(count)) for count in counts}
        spent = [float(draws.steps(count) * draws.evaluations_a_step) for count in counts]
        return Result(
            metrics,
            {
                "frechet": Curve(spent, [draws.frechet(x) for x in shown.values()], x_label="evaluations"),
                "rmse": Curve(spent, [_rmse(x, solution) for x in shown.values()], x_label="evaluations"),
            },
            pictures={} if trial.seed else {"samples": _picture(x), **draws.trajectories(chosen)},
        )


def _solution(trial: Trial, exact: MixtureDenoiser, noise: Tensor) -> Tensor:
    """Where the exact model's ODE takes the noise."""
    steps = trial.pick(smoke=20, laptop=40, paper=400)
    return trial.cached(
        lambda: deis_rk(exact, noise, grids.log_snr(exact.schedule, steps), method="rk4"),
        key=f"exact samples {tuple(noise.shape)} {steps} steps seed {trial.seed}",
    )


def _picture(x: Tensor) -> Picture:
    if x.shape[1] == 2:
        return Picture.density(x, -1.5, 1.5)
    return Picture.grid((x[:20].reshape(-1, 8, 8) + 1) / 2)


def _rmse(x: Tensor, solution: Tensor) -> float:
    return float((x - solution).square().mean().sqrt())


exact_10 = MixtureSampling()
exact_5 = MixtureSampling(evaluations=5)
imperfect_10 = MixtureSampling(shrink=0.3)
imperfect_5 = MixtureSampling(evaluations=5, shrink=0.3)
imperfect_100 = MixtureSampling(evaluations=100, shrink=0.3)
