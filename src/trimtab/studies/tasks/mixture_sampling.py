"""Sampling from a Gaussian mixture whose denoiser is exact, so that only the sampler can err."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.data import load
from trimtab.diffusion import AnalyticGMM, CountNFE, VPLinear, degrade, deis, deis_rk, grids
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.studies.sample_quality import sliced_wasserstein
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

Target = Literal["ring8", "digits"]
Sampler = Callable[[DenoiserLike, Tensor, Tensor], Tensor]

GRIDS: Mapping[str, Callable[[VPLinear, int], Tensor]] = {
    "uniform": functools.partial(grids.power, p=1.0),
    "quadratic": grids.power,
    "karras": grids.karras,
    "log-SNR": grids.log_snr,
}


@dataclass(frozen=True)
class MixtureSampling(Task):
    """Solve the sampling ODE of an exact denoiser in few evaluations.

    What is measured is the distance to the exact solution from the same noise. Every contestant gets the same four time
    grids and is shown, at each number of evaluations, with the one that is best on other noise.

    Attributes:
        target: "digits", a mixture of 30 low-rank Gaussians in 64 dimensions fitted to scikit-learn's digits, or
            "ring8", eight modes on a circle; at the smoke budget always ring8.
        shrink: how far the denoiser's predictions are pulled to the data's mean; 0 is the exact denoiser.
    """

    target: Target = "digits"
    shrink: float = 0.0

    name: ClassVar[str] = "mixture-sampling"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "rmse_10": Metric("RMSE to the exact solution, 10 evaluations", best="min"),
        "rmse_5": Metric("RMSE, 5 evaluations", best="min"),
        "rmse_20": Metric("RMSE, 20 evaluations", best="min"),
        "median_10": Metric("median error of a sample, 10 evaluations", best="min"),
        "sliced_wasserstein_10": Metric("sliced Wasserstein distance to the data, 10 evaluations", best="min"),
    }

    def sample(self, sampler: Sampler | None = None, evaluations: int | None = None) -> Arm:
        """A contestant `sampler(denoiser, x, times)` with the evaluations it makes per step (1); without one, DDIM."""
        return self.arm(sampler=sampler, evaluations=evaluations)

    def run(self, trial: Trial, **options: Any) -> Result:
        solve: Sampler = options.get("sampler", functools.partial(deis, order=0))
        evaluations: int = options.get("evaluations", 1)
        budgets = trial.pick(smoke=(5, 10, 20), laptop=(5, 7, 10, 15, 20, 50), paper=(5, 7, 10, 15, 20, 50))
        size = trial.pick(smoke=64, laptop=768, paper=3000)
        data = mixture(trial.pick(smoke="ring8", laptop=self.target, paper=self.target))
        denoiser = CountNFE(degrade(data.denoiser(VPLinear()), shrink=self.shrink))
        noise = denoiser.schedule.prior(size + size // 3, data.dim, generator=trial.generator(), dtype=torch.float64)
        fine = trial.pick(smoke=20, laptop=100, paper=400)
        exact = trial.cached(
            lambda: deis_rk(denoiser, noise, grids.log_snr(denoiser.schedule, fine), method="rk4"),
            key=f"mixture-sampling-exact {self} {trial.budget} {len(noise)} samples {fine} steps seed {trial.seed}",
        )
        (test, held_out), (test_exact, held_out_exact) = noise.split(size), exact.split(size)
        true = data.sample(2 * size, generator=trial.generator(1))

        counts: list[float] = []
        errors: dict[int, float] = {}
        typical: dict[int, float] = {}
        distances: dict[int, float] = {}
        for done, budget in enumerate(budgets):
            steps = budget // evaluations
            times = min(
                (make(VPLinear(), steps) for make in GRIDS.values()),
                key=lambda times: _rmse(solve(denoiser, held_out, times), held_out_exact),
            )
            x = solve(denoiser, test, times)
            counts.append(float(denoiser.count))
            errors[budget] = _rmse(x, test_exact)
            typical[budget] = float((x - test_exact).square().mean(1).sqrt().median())
            distances[budget] = sliced_wasserstein(x, true, generator=trial.generator(2))
            trial.report((done + 1) / len(budgets))
        return Result(
            {
                **{f"rmse_{budget}": errors[budget] for budget in (5, 10, 20)},
                "median_10": typical[10],
                "sliced_wasserstein_10": distances[10],
            },
            {
                "rmse": Curve(counts, list(errors.values())),
                "median": Curve(counts, list(typical.values())),
                "sliced_wasserstein": Curve(counts, list(distances.values())),
            },
        )


@functools.cache
def mixture(target: Target) -> AnalyticGMM:
    """The data of a target, in float64.

    Raises:
        ValueError: for an unknown target.
    """
    if target == "ring8":
        return AnalyticGMM.ring(8, dtype=torch.float64)
    if target == "digits":
        return _digits_mixture()
    raise ValueError(f"target must be 'ring8' or 'digits', got {target!r}")


def _digits_mixture(clusters: int = 3, rank: int = 8, floor: float = 0.02) -> AnalyticGMM:
    """Per class three k-means clusters, each a Gaussian of rank 8 plus a little isotropic noise; pixels in [-1, 1]."""
    from sklearn.cluster import KMeans

    data = load("digits")
    x = torch.cat([data.x_train, data.x_test]).flatten(1).double() * 2 - 1
    y = torch.cat([data.y_train, data.y_test])
    weights, means, covs, labels = [], [], [], []
    for label in range(data.num_classes):
        members = x[y == label]
        assigned = torch.from_numpy(KMeans(clusters, n_init=1, random_state=0).fit_predict(members.numpy()))
        for cluster in range(clusters):
            part = members[assigned == cluster]
            values, vectors = torch.linalg.eigh(torch.cov(part.T))
            main = vectors[:, -rank:]
            weights.append(len(part) / len(x))
            means.append(part.mean(0))
            covs.append((main * values[-rank:]) @ main.T + floor**2 * torch.eye(x.shape[1], dtype=x.dtype))
            labels.append(label)
    return AnalyticGMM(
        torch.tensor(weights, dtype=x.dtype), torch.stack(means), torch.stack(covs), torch.tensor(labels)
    )


def _rmse(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).square().mean().sqrt())
