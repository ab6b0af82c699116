"""Learn a halfspace under label noise, and say whether the samples are what the learner relies on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from trimtab.solvers.gaussian_moments import moment_gaps, num_moments
from trimtab.studies.engine.study import Metric, Result, Trial

Matrix = NDArray[np.float64]
Noise = Literal["massart", "adversarial"]
Marginal = Literal["gaussian", "laplace", "uniform", "clusters", "correlated", "slab"]
MARGINALS: tuple[Marginal, ...] = get_args(Marginal)

_SLAB = 0.1  # half-width of the slab, in standard deviations


@dataclass(frozen=True)
class Sample:
    """What a contestant is given.

    Attributes:
        X: (n, d) samples.
        y: (n,) labels, -1 and 1.
        noise: of the labels; its kind and rate are known, the samples' law is not.
        rate: the most that a label is wrong with (massart), or the share of wrong labels (adversarial).
        seed: for random starts.
    """

    X: Matrix
    y: Matrix
    noise: Noise
    rate: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """A halfspace through the origin, and whether the contestant vouches for it."""

    w: Matrix
    accepted: bool


Learn = Callable[[Sample], Answer]


def logistic(sample: Sample) -> Answer:
    """scikit-learn's `LogisticRegression` without an intercept, which never rejects."""
    model = LogisticRegression(fit_intercept=False).fit(sample.X, sample.y)
    return Answer(model.coef_[0], accepted=True)


def svm(sample: Sample) -> Answer:
    """scikit-learn's `LinearSVC` without an intercept, which never rejects."""
    model = LinearSVC(fit_intercept=False, random_state=sample.seed).fit(sample.X, sample.y)
    return Answer(model.coef_[0], accepted=True)


def moments_only(sample: Sample, *, degree: int = 4, delta: float = 0.05, tolerance: float = 0.1) -> Answer:
    """Logistic regression, accepted if the samples' moments are a Gaussian's: a test that sees no label and no fit."""
    log_term = math.log(2 * num_moments(sample.X.shape[1], degree) / delta)
    gaps = moment_gaps(sample.X, degree, log_term, tolerance)
    return Answer(logistic(sample).w, all(gap.gap <= gap.threshold for gap in gaps))


METRICS: Mapping[str, Metric] = {
    "excess_accepted": Metric("largest excess error among accepted samples (%)", best="min", percent=True),
    "accepts_gaussian": Metric("Gaussian samples accepted (%)", percent=True),
    "rejects_others": Metric("share of the five other laws rejected (%)", percent=True),
    **{f"excess_{law}": Metric(f"excess error on {law} samples (%)", best="min", percent=True) for law in MARGINALS},
    **{f"accepts_{law}": Metric(f"{law} samples accepted (%)", best=None, percent=True) for law in MARGINALS[1:]},
    "seconds": Metric("time of a fit (s)", best="min"),
}


@dataclass(frozen=True)
class Halfspaces:
    """Six laws of samples in 5 dimensions, one after the other, with labels of a random halfspace made noisy.

    The laws are the standard Gaussian; independent Laplace and uniform coordinates of variance 1; two Gaussian clusters
    at distance 1 from the origin, opposite in a random direction; a Gaussian with correlations of $0.5^{|i-j|}$; and an
    adversarial one that is Gaussian but for the direction of the true boundary's normal, along which two thirds of the
    samples are in a slab of standard deviation 0.1 around it and the others about $\\sqrt 3$ away, so that all moments
    up to degree 5 are a Gaussian's.

    The excess error is exact for the noise's law, on fresh samples: of Massart noise, the mean of $1 - 2\\eta(x)$ over
    where an answer differs from the true halfspace; of adversarial noise, the error less that of the true halfspace.

    Attributes:
        noise: "massart": labels are wrong with probability `rate` on one side of a random hyperplane, and right on the
            other. "adversarial": those samples are wrong, a share of `rate`, that are farthest to the side of their
            label along a random direction orthogonal to the true one, which tilts a fit the most.
        rate: of the noise.
        dimensions: d.
    """

    noise: Noise = "massart"
    rate: float = 0.1
    dimensions: int = 5

    def __post_init__(self) -> None:
        if self.noise not in get_args(Noise):
            raise ValueError(f"noise must be one of {', '.join(get_args(Noise))}, got {self.noise!r}")
        if not 0 <= self.rate < 0.5:
            raise ValueError(f"rate must be in [0, 0.5), got {self.rate}")
        if self.dimensions < 2:
            raise ValueError(f"dimensions must be at least 2, got {self.dimensions}")

    def run(self, trial: Trial, learn: Learn) -> Result:
        """One contestant, called once for each law."""
        accepted, excess, seconds = {}, {}, 0.0
        for i, law in enumerate(MARGINALS):
            sample, judge = self.draw(trial, law)
            # A run has one thread: its processor time is what it would take alone, also where runs share the machine.
            started = time.process_time()
            answer = learn(sample)
            seconds += (time.process_time() - started) / len(MARGINALS)
            accepted[law], excess[law] = float(answer.accepted), judge(answer.w)
            trial.report((i + 1) / len(MARGINALS))
        others = [accepted[law] for law in MARGINALS[1:]]
        return Result(
            {
                "excess_accepted": max((excess[law] for law in MARGINALS if accepted[law]), default=0.0),
                "rejects_others": 1 - sum(others) / len(others),
                **{f"accepts_{law}": value for law, value in accepted.items()},
                **{f"excess_{law}": value for law, value in excess.items()},
                "seconds": seconds,
            }
        )

    def draw(self, trial: Trial, law: Marginal) -> tuple[Sample, Callable[[Matrix], float]]:
        """Samples of one law, and the function that gives the excess error of weights."""
        n = trial.pick(smoke=2_000, laptop=20_000, paper=200_000)
        fresh = trial.pick(smoke=2_000, laptop=50_000, paper=200_000)
        generator = trial.generator(MARGINALS.index(law))
        w, other = _directions(self.dimensions, generator)
        X = _samples(law, n + fresh, w, generator)
        truth = np.where(X @ w > 0, 1.0, -1.0)
        if self.noise == "massart":
            eta = self.rate * (X @ _unit(_normal(generator, self.dimensions)) > 0)
            y = np.where(torch.rand(n + fresh, generator=generator, dtype=torch.float64).numpy() < eta, -truth, truth)
        else:
            pull = truth * (X @ other)
            eta = (pull > np.quantile(pull, 1 - self.rate)).astype(np.float64)
            y = truth * (1 - 2 * eta)
        X_new, truth_new, cost = X[n:], truth[n:], 1 - 2 * eta[n:]

        def excess(weights: Matrix) -> float:
            differs = (X_new @ weights > 0) != (truth_new > 0)
            return float((cost * differs).mean())

        return Sample(X[:n], y[:n], self.noise, self.rate, trial.seed), excess


def _samples(law: Marginal, n: int, w: Matrix, generator: torch.Generator) -> Matrix:
    d = len(w)

    def uniform(*shape: int) -> Matrix:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).numpy()

    if law == "laplace":
        centred = uniform(n, d) - 0.5
        return np.asarray(-np.sign(centred) * np.log1p(-2 * np.abs(centred)) / math.sqrt(2))
    if law == "uniform":
        return math.sqrt(3) * (2 * uniform(n, d) - 1)
    X = _normal(generator, n, d)
    if law == "clusters":
        return X + np.where(uniform(n, 1) < 0.5, 1, -1) * _unit(_normal(generator, d))
    if law == "correlated":
        correlations = 0.5 ** np.abs(np.subtract.outer(np.arange(d), np.arange(d)))
        return X @ np.linalg.cholesky(correlations).T
    if law == "slab":
        drawn = uniform(n)
        # The nodes of the three-point Gauss-Hermite rule, blurred: all moments up to degree 5 are a Gaussian's.
        nodes = math.sqrt(3) * (1.0 * (drawn < 1 / 6) - 1.0 * (drawn > 5 / 6))
        along = math.sqrt(1 - _SLAB**2) * nodes + _SLAB * (X @ w)
        return X + np.outer(along - X @ w, w)
    return X


def _directions(d: int, generator: torch.Generator) -> tuple[Matrix, Matrix]:
    """Two random orthonormal vectors."""
    w = _unit(_normal(generator, d))
    other = _normal(generator, d)
    return w, _unit(other - (other @ w) * w)


def _unit(vector: Matrix) -> Matrix:
    return np.asarray(vector / np.linalg.norm(vector))


def _normal(generator: torch.Generator, *shape: int) -> Matrix:
    drawn: Matrix = torch.randn(*shape, generator=generator, dtype=torch.float64).numpy()
    return drawn
