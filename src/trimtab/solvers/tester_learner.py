r"""Tester-learner for halfspaces: a linear classifier under label noise that comes with a test of its own assumptions.

For binary labels where a fit that may have gone wrong must not go unnoticed. If the samples are standard Gaussian, it
accepts and its error is near the best of any halfspace through the origin; if it accepts, the properties that this
guarantee rests on were found in the data.

Projected stochastic gradient descent on the unit sphere minimises a smoothed error, whose gradient comes from the
samples in a band around the boundary alone:

$$
L_\sigma(w) = \mathbb{E}\left[ \ell_\sigma(-y \langle w, x \rangle) \right], \qquad
w \leftarrow \frac{w - \beta \nabla L_\sigma(w)}{\lVert w - \beta \nabla L_\sigma(w) \rVert}
$$

where $\ell_\sigma$ rises from 0 at $-\sigma/2$ to 1 at $\sigma/2$, with slope $1/\sigma$ up to $|t| = \sigma/6$ and
cubic joins beyond. Under Massart noise (each label is wrong with a probability of at most $\eta$) a stationary point w,
or -w, is within an angle $O(\sigma / (1 - 2\eta))$ of the best halfspace if the mass of two bands
$|\langle w, x \rangle| \le \sigma/6, \sigma/2$ is $\Theta(\sigma)$ and the moments on them, orthogonal to w, are a
Gaussian's. A small angle means a small error if no slab $i\sigma \le |\langle w, x \rangle| < (i+1)\sigma$ is too heavy
or too wide: with $\tau = \tan\theta$, for every w' within $\theta$ of w,

$$
P\left[\operatorname{sign}\langle w, x\rangle \ne \operatorname{sign}\langle w', x\rangle\right] \le
\sum_i P[\text{slab}_i] \min\left(1,
\frac{\tau^2}{i^2 \sigma^2} \lambda_{\max} \mathbb{E}[x_\perp x_\perp^\top \mid \text{slab}_i]\right) = O(\theta)
$$

Reference: Aravind Gollakota, Adam R. Klivans, Konstantinos Stavropoulos and Arsen Vasilyan, "An Efficient
Tester-Learner for Halfspaces", ICLR 2024, arXiv 2302.14853.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.special import ndtr
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from trimtab.solvers.gaussian_moments import moment_gaps, num_moments

Matrix = NDArray[np.float64]

_DENSITY = 1 / math.sqrt(2 * math.pi)  # of <w, x> at 0
_LEAST_MEAN = 1 / math.sqrt(3)  # of |z| where z has the second and the fourth moment of N(0, 1)
_FAR = 3.0  # the last slab is all beyond it
_MOST_SLABS = 1000
_LEAST_SHARE = 0.25  # of the Gaussian mass that a band passing its test must at least have


class RejectedError(RuntimeError):
    """Predictions were asked of a fit whose data failed the tests."""


class RejectionWarning(UserWarning):
    """The data of a fit failed the tests."""


@dataclass(frozen=True)
class CertificateTest:
    """One test: passed if the statistic is at most the threshold.

    Attributes:
        name: what is tested.
        statistic: the worst found over what the test compares.
        threshold: the Gaussian value with its tolerance and the simultaneous bound on chance, in the same unit.
        detail: where the worst was found.
    """

    name: str
    statistic: float
    threshold: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the statistic is at most the threshold."""
        return self.statistic <= self.threshold


@dataclass(frozen=True)
class HalfspaceCertificate:
    """The outcome of every test of a fit.

    Attributes:
        tests: in the order they were made.
        angle_factor: largest ratio, over angles from the band's width to 45 degrees, of `disagreement_bound` at the
            output to the angle: a halfspace at angle $\\theta$ differs on at most `angle_factor` times $\\theta$ of the
            test half. On Gaussian samples the share is $1/\\pi$ of the angle, and the bound about twice the angle.
    """

    tests: tuple[CertificateTest, ...]
    angle_factor: float

    @property
    def accepted(self) -> bool:
        """Whether all tests passed."""
        return not self.failed

    @property
    def failed(self) -> tuple[CertificateTest, ...]:
        """The tests that did not pass."""
        return tuple(test for test in self.tests if not test.passed)

    def __str__(self) -> str:
        rows = [f"{'test':<36} {'statistic':>10} {'threshold':>10}"]
        for test in self.tests:
            word = "passed" if test.passed else "FAILED"
            rows.append(f"{test.name:<36} {test.statistic:>10.4g} {test.threshold:>10.4g}  {word}  {test.detail}")
        return "\n".join(rows)


def smoothed_error(
    w: Float[Matrix, " d"], X: Float[Matrix, "n d"], y: Float[Matrix, " n"], sigma: float
) -> tuple[float, Float[Matrix, " d"]]:
    """The smoothed error $L_\\sigma$ of the direction of w, and its gradient on the unit sphere.

    Args:
        w: (d,) weights, of which only the direction counts.
        X: (n, d) samples.
        y: (n,) labels, -1 and 1.
        sigma: width of the band that counts, positive.

    Returns:
        The mean of $\\ell_\\sigma(-y \\langle w, x \\rangle)$ for w of unit length, and its gradient there, which is
        orthogonal to w.

    Raises:
        ValueError: shapes do not fit, w is zero, or sigma is not positive.

    Example:
        >>> value, gradient = smoothed_error(np.array([3.0, 4.0]), np.array([[4.0, -3.0]]), np.array([1.0]), sigma=0.5)
        >>> round(value, 6)
        0.5
        >>> gradient
        array([-8.,  6.])
    """
    _check_samples(w, X, y, sigma)
    w = _unit(w)
    return float(_step(-y * (X @ w) / sigma).mean()), _gradient(w, X, y, sigma)


def _check_samples(w: Matrix, X: Matrix, y: Matrix, sigma: float) -> None:
    if X.ndim != 2 or not len(X) or w.shape != X.shape[1:] or y.shape != X.shape[:1]:
        raise ValueError(f"w, X and y must have shapes (d,), (n, d) and (n,), got {w.shape}, {X.shape} and {y.shape}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be a positive number, got {sigma}")


def _gradient(w: Matrix, X: Matrix, y: Matrix, sigma: float) -> Matrix:
    margins = (X @ w) / sigma
    inside = np.abs(margins) < 0.5
    pull = -(y[inside] * _slope(margins[inside])) @ X[inside] / (sigma * len(X))
    gradient: Matrix = pull - (pull @ w) * w
    return gradient


def _step(t: Matrix) -> Matrix:
    """The smoothed step of width 1: linear in its middle third, and a cubic Hermite join to 0 and 1 on either side."""
    u = np.clip(3 * np.abs(t) - 0.5, 0, 1)
    rise = np.minimum(np.abs(t), 1 / 6) + (u + u**2 - u**3) / 3
    return 0.5 + np.sign(t) * rise


def _slope(t: Matrix) -> Matrix:
    u = np.clip(3 * np.abs(t) - 0.5, 0, 1)
    return (1 - u) * (1 + 3 * u)


def halfspace_iterates(
    X: Float[Matrix, "n d"],
    y: Float[Matrix, " n"],
    sigma: float,
    *,
    start: Float[Matrix, " d"],
    batches: Int[NDArray[np.int64], "steps batch"],
    lr: float = 0.5,
) -> Float[Matrix, "steps_and_one d"]:
    """Projected stochastic gradient descent on the smoothed error, with step sizes `lr` / sqrt(t).

    Args:
        X: (n, d) samples.
        y: (n,) labels, -1 and 1.
        sigma: width of the band that counts, positive.
        start: (d,) first weights, not zero.
        batches: (steps, batch) the rows of X that each step looks at.
        lr: first step size, positive.

    Returns:
        The start and every iterate, each of unit length.

    Raises:
        ValueError: an argument is out of its range, or shapes do not fit.
    """
    _check_samples(start, X, y, sigma)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, got {lr}")
    if batches.ndim != 2 or not batches.shape[1]:
        raise ValueError(f"batches must have shape (steps, batch) with batch > 0, got {batches.shape}")
    iterates = np.empty((len(batches) + 1, len(start)))
    iterates[0] = _unit(start)
    for t, rows in enumerate(batches):
        w = iterates[t]
        iterates[t + 1] = _unit(w - lr / math.sqrt(t + 1) * _gradient(w, X[rows], y[rows], sigma))
    return iterates


def disagreement_bound(w: Float[Matrix, " d"], X: Float[Matrix, "n d"], angle: float, width: float) -> float:
    """A bound on the share of X on which the halfspace of w differs from any other within an angle of it.

    Args:
        w: (d,) weights, not zero.
        X: (n, d) samples.
        angle: in radians, between 0 and pi / 2.
        width: of the slabs; the bound is sharpest where it is small against the angle.

    Raises:
        ValueError: an argument is out of its range, or shapes do not fit.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(10_000, 3))
        >>> bound = disagreement_bound(np.array([1.0, 0.0, 0.0]), X, angle=0.2, width=0.05)
        >>> 0.2 / np.pi < bound < 0.4
        True
    """
    if X.ndim != 2 or not len(X) or w.shape != X.shape[1:]:
        raise ValueError(f"w and X must have shapes (d,) and (n, d) with n > 0, got {w.shape} and {X.shape}")
    if not 0 <= angle < math.pi / 2:
        raise ValueError(f"angle must be in [0, pi / 2), got {angle}")
    if not 0 < width < math.inf:
        raise ValueError(f"width must be a positive number, got {width}")
    return _disagreement(_slabs(_unit(w), X, width), angle, width)


@dataclass(frozen=True)
class _Slabs:
    """Of samples by their distance to a boundary: how many are in each slab, and how wide they are along it."""

    counts: Matrix
    spreads: Matrix
    """Largest eigenvalue of the second moments orthogonal to w; 0 in an empty slab."""


def _num_slabs(width: float) -> int:
    return min(math.ceil(_FAR / width), _MOST_SLABS) + 1


def _slabs(w: Matrix, X: Matrix, width: float) -> _Slabs:
    last = _num_slabs(width) - 1
    index = np.minimum(np.abs(X @ w) / width, last).astype(np.int64)
    along = X[np.argsort(index, kind="stable")] @ _orthogonal(w)
    counts = np.bincount(index, minlength=last + 1)
    parts = np.split(along, np.cumsum(counts)[:-1])
    second = np.stack([part.T @ part / max(len(part), 1) for part in parts])
    spreads = np.asarray(np.linalg.eigvalsh(second)[:, -1]) if along.shape[1] else np.zeros(last + 1)
    return _Slabs(counts.astype(np.float64), spreads)


def _disagreement(slabs: _Slabs, angle: float, width: float) -> float:
    # Within the angle, only points with <v, x> tan(angle) >= |<w, x>| can change sides, for a unit v orthogonal to w.
    far = np.arange(1, len(slabs.counts)) * width
    shares = np.append(1, np.minimum(1, slabs.spreads[1:] * (math.tan(angle) / far) ** 2))
    return float(slabs.counts @ shares / slabs.counts.sum())


def _unit(w: Matrix) -> Matrix:
    norm = float(np.linalg.norm(w))
    if not 0 < norm < math.inf:
        raise ValueError(f"w must be finite and not zero, got a vector of norm {norm}")
    return w / norm


def _orthogonal(w: Matrix) -> Float[Matrix, "d d_minus_1"]:
    """An orthonormal basis of the complement of a unit vector, by the reflection that takes it to an axis."""
    normal = w.copy()
    normal[0] += math.copysign(1.0, w[0])
    reflection = np.eye(len(w)) - np.outer(normal, normal) * (2 / (normal @ normal))
    return reflection[:, 1:]


class HalfspaceTesterLearner(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Learns a halfspace through the origin, and tests whether the result can be relied on.

    Half of the samples is for descent and half for tests and for choosing among iterates, so that neither sees what the
    other saw; the moments of all samples are tested first. The first four kinds of test are the paper's, the last two
    stand for what its theorems assume, enough steps and enough samples:

    - moments: every monomial of x up to `degree` (all samples);
    - anti-concentration: the mass of the bands of half-width sigma/6 and sigma/2 around each candidate;
    - conditional moments: on these bands, every monomial up to `degree` orthogonal to the candidate;
    - slab mass and slab spread: of slabs of width sigma, which bound how much halfspaces at a small angle differ;
    - stationarity: the least gradient among the candidates of one sigma;
    - sample size: the bands hold enough samples for the tests to mean anything.

    All candidates must pass, as nothing tells beforehand which is the good one. The constants that the paper leaves
    open are set here as follows. What is compared may depart from the Gaussian by `tolerance` (of a mass, by this share
    of it), plus a bound on chance that holds for all comparisons at once with probability about 1 - `delta`, so that
    thresholds sink to the tolerance as samples grow. A gradient counts as small below half of what a Gaussian has where
    the structural lemma excludes stationary points, $(1 - 2\\eta) \\phi(0) / \\sqrt 3$. Under Massart noise
    `sigma = epsilon * (1 - 2 * noise_rate) / (1 - noise_rate)`: with many Gaussian samples, the lemma then bounds a
    stationary point's angle to the best halfspace by 0.8 `epsilon`, and slabs bound the excess error of such an angle
    by 1.3 `epsilon`. The agnostic mode does not know the best error, and takes the best of a geometric grid of sigma
    from `epsilon` to 1, all of which must pass. With constants such as these, acceptance means that nothing the
    guarantee rests on was found broken at this sample size; it is no numerical bound on the error.

    Samples must not be standardised first: their scale is part of what is tested. The number of moments is of the order
    of d**`degree` / `degree`!; take `degree=2` for more than some fifty features.

    Args:
        epsilon: excess error aimed at, in (0, 1].
        delta: chance of rejecting Gaussian samples, in (0, 1).
        noise: "massart" (each label is wrong with a probability of at most `noise_rate`) or "agnostic" (any labels).
        noise_rate: bound of Massart noise, in [0, 0.5).
        degree: of the moments tested, at least 2.
        tolerance: departure from the Gaussian that is taken for none, in [0, 0.5].
        lr: first step size, positive; that of step t is `lr` / sqrt(t).
        n_iter: steps for each sigma.
        batch_size: samples for a step, drawn with replacement.
        n_candidates: iterates, evenly spaced and the last included, that are tested and, with their negations, chosen
            from.
        on_reject: what follows a failed test: "raise" (a `RejectedError` where predictions are asked), "warn" (a
            warning by `fit`) or "ignore".
        random_state: seed or `np.random.RandomState` of the split, the start and the batches.

    Attributes:
        accepted_: whether all tests passed.
        report_: the tests, a `HalfspaceCertificate`.
        coef_: (1, d) unit weights of least error on the test half.
        intercept_: (1,) zero.
        candidates_: (candidates, d) the tested iterates.
        error_: share of wrong labels on the test half.
        sigma_: width of the band of the output's descent.
        classes_: the two labels.
        n_features_in_: d.

    Raises:
        ValueError: there are not exactly two classes, samples are not finite, or an argument is out of its range.

    Warns:
        RejectionWarning: a test failed, with `on_reject="warn"`.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X, w = rng.normal(size=(20_000, 3)), np.array([0.6, 0.0, -0.8])
        >>> y = (X @ w > 0) ^ (rng.random(20_000) < 0.1)
        >>> model = HalfspaceTesterLearner(noise_rate=0.1, random_state=0).fit(X, y)
        >>> model.accepted_, model.coef_.round(1)
        (True, array([[ 0.6,  0. , -0.8]]))
        >>> model.fit(X**3, y).report_.failed[0].name
        'moments of degree 2'
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        *,
        delta: float = 0.05,
        noise: Literal["massart", "agnostic"] = "massart",
        noise_rate: float = 0.1,
        degree: int = 4,
        tolerance: float = 0.1,
        lr: float = 0.5,
        n_iter: int = 1000,
        batch_size: int = 256,
        n_candidates: int = 10,
        on_reject: Literal["raise", "warn", "ignore"] = "raise",
        random_state: Any = None,
    ) -> None:
        self.epsilon = epsilon
        self.delta = delta
        self.noise = noise
        self.noise_rate = noise_rate
        self.degree = degree
        self.tolerance = tolerance
        self.lr = lr
        self.n_iter = n_iter
        self.batch_size = batch_size
        self.n_candidates = n_candidates
        self.on_reject = on_reject
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Learns from samples (n, d) and labels of two classes, and tests."""
        self._check_arguments()
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) != 2:
            raise ValueError(f"y must hold two classes, got 1 class: {self.classes_[0]!r}")
        labels = 2.0 * codes - 1

        random = check_random_state(self.random_state)
        order = random.permutation(len(X))
        descent, held = order[: len(X) // 2], order[len(X) // 2 :]
        kept = np.linspace(self.n_iter, 0, self.n_candidates, endpoint=False).round().astype(np.int64)
        sigmas = self._sigmas()
        log_term = self._log_term(X.shape[1], sigmas)
        X_held, y_held = X[held], labels[held]
        tests = list(self._moment_tests("moments", X, log_term))
        candidates: list[Matrix] = []
        for sigma in sigmas:
            found = halfspace_iterates(
                X[descent],
                labels[descent],
                sigma,
                start=random.normal(size=X.shape[1]),
                batches=random.randint(len(descent), size=(self.n_iter, self.batch_size)),
                lr=self.lr,
            )[np.unique(kept)]
            candidates.extend(found)
            tests.append(self._sample_size_test(sigma, len(held), log_term))
            local = [test for w in found for test in self._local_tests(w, X_held, sigma, log_term)]
            tests.extend(_worst(local, sigma))
            tests.append(self._stationarity_test(found, X_held, y_held, sigma, log_term))

        self.candidates_ = np.stack(candidates)
        # A negation is wrong where its candidate is right, and all tests are alike for both.
        wrong = ((X_held @ self.candidates_.T > 0) != (y_held[:, None] > 0)).mean(0)
        best = int(np.minimum(wrong, 1 - wrong).argmin())
        self.error_ = float(min(wrong[best], 1 - wrong[best]))
        w = self.candidates_[best] * (1 if wrong[best] <= 0.5 else -1)
        self.coef_, self.intercept_ = w[None].copy(), np.zeros(1)
        self.sigma_ = sigmas[best * len(sigmas) // len(candidates)]
        slabs = _slabs(w, X_held, self.sigma_)
        angles = np.geomspace(min(self.sigma_, math.pi / 4), math.pi / 4, 8)
        factor = max(_disagreement(slabs, angle, self.sigma_) / angle for angle in angles)
        self.report_ = HalfspaceCertificate(tuple(tests), float(factor))
        self.accepted_ = self.report_.accepted
        if not self.accepted_ and self.on_reject == "warn":
            warnings.warn(self._refusal(), RejectionWarning, stacklevel=2)
        return self

    def decision_function(self, X: Any) -> Float[Matrix, " n"]:
        """Signed distances of samples (n, d) to the boundary, positive for the second class.

        Raises:
            RejectedError: the data of the fit failed a test, with `on_reject="raise"`.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        if not self.accepted_ and self.on_reject == "raise":
            raise RejectedError(self._refusal())
        scores: Matrix = X @ self.coef_[0]
        return scores

    def predict(self, X: Any) -> NDArray[Any]:
        """Classes of samples (n, d).

        Raises:
            RejectedError: the data of the fit failed a test, with `on_reject="raise"`.
        """
        positive = self.decision_function(X) > 0
        predicted: NDArray[Any] = self.classes_[positive.astype(np.int64)]
        return predicted

    def _refusal(self) -> str:
        failed = ", ".join(f"{test.name} ({test.statistic:.3g} > {test.threshold:.3g})" for test in self.report_.failed)
        return f'the data failed {failed}; on_reject="warn" or "ignore" predicts all the same, without a guarantee'

    def _sigmas(self) -> list[float]:
        if self.noise == "massart":
            return [self.epsilon * (1 - 2 * self.noise_rate) / (1 - self.noise_rate)]
        return [self.epsilon * 2**j for j in range(1 + math.floor(math.log2(1 / self.epsilon)))]

    def _log_term(self, d: int, sigmas: list[float]) -> float:
        """The logarithm of twice the number of comparisons over `delta`."""
        count = num_moments(d, self.degree)
        for sigma in sigmas:
            each = 2 + 2 * num_moments(d - 1, self.degree) + 2 * _num_slabs(sigma) + 1
            count += each * self.n_candidates
        return math.log(2 * count / self.delta)

    def _moment_tests(self, name: str, X: Matrix, log_term: float) -> Iterator[CertificateTest]:
        for gap in moment_gaps(X, self.degree, log_term, self.tolerance):
            where = "*".join(f"x{i}" for i in gap.monomial) if name == "moments" else f"{len(X)} samples"
            yield CertificateTest(f"{name} of degree {gap.degree}", gap.gap, gap.threshold, where)

    def _local_tests(self, w: Matrix, X: Matrix, sigma: float, log_term: float) -> Iterator[CertificateTest]:
        """The tests around one candidate; each statistic is relative to what it is compared with."""
        distance = np.abs(X @ w)
        basis = _orthogonal(w)
        for part in (6, 2):
            inside = distance <= sigma / part
            mass = _mass(sigma / part)
            gap = abs(inside.mean() / mass - 1)
            allowed = self.tolerance + _chance(mass, len(X), log_term)
            yield CertificateTest(f"anti-concentration, sigma/{part}", float(gap), allowed, f"{inside.sum()} samples")
            if inside.any():
                yield from self._moment_tests(f"sigma/{part} band: moments", X[inside] @ basis, log_term)

        slabs = _slabs(w, X, sigma)
        edges = np.arange(len(slabs.counts)) * sigma
        masses = np.append(np.diff(2 * ndtr(edges)), 2 * ndtr(-edges[-1]))
        for i, (n, mass, spread) in enumerate(zip(slabs.counts, masses, slabs.spreads, strict=True)):
            allowed = self.tolerance + _chance(mass, len(X), log_term)
            yield CertificateTest("slab mass", n / len(X) / mass - 1, allowed, f"slab {i}")
            if n:
                # The largest singular value of a Gaussian matrix (Davidson and Szarek).
                edge = 1 + math.sqrt((len(w) - 1) / n) + math.sqrt(2 * log_term / n)
                yield CertificateTest("slab spread", float(spread), self.tolerance + edge**2, f"slab {i}")

    def _stationarity_test(
        self, candidates: Matrix, X: Matrix, y: Matrix, sigma: float, log_term: float
    ) -> CertificateTest:
        rate = self.noise_rate if self.noise == "massart" else 0.0
        half = 0.5 * (1 - 2 * rate) * _DENSITY * _LEAST_MEAN
        found = []
        for w in candidates:
            margins = (X @ w) / sigma
            along = (X @ _orthogonal(w)) * (_slope(margins) / sigma)[:, None]
            norm = float(np.linalg.norm(y @ along)) / len(X)
            covariance = along.T @ along / len(X)
            # The length of a mean of vectors: its root mean square, and a deviation in the direction of most noise.
            largest = float(np.linalg.eigvalsh(covariance)[-1]) if covariance.size else 0.0
            chance = (math.sqrt(np.trace(covariance)) + math.sqrt(2 * log_term * largest)) / math.sqrt(len(X))
            found.append((norm, half + chance))
        norm, allowed = min(found, key=lambda pair: pair[0] / pair[1])
        return CertificateTest(f"stationarity, sigma={sigma:.3g}", norm, allowed)

    def _sample_size_test(self, sigma: float, n: int, log_term: float) -> CertificateTest:
        """Whether a band that passes is sure to have some mass: the allowance is not all of it."""
        allowed = self.tolerance + _chance(_mass(sigma / 6), n, log_term)
        return CertificateTest(f"sample size, sigma={sigma:.3g}", allowed, 1 - _LEAST_SHARE, f"{n} samples")

    def _check_arguments(self) -> None:
        if self.noise not in ("massart", "agnostic"):
            raise ValueError(f'noise must be "massart" or "agnostic", got {self.noise!r}')
        if self.on_reject not in ("raise", "warn", "ignore"):
            raise ValueError(f'on_reject must be "raise", "warn" or "ignore", got {self.on_reject!r}')
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon must be in (0, 1], got {self.epsilon}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1), got {self.delta}")
        if not 0 <= self.noise_rate < 0.5:
            raise ValueError(f"noise_rate must be in [0, 0.5), got {self.noise_rate}")
        if not 0 <= self.tolerance <= 0.5:
            raise ValueError(f"tolerance must be in [0, 0.5], got {self.tolerance}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be a positive number, got {self.lr}")
        for name, least in {"degree": 2, "n_iter": 1, "batch_size": 1, "n_candidates": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def _mass(half_width: float) -> float:
    return float(2 * ndtr(half_width) - 1)


def _chance(mass: float, n: int, log_term: float) -> float:
    """Bernstein's bound on how far a share of n samples departs from its mean, as a share of that mean."""
    return math.sqrt(2 * (1 - mass) * log_term / (n * mass)) + log_term / (3 * n * mass)


def _worst(tests: list[CertificateTest], sigma: float) -> Iterator[CertificateTest]:
    """Of tests of one name, the one that departs most, measured in its threshold."""
    by_name: dict[str, CertificateTest] = {}
    for test in tests:
        held = by_name.get(test.name)
        if held is None or test.statistic / test.threshold > held.statistic / held.threshold:
            by_name[test.name] = test
    for name, test in by_name.items():
        yield CertificateTest(f"{name}, sigma={sigma:.3g}", test.statistic, test.threshold, test.detail)
