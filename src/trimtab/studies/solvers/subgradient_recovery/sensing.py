"""Matrices seen through Gaussian measurements, and descent on other losses from the subgradient method's start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trimtab.solvers.subgradient_recovery import sign_spectral_start
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tasks.matrix_recovery import Instance, Solution, fitted, low_rank, seen_through_gaussians

METRICS: Mapping[str, Metric] = {
    "error": Metric("relative error of the matrix", best="min"),
    "seconds": Metric("time of the fit (s)", best="min"),
}

PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
DELTAS = (0.003, 0.03, 0.3, 3.0)
RATES, DECAYS = (0.1, 0.3), (None, 0.985)


@dataclass(frozen=True)
class Sensing:
    """Recover a positive semidefinite matrix of unknown rank.

    Attributes:
        size: of the matrix.
        rank: of the true one.
        measurements: how many.
        outliers: share of them that is grossly wrong.
        magnitude: standard deviation of what is added to those, in units of their size.
    """

    size: int = 20
    rank: int = 3
    measurements: int = 1200
    outliers: float = 0.5
    magnitude: float = 10.0

    def recover(self, solver: Callable[..., Solution], settings: Sequence[Mapping[str, Any]], trial: Trial) -> Result:
        """One run with the one of the settings that predicts a fifth of the measurements best, held out."""
        generator = trial.generator()
        size = trial.pick(smoke=min(self.size, 12), laptop=self.size, paper=self.size)
        count = trial.pick(smoke=min(self.measurements, 400), laptop=self.measurements, paper=self.measurements)
        truth = low_rank(size, self.rank, generator)
        seen = seen_through_gaussians(truth, count, generator, outliers=self.outliers, magnitude=self.magnitude)
        seen = replace(seen, steps=trial.pick(smoke=100, laptop=500, paper=2000))
        best, scores = settings[0], []
        if len(settings) > 1:
            part, held = seen.parted()
            for setting in settings:
                scores.append(part_error(solver, setting, part, seen, held))
                trial.report(len(scores) / (len(settings) + 1))
            best = settings[scores.index(min(scores))]
        solution, seconds = fitted(lambda instance: solver(instance, **best), seen)
        shown = range(0, len(solution.losses), max(1, len(solution.losses) // 40))
        return Result(
            {"error": float((solution.matrix - truth).norm() / truth.norm()), "seconds": seconds},
            {"mean absolute residual": Curve([k + 1 for k in shown], [solution.losses[k] for k in shown], "step")},
        )


def part_error(
    solver: Callable[..., Solution], setting: Mapping[str, Any], part: Instance, whole: Instance, held: torch.Tensor
) -> float:
    """The error on held-out measurements of what a solver makes of the others."""
    solution, _ = fitted(lambda instance: solver(instance, **setting), part)
    return whole.error(solution.matrix, held)


def factored_descent(
    instance: Instance, *, lr: float, delta: float | None = None, decay: float | None = None, init_scale: float = 1e-6
) -> Solution:
    """Gradient descent on a factor with as many columns as the matrix has, for the squared or Huber's loss.

    Args:
        instance: of a positive semidefinite matrix.
        lr: step size; where the loss is squared and `decay` None, stable up to about one.
        delta: where Huber's loss turns linear, in units of the median measurement; None for the squared loss.
        decay: normalise the gradient and shrink the step by this every time, as the subgradient method does.
        init_scale: size of the start, which is the subgradient method's.
    """
    forward, adjoint = instance.operator
    y, count = instance.values, len(instance.values)
    factor = init_scale * sign_spectral_start(y, adjoint, instance.shape[0])
    bound = None if delta is None else delta * float(y.abs().median())
    gain = _gain(instance)
    losses = []
    for step in range(instance.steps):
        residual = forward(factor @ factor.T) - y
        losses.append(float(residual.abs().mean()))
        pull = residual if bound is None else residual.clamp(-bound, bound)
        slope = adjoint(pull) / count
        slope = (slope + slope.T) / 2
        length = lr / gain if decay is None else lr * decay**step / float(slope.norm())
        factor = factor - 2 * length * (slope @ factor)
    return Solution(factor @ factor.T, instance.steps, losses)


def _gain(instance: Instance) -> float:
    """Mean square of a measurement of a random matrix with entries of variance one, as a share of the entries."""
    probe = torch.randn(instance.shape, generator=torch.Generator().manual_seed(0), dtype=instance.values.dtype)
    return float(instance.operator[0](probe).square().mean() / probe.square().sum())


SQUARED = [{"lr": lr, "decay": decay} for lr in RATES for decay in DECAYS]
# As the pull of a measurement is bounded by Huber's threshold, steps are larger for it.
HUBER = [
    {"delta": delta, "decay": decay, "lr": lr if decay else lr / min(1.0, delta)}
    for delta in DELTAS
    for lr in RATES
    for decay in DECAYS
]
NUCLEAR = [{"penalty": penalty} for penalty in PENALTIES]
HUBER_NUCLEAR = [{"penalty": penalty, "delta": delta} for penalty in PENALTIES[::2] for delta in DELTAS]
