"""The tests of a fit's assumptions: whether samples look Gaussian wherever the guarantee rests on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from trimtab.solvers.gaussian_moments import moment_gaps, num_moments
from trimtab.solvers.tester_learner.certificate import SAMPLE_SIZE, CertificateTest
from trimtab.solvers.tester_learner.descent import slope
from trimtab.solvers.tester_learner.directions import Matrix, orthogonal
from trimtab.solvers.tester_learner.slabs import Slabs, num_slabs

_DENSITY = 1 / math.sqrt(2 * math.pi)  # of <w, x> at 0
_LEAST_MEAN = 1 / math.sqrt(3)  # of |z| where z has the second and the fourth moment of N(0, 1)
_LEAST_SHARE = 0.25  # of the Gaussian mass that a band passing its test must at least have


@dataclass(frozen=True)
class Checks:
    """The tests of one fit, with thresholds that hold for all of their comparisons at once.

    Attributes:
        degree: of the moments tested.
        tolerance: departure from the Gaussian that is taken for none.
        log_term: the logarithm of twice the number of comparisons over the chance of a false alarm.
    """

    degree: int
    tolerance: float
    log_term: float

    @classmethod
    def of(
        cls, d: int, sigmas: Sequence[float], *, num_candidates: int, degree: int, tolerance: float, delta: float
    ) -> Checks:
        """Those of a fit in d dimensions that looks at so many candidates for each sigma."""
        count = num_moments(d, degree)
        for sigma in sigmas:
            each = 2 + 2 * num_moments(d - 1, degree) + 2 * num_slabs(sigma) + 1
            count += each * num_candidates
        return cls(degree, tolerance, math.log(2 * count / delta))

    def moments(self, name: str, X: Matrix) -> Iterator[CertificateTest]:
        """Every monomial of the samples up to the degree, the worst of each."""
        for gap in moment_gaps(X, self.degree, self.log_term, self.tolerance):
            where = "*".join(f"x{i}" for i in gap.monomial) if name == "moments" else f"{len(X)} samples"
            yield CertificateTest(f"{name} of degree {gap.degree}", gap.gap, gap.threshold, where)

    def around(self, w: Matrix, X: Matrix, sigma: float) -> Iterator[CertificateTest]:
        """Bands and slabs around one candidate; each statistic is relative to what it is compared with."""
        distance = np.abs(X @ w)
        basis = orthogonal(w)
        for part in (6, 2):
            inside = distance <= sigma / part
            mass = _mass(sigma / part)
            gap = abs(inside.mean() / mass - 1)
            allowed = self.tolerance + self.chance(mass, len(X))
            yield CertificateTest(f"anti-concentration, sigma/{part}", float(gap), allowed, f"{inside.sum()} samples")
            if inside.any():
                yield from self.moments(f"sigma/{part} band: moments", X[inside] @ basis)

        slabs = Slabs.of(w, X, sigma)
        edges = np.arange(len(slabs.counts)) * sigma
        masses = np.append(np.diff(2 * ndtr(edges)), 2 * ndtr(-edges[-1]))
        for i, (n, mass, spread) in enumerate(zip(slabs.counts, masses, slabs.spreads, strict=True)):
            allowed = self.tolerance + self.chance(mass, len(X))
            yield CertificateTest("slab mass", n / len(X) / mass - 1, allowed, f"slab {i}")
            if n:
                # The largest singular value of a Gaussian matrix (Davidson and Szarek).
                edge = 1 + math.sqrt((len(w) - 1) / n) + math.sqrt(2 * self.log_term / n)
                yield CertificateTest("slab spread", float(spread), self.tolerance + edge**2, f"slab {i}")

    def stationarity(
        self, candidates: Matrix, X: Matrix, y: Matrix, sigma: float, noise_rate: float
    ) -> CertificateTest:
        """The least gradient among the candidates of one sigma."""
        half = 0.5 * (1 - 2 * noise_rate) * _DENSITY * _LEAST_MEAN
        found = []
        for w in candidates:
            margins = (X @ w) / sigma
            along = (X @ orthogonal(w)) * (slope(margins) / sigma)[:, None]
            norm = float(np.linalg.norm(y @ along)) / len(X)
            covariance = along.T @ along / len(X)
            # The length of a mean of vectors: its root mean square, and a deviation in the direction of most noise.
            largest = float(np.linalg.eigvalsh(covariance)[-1]) if covariance.size else 0.0
            chance = (math.sqrt(np.trace(covariance)) + math.sqrt(2 * self.log_term * largest)) / math.sqrt(len(X))
            found.append((norm, half + chance))
        norm, allowed = min(found, key=lambda pair: pair[0] / pair[1])
        return CertificateTest(f"stationarity, sigma={sigma:.3g}", norm, allowed)

    def sample_size(self, sigma: float, n: int) -> CertificateTest:
        """Whether a band that passes is sure to have some mass: the allowance is not all of it."""
        allowed = self.tolerance + self.chance(_mass(sigma / 6), n)
        return CertificateTest(f"{SAMPLE_SIZE}, sigma={sigma:.3g}", allowed, 1 - _LEAST_SHARE, f"{n} samples")

    def enough(self, sigma: float) -> int:
        """The least n that passes `sample_size`."""
        mass = _mass(sigma / 6)
        # The allowance is r sqrt(2 (1 - mass)) + r^2 / 3 for r = sqrt(log_term / (n mass)).
        linear, wanted = math.sqrt(2 * (1 - mass)), 1 - _LEAST_SHARE - self.tolerance
        root = 1.5 * (math.sqrt(linear**2 + 4 * wanted / 3) - linear)
        return math.ceil(self.log_term / (mass * root**2))

    def chance(self, mass: float, n: int) -> float:
        """Bernstein's bound on how far a share of n samples departs from its mean, as a share of that mean."""
        return math.sqrt(2 * (1 - mass) * self.log_term / (n * mass)) + self.log_term / (3 * n * mass)


def worst(tests: Sequence[CertificateTest], sigma: float) -> Iterator[CertificateTest]:
    """Of tests of one name, the one that departs most, measured in its threshold."""
    by_name: dict[str, CertificateTest] = {}
    for test in tests:
        held = by_name.get(test.name)
        if held is None or test.statistic / test.threshold > held.statistic / held.threshold:
            by_name[test.name] = test
    for name, test in by_name.items():
        yield CertificateTest(f"{name}, sigma={sigma:.3g}", test.statistic, test.threshold, test.detail)


def _mass(half_width: float) -> float:
    return float(2 * ndtr(half_width) - 1)
