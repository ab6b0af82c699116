"""Choosing discrete values for the least worst error: fixed-point filters, images of two greys, few-bit layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.solvers.minmax_violation import compensated_rounding, relaxation
from trimtab.solvers.minmax_violation.designs import filter_rows, parallel_projections, quantization_grid
from trimtab.studies.engine.study import Metric, Result, Trial
from trimtab.studies.tools.trained_once import trained_once
from trimtab.studies.tools.training import Training, fitted

_METRICS = {
    "violation": Metric("worst error, as a share of rounding's", best="min"),
    "worst_error": Metric("worst error", best="min"),
    "gap": Metric("excess over the optimum (%)", best="min", percent=True),
    "seconds": Metric("time (s)", best="min"),
    "wrong_pixels": Metric("wrong pixels (%)", best="min", percent=True),
    "accuracy": Metric("test accuracy (%)", percent=True),
    "full_accuracy": Metric("test accuracy at full precision (%)", best=None, percent=True),
}


def metrics(*names: str) -> dict[str, Metric]:
    """Those of a problem, the first one to order by."""
    return {name: _METRICS[name] for name in names}


@dataclass(frozen=True)
class Instance:
    """Problems min_x max_i |(A x - b)_i| that share their matrix, with evenly spaced levels for each variable.

    Attributes:
        A: (m, n), in float64.
        b: (problems, m).
        levels: (problems, n, levels).
        weights: (problems, n) continuous values that `A` maps to `b`, where there are such.
    """

    A: Float[Tensor, "m n"]
    b: Float[Tensor, "problems m"]
    levels: Float[Tensor, "problems n levels"]
    weights: Float[Tensor, "problems n"] | None = None

    def continuous(self) -> Float[Tensor, "problems n"]:
        """The weights, or the best values between the outer levels where there are none."""
        if self.weights is not None:
            return self.weights
        return relaxation(self.A, self.b, self.levels[..., 0], self.levels[..., -1])[0]

    def nearest(self, values: Float[Tensor, "problems n"]) -> Float[Tensor, "problems n"]:
        """The nearest level of each variable."""
        place = (self.levels - values[..., None]).abs().argmin(2, keepdim=True)
        return self.levels.gather(2, place)[..., 0]

    def violation(self, values: Float[Tensor, "problems n"]) -> Float[Tensor, " problems"]:
        """The worst error of each problem."""
        return (values @ self.A.T - self.b).abs().amax(1)


# From an instance to values (problems, n), all of them among the levels.
Solver = Callable[[Instance], Tensor]


def rounding(instance: Instance) -> Tensor:
    """Each continuous value to its nearest level."""
    return instance.nearest(instance.continuous())


def gptq(instance: Instance) -> Tensor:
    """GPTQ's rounding, variables with large inputs first (its "act-order"), with its damping of 0.01."""
    order = instance.A.square().sum(0).argsort(descending=True, stable=True)
    index = compensated_rounding(instance.A, instance.continuous(), instance.levels, order[None])[:, 0]
    return instance.levels.gather(2, index[..., None])[..., 0]


def least_squares(instance: Instance) -> Tensor:
    """The best values between the outer levels in least squares, each to its nearest level."""
    from scipy.optimize import lsq_linear

    found = [
        lsq_linear(instance.A.numpy(), b.numpy(), (levels[:, 0].numpy(), levels[:, -1].numpy())).x
        for b, levels in zip(instance.b, instance.levels, strict=True)
    ]
    return instance.nearest(torch.from_numpy(np.stack(found)))


def branch_and_bound(seconds: float) -> Solver:
    """HiGHS, a mixed-integer solver, for at most so many seconds a problem."""
    return lambda instance: highs(instance, seconds)[0]


def highs(instance: Instance, seconds: float) -> tuple[Tensor, bool]:
    """What `scipy.optimize.milp` finds, rounding where that is nothing; and whether all of it is proven optimal."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, ones = instance.A.shape[1], np.ones((len(instance.A), 1))
    found, proven = [], True
    nearest = rounding(instance)
    for b, levels, fallback in zip(instance.b, instance.levels, nearest, strict=True):
        low, step = levels[:, 0], levels[:, 1] - levels[:, 0]
        rows = (instance.A * step).numpy()
        target = (b - instance.A @ low).numpy()
        solved = milp(
            np.append(np.zeros(n), 1.0),
            constraints=[
                LinearConstraint(np.hstack([rows, -ones]), -np.inf, target),
                LinearConstraint(np.hstack([rows, ones]), target, np.inf),
            ],
            integrality=np.append(np.ones(n), 0.0),
            bounds=Bounds(np.zeros(n + 1), np.append(np.full(n, float(levels.shape[1] - 1)), np.inf)),
            options={"time_limit": seconds, "mip_rel_gap": 1e-6},
        )
        proven &= solved.status == 0
        if solved.x is None:
            found.append(fallback)
        else:
            found.append(low + step * torch.from_numpy(solved.x[:n].round()))
    return torch.stack(found), proven


@dataclass(frozen=True)
class Filter:
    """A low-pass filter's fixed-point coefficients; the seed draws its bands.

    The pass band ends between 0.275 and 0.325, the stop band starts 0.15 further.

    Attributes:
        taps: of the filter.
        bits: of a coefficient.
        known: whether HiGHS is run until it has proven the optimum, for "gap"; up to 33 taps take it seconds.
    """

    taps: int = 33
    bits: int = 8
    known: bool = False

    def instance(self, trial: Trial) -> Instance:
        """The trial's filter."""
        taps = trial.pick(smoke=min(self.taps, 13), laptop=self.taps, paper=self.taps)
        edge = 0.275 + 0.05 * float(torch.rand(1, generator=trial.generator(), dtype=torch.float64))
        rows, gains, _ = filter_rows(taps, [0, edge, edge + 0.15, 1], [1, 0], density=8)
        step = 2.0 ** (1 - self.bits)
        levels = step * torch.arange(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1), dtype=torch.float64)
        return Instance(rows, gains[None], levels.expand(1, rows.shape[1], -1))

    def solve(self, trial: Trial, solver: Solver) -> Result:
        """How well, and how fast, a solver does it."""
        instance = self.instance(trial)
        values, seconds = timed(solver, instance)
        trial.report(0.7)
        metrics = _errors(instance, values, seconds)
        if self.known:
            metrics["gap"] = metrics["worst_error"] / self._optimum(trial, instance) - 1
        return Result(metrics)

    def until_as_good(self, trial: Trial, solver: Solver) -> Result:
        """HiGHS until it is as good as this solver: in `seconds`, its time to the same worst error.

        It is started anew with limits that grow by the root of two until it is; the last run is timed.
        """
        instance = self.instance(trial)
        target = float(instance.violation(solver(instance)))
        limit, longest = 0.1, trial.pick(smoke=5.0, laptop=60.0, paper=3600.0)
        while True:
            values, seconds = timed(branch_and_bound(limit), instance)
            if float(instance.violation(values)) <= target * (1 + 1e-6) or limit > longest:
                return Result(_errors(instance, values, seconds))
            limit *= 2**0.5

    def _optimum(self, trial: Trial, instance: Instance) -> float:
        limit = trial.pick(smoke=20.0, laptop=120.0, paper=3600.0)

        def build() -> Tensor:
            values, proven = highs(instance, limit)
            if not proven:
                raise RuntimeError(f"HiGHS has not proven an optimum in {limit:g} seconds; take fewer taps")
            return instance.violation(values)

        return float(trial.cached(build, key=f"optimum of {self} seed {trial.seed}"))


def tomography(trial: Trial) -> tuple[Instance, Tensor]:
    """A picture (1, pixels) of two or three random ellipses, and its projections at 4 angles with uniform errors."""
    side, generator = trial.pick(smoke=8, laptop=16, paper=64), trial.generator()
    picture = ellipses(side, generator).flatten()
    angles = torch.arange(4, dtype=torch.float64) * torch.pi / 4
    rows = parallel_projections(side, angles).flatten(0, 1)
    rows = rows[rows.sum(1) > 0]  # bins that no pixel reaches say nothing
    error = torch.rand(len(rows), generator=generator, dtype=torch.float64) - 0.5
    levels = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(1, side * side, 2)
    return Instance(rows, (rows @ picture + error)[None], levels), picture[None]


def reconstruct(trial: Trial, solver: Solver) -> Result:
    """How well a solver finds the picture's two greys from its projections."""
    instance, picture = tomography(trial)
    values, seconds = timed(solver, instance)
    wrong = float((values != picture).double().mean())
    return Result({**_errors(instance, values, seconds), "wrong_pixels": wrong})


def quantise(trial: Trial, solver: Solver, *, bits: int) -> Result:
    """How well a network with few-bit weights does.

    The layers of an MLP, one after the other, each for the inputs that the quantised ones before it give; a problem
    for each output.
    """
    data = load(trial.pick(smoke="digits", laptop="mnist", paper="mnist"))
    data = data.subset(trial.pick(smoke=1000, laptop=12_000, paper=None), None, generator=trial.generator())
    x_train, x_test = (_small(images) for images in (data.x_train, data.x_test))
    hidden = trial.pick(smoke=(16,), laptop=(64, 32), paper=(256, 128))
    model = trial.seeded(lambda: nets.mlp(x_train[0].numel(), hidden, data.num_classes)).to(trial.device)
    known, classes, epochs = (x_train, data.y_train), data.num_classes, trial.pick(smoke=10, laptop=8, paper=30)
    train = lambda: fitted(trial, Training(), model, known, num_classes=classes, epochs=epochs)
    trained_once(trial, model, train, key=f"mlp {hidden} seed {trial.seed}").eval().double()
    samples = trial.pick(smoke=64, laptop=512, paper=2048)
    chosen = torch.randperm(len(x_train), generator=trial.generator(3))[:samples]
    x, full = x_train[chosen].double(), _accuracy(model, x_test, data.y_test)
    shares, errors, seconds = [], [], 0.0
    layers = [*cast(nn.Sequential, model.features), cast(nn.Module, model.head)]
    for done, layer in enumerate(layers, 1):
        if isinstance(layer, nn.Linear):
            instance = _layer(layer.weight.detach().clone(), x, bits)
            values, took = timed(solver, instance)
            seconds += took
            errors.append(instance.violation(values))
            shares.append(errors[-1] / instance.violation(rounding(instance)))
            with torch.no_grad():
                layer.weight.copy_(values)
        with torch.no_grad():
            x = layer(x)
        trial.report(done / len(layers))
    return Result(
        {
            "violation": float(torch.cat(shares).mean()),
            "worst_error": float(torch.cat(errors).mean()),
            "seconds": seconds,
            "accuracy": _accuracy(model, x_test, data.y_test),
            "full_accuracy": full,
        }
    )


def _layer(weight: Float[Tensor, "out in"], inputs: Float[Tensor, "samples in"], bits: int) -> Instance:
    scale, zero = quantization_grid(weight, bits)
    levels = scale[:, None] * (torch.arange(2**bits) - zero[:, None])
    return Instance(inputs, weight @ inputs.T, levels[:, None].expand(-1, weight.shape[1], -1), weight)


def _errors(instance: Instance, values: Tensor, seconds: float) -> dict[str, float]:
    worst = float(instance.violation(values))
    share = worst / float(instance.violation(rounding(instance)))
    return {"violation": share, "worst_error": worst, "seconds": seconds}


def timed(solver: Solver, instance: Instance) -> tuple[Tensor, float]:
    """What a solver returns, and its processor time: a run has one thread, and the machine may be shared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of HiGHS, about limits
        started = time.process_time()
        values = solver(instance)
        return values, time.process_time() - started


def ellipses(side: int, generator: torch.Generator) -> Float[Tensor, "side side"]:
    """Two or three ellipses of ones, anywhere in the picture's middle and turned at random."""
    axis = torch.linspace(-1, 1, side, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    picture = torch.zeros(side, side, dtype=torch.float64)
    for _ in range(int(torch.randint(2, 4, (1,), generator=generator))):
        u = torch.rand(5, generator=generator, dtype=torch.float64)
        turn = torch.pi * u[0]
        right, down = x - (u[1] - 0.5), y - (u[2] - 0.5)
        along, across = right * turn.cos() + down * turn.sin(), down * turn.cos() - right * turn.sin()
        inside = (along / (0.2 + 0.4 * u[3])).square() + (across / (0.2 + 0.4 * u[4])).square() < 1
        picture[inside] = 1.0
    return picture


def _small(images: Tensor) -> Tensor:
    """MNIST at 14 x 14 pixels; digits as they are."""
    return nn.functional.avg_pool2d(images, 2) if images.shape[-1] > 16 else images


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x.double()).argmax(1) == y).double().mean())
