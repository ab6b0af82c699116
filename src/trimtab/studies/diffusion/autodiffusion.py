"""Searched time steps and layers against grids made by hand and against random search, on fresh noise.

The paper searches four to a hundred steps of large image models for FID; here a small network has learned digits, and
300 candidates of four DDIM steps are scored with 250 samples each. The search sees other noise and other digits than
the result, since it fits what it sees. Uniform steps are even in the time of the linear schedule that DDPM trains on.
Steps and layers are searched at the same number of blocks run, 24: what is skipped pays for further steps. Random
search draws as many candidates. In the shared task the search has 150 candidates where others choose among four grids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from trimtab.diffusion import (
    Candidate,
    EDMPreconditioned,
    LayerSkipping,
    SearchResult,
    VPLinear,
    ddim,
    dpm_solver,
    grids,
    sampling_search,
)
from trimtab.nets import DenoisingMLP
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.mixture_sampling import Draws, MixtureSampler, exact_5, imperfect_5
from trimtab.studies.tools.learned_digits import BLOCKS, SCHEDULE, digits, learned_digits
from trimtab.studies.tools.sample_quality import frechet_distance
from trimtab.studies.tools.samplers import GRIDS, Sampler

STEPS = 4
_TIMES = 1000


def ladder() -> Tensor:
    """A thousand times, uniform where the model would have been trained on: noise levels of the linear VP schedule."""
    ends = VPLinear().t_of_rho(torch.tensor([SCHEDULE.t_max, SCHEDULE.t_min], dtype=torch.float64)).tolist()
    return VPLinear().rho(torch.linspace(ends[0], ends[1], _TIMES + 1, dtype=torch.float64))


@dataclass(frozen=True)
class Contest:
    """The learned model, noise to sample from, and digits to be like."""

    model: EDMPreconditioned
    noise: Tensor
    real: Tensor

    @classmethod
    def of(cls, trial: Trial, *, searching: bool) -> Contest:
        """For the search, or on fresh noise and against the digits that were held out."""
        size = trial.pick(smoke=64, laptop=250 if searching else 1000, paper=5000)
        noise = torch.randn(size, 64, generator=trial.generator(1 if searching else 0))
        return cls(learned_digits(trial), noise, digits(test=not searching).double())

    def sample(self, times: Tensor, sampler: Sampler = ddim, skips: tuple[frozenset[int], ...] = ()) -> Tensor:
        """Samples at these times, from noise of the size that belongs to the first."""
        blocks = cast(DenoisingMLP, self.model.net).blocks
        model = LayerSkipping(self.model, blocks, skips) if any(skips) else self.model
        return sampler(model, float(times[0]) * self.noise, times).double()

    def frechet(self, x: Tensor) -> float:
        """Frechet distance to the digits."""
        return frechet_distance(x, self.real.mean(0), torch.cov(self.real.T))


def shown(trial: Trial, x: Tensor, contest: Contest, cost: int, searched: float, curve: list[float]) -> Result:
    """What an arm is judged by."""
    metrics = {"frechet": contest.frechet(x), "searched": searched, "blocks": float(cost)}
    generations = list(map(float, range(len(curve))))
    curves = {"frechet in the search": Curve(generations, curve, x_label="generation")} if curve else {}
    return Result(metrics, curves, pictures={"samples": Picture.grid((x[:20].reshape(-1, 8, 8) + 1) / 2)})


def by_hand(trial: Trial, times: Callable[[], Tensor] | None = None, sampler: Sampler = ddim) -> Result:
    """Times of a grid; without one, the best of four on the search's noise."""
    tuning, contest = Contest.of(trial, searching=True), Contest.of(trial, searching=False)
    tried = [make(SCHEDULE, STEPS) for make in GRIDS.values()] if times is None else [times()]
    best = min(tried, key=lambda times: tuning.frechet(tuning.sample(times, sampler)))
    searched = tuning.frechet(tuning.sample(best, sampler))
    return shown(trial, contest.sample(best, sampler), contest, STEPS * BLOCKS, searched, [])


def by_search(trial: Trial, *, max_skip: float = 0.0, evolve: bool = True) -> Result:
    """Times, and layers, from a search of three hundred candidates.

    Args:
        trial: the run.
        max_skip: largest share of blocks that a step skips.
        evolve: whether candidates have parents; otherwise all are drawn at random.
    """
    tuning, rungs = Contest.of(trial, searching=True), ladder()

    def evaluate(candidate: Candidate) -> float:
        return tuning.frechet(tuning.sample(candidate.times(rungs), skips=candidate.skips))

    found = search(trial, evaluate, STEPS, BLOCKS, max_skip, evolve, trial.generator(2))
    contest = Contest.of(trial, searching=False)
    x = contest.sample(found.best.times(rungs), skips=found.best.skips)
    return shown(trial, x, contest, found.best.cost(BLOCKS), found.score, list(found.history))


def search(
    trial: Trial,
    evaluate: Callable[[Candidate], float],
    steps: int,
    blocks: int,
    max_skip: float,
    evolve: bool,
    generator: torch.Generator,
) -> SearchResult:
    """The search at the trial's budget, of thirty candidates a generation."""
    return sampling_search(
        evaluate,
        _TIMES,
        steps,
        blocks=blocks,
        max_skip=max_skip,
        generations=trial.pick(smoke=2, laptop=10, paper=20),
        population=trial.pick(smoke=6, laptop=30, paper=50),
        mutations=trial.pick(smoke=3, laptop=12, paper=25) if evolve else 0,
        crossovers=trial.pick(smoke=2, laptop=9, paper=15) if evolve else 0,
        generator=generator,
    )


def searched_times(draws: Draws, steps: int, generator: torch.Generator) -> Tensor:
    """Times for the shared task, where the search sees noise of its own and the data's exact moments."""
    rungs = grids.power(draws.model.schedule, _TIMES, p=1.0)

    def evaluate(candidate: Candidate) -> float:
        return draws.frechet(draws.sample(candidate.times(rungs)))

    found = sampling_search(
        evaluate, _TIMES, steps, generations=6, population=25, mutations=10, crossovers=8, generator=generator
    )
    return found.best.times(rungs)


def uniform() -> Tensor:
    """Evenly spaced steps of training, as DDIM takes them."""
    rungs = ladder()
    return rungs[[i * _TIMES // STEPS for i in range(STEPS)] + [_TIMES]]


four_steps = Experiment(
    "four steps on a learned model of digits",
    arms={
        "uniform": partial(by_hand, times=uniform),
        "Karras": partial(by_hand, times=partial(grids.karras, SCHEDULE, STEPS)),
        "best grid made by hand": by_hand,
        "DPM-Solver++, best grid": partial(by_hand, sampler=dpm_solver),
        "random search": partial(by_search, evolve=False),
        "AutoDiffusion": by_search,
        "AutoDiffusion, steps and layers": partial(by_search, max_skip=0.5),
    },
    metrics={
        "frechet": Metric("Frechet distance to held-out digits", best="min"),
        "searched": Metric("Frechet distance to the digits searched with", best="min"),
        "blocks": Metric("blocks of the network run", best=None),
    },
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    reads=("digits",),
    log="y",
    cost=3.5,
)

study = Study(
    paper="autodiffusion",
    entrants={
        "AutoDiffusion": {
            variant: MixtureSampler(times=searched_times, search={}) for variant in (exact_5, imperfect_5)
        }
    },
    on=[exact_5, imperfect_5],
    experiments=[four_steps],
    headline=Claim("AutoDiffusion", below="uniform", on="frechet", times=2, at=four_steps),
    claims=[
        Claim("AutoDiffusion", below="best grid made by hand", on="frechet", at=four_steps),
        Claim("AutoDiffusion", below="random search", on="frechet", at=four_steps),
        Claim("AutoDiffusion", below="DPM-Solver++, best grid", on="frechet", at=four_steps),
        Claim("AutoDiffusion, steps and layers", below="AutoDiffusion", on="frechet", at=four_steps),
        Claim("AutoDiffusion", below="DDIM", on="frechet", at=imperfect_5),
    ],
)
