r"""Whether a sample's mixed moments are those of a standard Gaussian, all monomials up to a degree at once.

For a monomial $p$ of degree k, with mean $\mu$, standard deviation $s$ and third cumulant $\kappa$ under N(0, I), the
sample mean of n points stays with probability about $1 - 2 e^{-L}$ within

$$
\left| \frac{1}{n} \sum_i p(x_i) - \mu \right| \le s \sqrt{\frac{2 L}{n}}
+ \frac{1}{n} \max\left( \frac{|\kappa|}{3 s^2} L,\ \max_{\lVert x \rVert^2 \le 2 (L + \log n)} |p(x)| \right)
$$

The first term is that of a normal mean, the second its correction for skewness (Cramér's expansion), and the third a
single far point, which among few samples of a high power is what goes wrong first.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, pairwise

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from trimtab.ops.arguments import finite_tensor, integer, non_negative

Matrix = NDArray[np.float64]

_ROWS = 2048  # of features held at a time


@dataclass(frozen=True)
class MomentGap:
    """The monomial of one degree that departs most from the Gaussian's, measured in its threshold.

    Attributes:
        degree: of the monomial.
        gap: absolute difference between the sample's moment and the Gaussian's; infinite where the sample's is too
            large for a number.
        threshold: largest difference that passes.
        monomial: the coordinates multiplied, with repetition.
    """

    degree: int
    gap: float
    threshold: float
    monomial: tuple[int, ...]


def num_moments(d: int, degree: int) -> int:
    """Number of monomials in d variables of degree 1 to `degree`.

    Example:
        >>> num_moments(2, 2)  # x, y, xx, xy, yy
        5
    """
    return math.comb(d + degree, degree) - 1


def moment_gaps(X: Float[Matrix, "n d"], degree: int, log_term: float, tolerance: float = 0.0) -> list[MomentGap]:
    """Compares every moment of degree 1 to `degree` with the standard Gaussian's.

    All of them are entries of one Gram matrix, that of the monomials of half the degree: a matrix product of cost
    n d^degree.

    Args:
        X: (n, d) samples, n at least 1.
        degree: largest degree, at least 1.
        log_term: L above, the logarithm of twice the number of comparisons over the chance of any false alarm.
        tolerance: difference allowed beyond that of chance.

    Returns:
        One for each degree, the worst; none if d is 0.

    Raises:
        TypeError: X is no array of numbers.
        ValueError: X is empty, not finite or no matrix, `degree` is below 1, or another number negative or not finite.

    Example:
        >>> X = np.random.default_rng(0).laplace(scale=0.5**0.5, size=(20_000, 2))
        >>> [gap.gap > gap.threshold for gap in moment_gaps(X, degree=4, log_term=10.0)]
        [False, False, False, True]
    """
    finite_tensor("X", X, ndim=2)
    if not len(X):
        raise ValueError(f"X must be of shape (n, d) with n > 0, got shape {X.shape}")
    degree, log_term = integer("degree", degree), non_negative("log_term", log_term)
    tolerance = non_negative("tolerance", tolerance)
    if not X.shape[1]:
        return []
    plan = _plan(X.shape[1], degree)
    n = len(X)
    with np.errstate(over="ignore", invalid="ignore"):
        gram = plan.gram(X[:_ROWS])
        for first in range(_ROWS, n, _ROWS):
            gram += plan.gram(X[first : first + _ROWS])
        gaps = np.abs(gram[plan.left, plan.right] / n - plan.mean)
    # What is too large for a number may be infinite in both directions, which makes none.
    gaps[np.isnan(gaps)] = math.inf
    far = plan.peak * (2 * (log_term + math.log(n))) ** (plan.degrees / 2)
    thresholds = tolerance + plan.std * math.sqrt(2 * log_term / n) + np.maximum(plan.skew * log_term, far) / n
    found = []
    for k in range(1, degree + 1):
        (of_degree,) = np.nonzero(plan.degrees == k)
        worst = of_degree[(gaps[of_degree] / thresholds[of_degree]).argmax()]
        found.append(MomentGap(k, float(gaps[worst]), float(thresholds[worst]), plan.monomials[worst]))
    return found


@dataclass(frozen=True)
class _Plan:
    """Where in the Gram matrix each monomial stands, and what its threshold is made of.

    The mean and the standard deviation, the absolute third cumulant over three variances, and the largest value on the
    unit sphere.
    """

    monomials: list[tuple[int, ...]]
    degrees: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    mean: Matrix
    std: Matrix
    skew: Matrix
    peak: Matrix
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
    """For each degree of the features: of which feature of a degree less, and by which coordinate, one is made."""

    def gram(self, X: Matrix) -> Matrix:
        """Sum over samples of the outer products of their features."""
        columns = np.ascontiguousarray(X.T)
        parts = [np.ones((1, len(X)))]
        for parent, last in self.steps:
            parts.append(parts[-1][parent] * columns[last])
        every = np.concatenate(parts)
        product: Matrix = every @ every.T
        return product


@lru_cache(maxsize=16)
def _plan(d: int, degree: int) -> _Plan:
    half = (degree + 1) // 2
    levels = [list(combinations_with_replacement(range(d), k)) for k in range(half + 1)]
    place = {monomial: i for i, monomial in enumerate(monomial for level in levels for monomial in level)}
    steps = []
    for lower, upper in pairwise(levels):
        within = {monomial: i for i, monomial in enumerate(lower)}
        steps.append((np.array([within[m[:-1]] for m in upper]), np.array([m[-1] for m in upper])))
    monomials = [m for k in range(1, degree + 1) for m in combinations_with_replacement(range(d), k)]
    # Coordinates have the same law, so a monomial's moments depend on its multiplicities alone.
    shapes = [tuple(sorted(Counter(m).values())) for m in monomials]
    moments = {shape: _moments(shape) for shape in set(shapes)}
    mean, std, skew, peak = np.array([moments[shape] for shape in shapes]).T
    return _Plan(
        monomials,
        np.array([len(m) for m in monomials]),
        np.array([place[m[: (len(m) + 1) // 2]] for m in monomials]),
        np.array([place[m[(len(m) + 1) // 2 :]] for m in monomials]),
        mean,
        std,
        skew,
        peak,
        steps,
    )


def _moments(powers: tuple[int, ...]) -> tuple[float, float, float, float]:
    """Of a product of powers of independent standard normal variables."""
    first, second, third = (math.prod(_normal_moment(times * power) for power in powers) for times in (1, 2, 3))
    variance = second - first**2
    skew = abs(third - 3 * first * second + 2 * first**3) / (3 * variance)
    peak = math.prod((power / sum(powers)) ** (power / 2) for power in powers)
    return first, math.sqrt(variance), skew, peak


def _normal_moment(power: int) -> int:
    return 0 if power % 2 else math.prod(range(1, power, 2))
