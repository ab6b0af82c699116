"""Samples on two subspaces: which are found from how many, and how well unseen ones are denoised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.diffusion import EDM, EDMPreconditioned, denoising_loss
from trimtab.diffusion.subspace_clustering import KSubspaces, MoLRG, fit_low_rank, low_rank_denoise, match_subspaces
from trimtab.nets import DenoisingMLP
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tasks.clustering import Labels, Sample
from trimtab.studies.tools.descent import descend

RATIOS = (1.0, 4 / 3, 5 / 3, 2.0, 3.0, 4.0)
LEVELS = (0.1, 0.3, 1.0)

RECOVERED = {
    "samples_per_rank": Metric("samples of a component for each of its dimensions", best="min"),
    "growth": Metric("ratio of samples for each dimension at rank 6 to rank 3", best="min"),
    "ambient": Metric("ratio of samples for each dimension in 96 dimensions to 48", best="min"),
}
DENOISED = {
    "excess_2": Metric("excess error over the exact denoiser, 2 samples to a dimension (%)", best="min", percent=True),
    "excess_64": Metric(
        "excess error over the exact denoiser, 64 samples to a dimension (%)", best="min", percent=True
    ),
}


@dataclass(frozen=True)
class Problem:
    """Samples of two components, and the truth.

    Attributes:
        x0: (n, dim), as many of each component.
        true: (2, dim, rank).
        mixture: what they come from.
        generator: of whatever a contestant draws.
        steps: of training.
    """

    x0: Tensor
    true: Tensor
    mixture: MoLRG
    generator: torch.Generator
    steps: int

    @property
    def rank(self) -> int:
        """Dimensions of a subspace."""
        return self.true.shape[2]

    @classmethod
    def draw(cls, trial: Trial, dim: int, rank: int, ratio: float) -> Problem:
        """Subspaces that the seed decides, and `ratio` samples to a dimension of each."""
        mixture = MoLRG.random(dim, rank, generator=trial.generator(rank + 1000 * dim), dtype=torch.float32)
        draws = trial.generator(1)
        x0 = torch.cat([mixture.sample(round(ratio * rank), cond=k, generator=draws) for k in range(2)])
        steps = trial.pick(smoke=20, laptop=500, paper=2000)
        return cls(x0, torch.stack(mixture.bases), mixture, trial.generator(2), steps)


Find = Callable[[Problem], Tensor]
"""Finds bases (2, dim, rank)."""


def low_rank(problem: Problem, near: bool = True) -> Tensor:
    """Trains low-rank denoisers from random starts, and from one at a distance of about 0.2 from the truth."""
    starts = None
    if near:
        noise = torch.randn(problem.true.shape, generator=problem.generator) / math.sqrt(problem.true.shape[1])
        starts = torch.linalg.qr(problem.true + 0.2 * noise).Q[None]
    return fit_low_rank(
        problem.x0,
        problem.rank,
        components=2,
        n_init=7 if near else 8,
        starts=starts,
        steps=problem.steps,
        draws=4,
        generator=problem.generator,
    ).bases


def k_subspaces(problem: Problem) -> Tensor:
    """K-subspaces with 100 random starts."""
    seed = int(torch.randint(2**31, (1,), generator=problem.generator))
    model = KSubspaces(2, dim=problem.rank, n_init=100, random_state=seed).fit(problem.x0.numpy())
    return torch.from_numpy(model.bases_).float()


def cluster(sample: Sample) -> Labels:
    """K-subspaces of twelve dimensions, in which images of one digit nearly lie (Hastie and Simard, "Metrics and Models
    for Handwritten Character Recognition", Statistical Science, 1998)."""
    model = KSubspaces(sample.num_clusters, dim=12, random_state=sample.seed)
    return torch.from_numpy(model.fit_predict(sample.x.double().numpy()))


def recover(trial: Trial, find: Find) -> Result:
    """The least number of samples to a dimension from which on both subspaces are found within 0.3."""
    cases = trial.pick(
        smoke=((12, 2), (12, 3), (24, 2)), laptop=((48, 3), (48, 6), (96, 3)), paper=((48, 3), (48, 6), (96, 3))
    )
    ratios = trial.pick(smoke=(1.0, 4.0), laptop=RATIOS, paper=RATIOS)
    needed: list[float] = []
    curves: dict[str, Curve] = {}
    for case, (dim, rank) in enumerate(cases):
        distances: list[float] = []
        for done, ratio in enumerate(ratios):
            problem = Problem.draw(trial, dim, rank, ratio)
            distances.append(float(match_subspaces(find(problem), problem.true)[1].max()))
            trial.report((case + (done + 1) / len(ratios)) / len(cases))
        enough = 2 * ratios[-1]
        for ratio, distance in zip(reversed(ratios), reversed(distances), strict=True):
            if distance >= 0.3:
                break
            enough = ratio
        needed.append(enough)
        curves[f"distance to the truth, rank {rank} in {dim} dimensions"] = Curve(
            ratios, distances, x_label="samples to a dimension"
        )
    narrow, high, wide = needed
    return Result({"samples_per_rank": max(narrow, high), "growth": high / narrow, "ambient": wide / narrow}, curves)


Learn = Callable[[Trial, Problem], Callable[[Tensor, float], Tensor]]
"""Learns a denoiser `(x, sigma) -> clean`."""


def by_low_rank(trial: Trial, problem: Problem) -> Callable[[Tensor, float], Tensor]:
    """The low-rank denoiser."""
    bases = low_rank(problem)
    return lambda x, sigma: low_rank_denoise(x, bases, 1.0, sigma)


def by_k_subspaces(trial: Trial, problem: Problem) -> Callable[[Tensor, float], Tensor]:
    """The exact denoiser's formula with the subspaces of K-subspaces."""
    bases = k_subspaces(problem)
    return lambda x, sigma: low_rank_denoise(x, bases, 1.0, sigma)


def by_samples(trial: Trial, problem: Problem) -> Callable[[Tensor, float], Tensor]:
    """The best denoiser of the training samples themselves: what perfect memory would give."""
    x0 = problem.x0
    return lambda x, sigma: (-torch.cdist(x, x0).square() / (2 * sigma**2)).softmax(1) @ x0


def by_network(trial: Trial, problem: Problem) -> Callable[[Tensor, float], Tensor]:
    """A network without the structure."""
    dim = problem.x0.shape[1]
    size = float(problem.x0.square().mean().sqrt())
    model = trial.seeded(lambda: EDMPreconditioned(DenoisingMLP(dim, hidden=128, blocks=2), size, EDM()))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    steps, draws = 3 * problem.steps, problem.generator
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)

    def loss(step: int) -> Tensor:
        x0 = problem.x0[torch.randint(len(problem.x0), (128,), generator=draws)]
        t = torch.exp(math.log(0.05) + math.log(40) * torch.rand(128, generator=draws))
        return denoising_loss(model, x0, t, torch.randn(x0.shape, generator=draws), weight=model.weight(t))

    descend(optimizer, loss, range(steps), anneal=decay)
    return lambda x, sigma: model(x, torch.full((len(x),), sigma))


@torch.no_grad()
def _excess(denoise: Callable[[Tensor, float], Tensor], problem: Problem, trial: Trial) -> float:
    """Its squared error on unseen samples over the exact denoiser's, less one; the mean over noise levels."""
    draws, found = trial.generator(3), []
    x0 = problem.mixture.sample(1000, generator=draws)
    for sigma in LEVELS:
        x = x0 + sigma * torch.randn(x0.shape, generator=draws)
        errors = [
            (clean - x0).square().mean() for clean in (denoise(x, sigma), low_rank_denoise(x, problem.true, 1.0, sigma))
        ]
        found.append(float(errors[0] / errors[1]) - 1)
    return sum(found) / len(found)


def denoise(trial: Trial, learn: Learn) -> Result:
    """The excess error on unseen samples of two subspaces of 3 dimensions in 48, by the number of training samples."""
    ratios = trial.pick(smoke=(2, 64), laptop=(2, 8, 64), paper=(2, 4, 8, 16, 32, 64, 128))
    excess: dict[int, float] = {}
    for done, ratio in enumerate(ratios):
        problem = Problem.draw(trial, 48, 3, ratio)
        excess[ratio] = _excess(learn(trial, problem), problem, trial)
        trial.report((done + 1) / len(ratios))
    curve = Curve([float(ratio) for ratio in ratios], list(excess.values()), x_label="samples to a dimension")
    return Result({"excess_2": excess[2], "excess_64": excess[64]}, {"excess error": curve})
