"""Find weights that put every training sample of two classes on its side, in as few full passes as possible."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import nnls
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Perceptron

from trimtab.data import load
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

GAMMAS = (0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)


@dataclass(frozen=True)
class Separated:
    """How a contestant came to separate the data.

    Attributes:
        passes: over all samples, until none is on the wrong side; the budget if some still are.
        peak_loss: largest mean logistic loss on the way; None where the contestant does not follow it.
    """

    passes: int
    peak_loss: float | None = None


# From the step size, samples (n, d), labels 0 and 1, the most passes allowed, and a seed. Step sizes are as in
# GAMMAS; a contestant without one is called for each all the same, and returns the same each time.
Solve = Callable[[float, np.ndarray, np.ndarray, int, int], Separated]


def fitted(estimator: Any, X: np.ndarray, y: np.ndarray) -> Separated:
    """Fits one of `trimtab.optim`'s separating estimators, whose iterations are full passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(X, y)
    return Separated(estimator.n_iter_, float(estimator.history_["loss"].max()))


def online_perceptron(gamma: float, X: np.ndarray, y: np.ndarray, max_passes: int, seed: int) -> Separated:
    """scikit-learn's `Perceptron`, sample by sample in an order drawn anew every pass."""
    model = Perceptron(fit_intercept=False, max_iter=1, tol=None, random_state=seed)
    for passes in range(1, max_passes + 1):
        model.partial_fit(X, y, classes=[0, 1])
        if ((2 * y - 1) * (X @ model.coef_[0]) > 0).all():
            return Separated(passes)
    return Separated(max_passes)


@dataclass(frozen=True)
class LinearSeparation(Task):
    """Separate two classes by a hyperplane through the origin, with step sizes from 0.1 to 10,000.

    Attributes:
        problem: "digits 0 1", "digits 3 8" (four fifths of the training images, drawn by the seed, with a constant
            pixel), "digits 3 8, five of 3" (as before with five threes), "iris" (setosa against the rest, four
            fifths), "synthetic" (300 points in 20 dimensions at least 0.1 from a random hyperplane), "hard" (2 points
            that 198 others outvote) or "balanced" (20 of each).
    """

    problem: str = "hard"

    name: ClassVar[str] = "linear-separation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        **{f"passes_at_{gamma:g}": Metric(f"passes at step size {gamma:g}", best="min") for gamma in GAMMAS},
        "least_passes": Metric("passes at the best step size", best="min"),
        "speed_up": Metric("passes at step size 1 over those at 10,000"),
        "peak_loss_at_1": Metric("peak logistic loss at step size 1", best=None),
        "peak_loss_at_10000": Metric("peak logistic loss at step size 10,000", best=None),
        "share_of_bound": Metric("largest share of the bound on normalised steps", best="min"),
        "seconds": Metric("time of all step sizes (s)", best="min"),
    }

    def solve(self, solve: Solve) -> Arm:
        """A contestant, called once for each step size."""
        return self.arm(solve=solve)

    def run(self, trial: Trial, **options: Any) -> Result:
        solve: Solve = options["solve"]
        X, y = draw(self.problem, trial.generator())
        most = trial.pick(smoke=300, laptop=20_000, paper=100_000)
        bound = _bound(X * (2.0 * y - 1)[:, None])
        found, started = {}, time.perf_counter()
        for i, gamma in enumerate(GAMMAS):
            found[gamma] = solve(gamma, X, y, most, trial.seed)
            trial.report((i + 1) / len(GAMMAS))
        seconds = time.perf_counter() - started
        passes = {gamma: float(one.passes) for gamma, one in found.items()}
        metrics = {
            **{f"passes_at_{gamma:g}": count for gamma, count in passes.items()},
            "least_passes": min(passes.values()),
            "speed_up": passes[1.0] / passes[10_000.0],
            "share_of_bound": max(count / bound(gamma) for gamma, count in passes.items()),
            "seconds": seconds,
        }
        curves = {"passes": Curve(GAMMAS, list(passes.values()))}
        peaks = [one.peak_loss for one in found.values() if one.peak_loss is not None]
        if len(peaks) == len(GAMMAS):
            metrics |= {"peak_loss_at_1": peaks[1], "peak_loss_at_10000": peaks[-1]}
            curves["peak_loss"] = Curve(GAMMAS, peaks)
        return Result(metrics, curves)


def draw(problem: str, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Samples (n, d) and labels 0 and 1 of one of `LinearSeparation`'s problems.

    Raises:
        ValueError: there is no such problem.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def signed(samples: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Samples to bring to one side, dealt to the two classes at random."""
        labels = torch.rand(len(samples), generator=generator) < 0.5
        labels[:2] = torch.tensor([True, False])
        return (samples * (2.0 * labels - 1)[:, None]).numpy(), labels.int().numpy()

    def part(X: torch.Tensor, y: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        kept = torch.randperm(len(X), generator=generator)[: 4 * len(X) // 5]
        return X[kept].numpy(), y[kept].int().numpy()

    if problem.startswith("digits"):
        data = load("digits").classes([int(digit) for digit in problem.split(",")[0].split()[1:]])
        X = torch.hstack([data.x_train.flatten(1).double(), torch.ones(len(data.x_train), 1, dtype=torch.float64)])
        y = data.y_train
        if problem.endswith("five of 3"):
            few = torch.randperm(int((y == 0).sum()), generator=generator)[:5]
            X, y = torch.vstack([X[y == 0][few], X[y == 1]]), torch.tensor([0] * 5 + [1] * int((y == 1).sum()))
            return X.numpy(), y.int().numpy()
        return part(X, y)
    if problem == "iris":
        X, y = load_iris(return_X_y=True)
        return part(torch.from_numpy(X), torch.from_numpy(y) == 0)
    if problem == "synthetic":
        direction = torch.nn.functional.normalize(normal(20), dim=0)
        points = torch.nn.functional.normalize(normal(3_000, 20), dim=1)
        points = points[(points @ direction).abs() > 0.1][:300]
        return points.numpy(), (points @ direction > 0).int().numpy()
    if problem in ("hard", "balanced"):
        low, high = (2, 198) if problem == "hard" else (20, 20)
        samples = 0.02 * normal(low + high, 5)
        samples[:, 0] += 0.3
        samples[:low, 1] -= 1
        samples[low:, 1] += 1
        return signed(samples)
    raise ValueError(f"problem must be one that LinearSeparation names, got {problem!r}")


def _bound(Z: np.ndarray) -> Callable[[float], float]:
    """Most iterations of Normalized LR+GD at a step size (Theorem 6.1), for samples to bring to one side."""
    # The largest margin is the distance of the samples' hull from the origin, a non-negative least-squares problem.
    weights, _ = nnls(np.vstack([Z.T, np.ones(len(Z))]), np.append(np.zeros(Z.shape[1]), 1.0))
    margin = float(np.linalg.norm(weights @ Z)) / float(weights.sum())
    radius = float(np.linalg.norm(Z, axis=1).max())
    return lambda gamma: (radius / margin) ** 2 + 2 * math.log(2 * len(Z) - 1) / (gamma * margin**2)
