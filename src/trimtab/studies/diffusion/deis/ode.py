"""Solving the sampling ODE of a Gaussian mixture whose denoiser is exact, so that only the sampler can err."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.diffusion import CountNFE, VPLinear, deis_rk, grids
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.mixtures import mixture
from trimtab.studies.tools.sample_quality import sliced_wasserstein
from trimtab.studies.tools.samplers import GRIDS, Sampler

METRICS = {
    "rmse_10": Metric("RMSE to the exact solution, 10 evaluations", best="min"),
    "rmse_5": Metric("RMSE to the exact solution, 5 evaluations", best="min"),
    "rmse_20": Metric("RMSE to the exact solution, 20 evaluations", best="min"),
    "median_10": Metric("median error of a sample, 10 evaluations", best="min"),
    "sliced_wasserstein_10": Metric("sliced Wasserstein distance to the data, 10 evaluations", best="min"),
}


def solve(trial: Trial, sampler: Sampler, evaluations: int = 1) -> Result:
    """The distance to the exact solution from the same noise, in few evaluations.

    Every contestant gets the same four time grids and is shown, at each number of evaluations, with the one that is
    best on other noise. The data are a mixture fitted to digits, a ring at the smoke budget.

    Args:
        trial: the run.
        sampler: the contestant.
        evaluations: what it makes per step.
    """
    budgets = trial.pick(smoke=(5, 10, 20), laptop=(5, 7, 10, 15, 20), paper=(5, 7, 10, 15, 20, 50))
    size = trial.pick(smoke=64, laptop=450, paper=3000)
    data = mixture(trial.pick(smoke="ring8", laptop="digits", paper="digits"))
    denoiser = CountNFE(data.denoiser(VPLinear()))
    noise = denoiser.schedule.prior(size + size // 3, data.dim, generator=trial.generator(), dtype=torch.float64)
    fine = trial.pick(smoke=20, laptop=100, paper=400)
    exact = trial.cached(
        lambda: deis_rk(denoiser, noise, grids.log_snr(denoiser.schedule, fine), method="rk4"),
        key=f"exact samples {len(noise)} samples {fine} steps seed {trial.seed}",
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
            key=lambda times: _rmse(sampler(denoiser, held_out, times), held_out_exact),
        )
        x = sampler(denoiser, test, times)
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
            "rmse": Curve(counts, list(errors.values()), x_label="evaluations"),
            "median": Curve(counts, list(typical.values()), x_label="evaluations"),
            "sliced_wasserstein": Curve(counts, list(distances.values()), x_label="evaluations"),
        },
    )


def _rmse(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).square().mean().sqrt())
