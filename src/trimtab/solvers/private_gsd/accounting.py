r"""Accounting of differential privacy for Gaussian measurements: zero-concentrated privacy (zCDP) and its budget.

Budgets of zCDP add up: measurements with $\rho_1, \rho_2, \dots$ are $\sum_i \rho_i$ together. Noise of variance
$\sigma^2$ on a vector that one person changes by at most $\Delta$ in Euclidean norm costs
$\rho = \Delta^2 / 2\sigma^2$, and $\rho$-zCDP implies $(\varepsilon, \delta)$-privacy for

$$
\delta = \min_{\alpha > 1} \frac{\exp((\alpha - 1)(\alpha\rho - \varepsilon))}{\alpha - 1}
\left(1 - \frac{1}{\alpha}\right)^\alpha
$$

References: Mark Bun and Thomas Steinke, "Concentrated Differential Privacy: Simplifications, Extensions, and Lower
Bounds", TCC 2016, arXiv 1605.02065; Clément Canonne, Gautam Kamath and Thomas Steinke, "The Discrete Gaussian for
Differential Privacy", NeurIPS 2020, arXiv 2004.00010 (the formula above).
"""

from __future__ import annotations

import math

from scipy.optimize import minimize_scalar

from trimtab.ops.arguments import in_range, non_negative, positive

_LEAST_LOG_ALPHA, _MOST_LOG_ALPHA = -12.0, 30.0  # natural logarithms of alpha - 1
_BISECTIONS = 200


def delta_from_rho(rho: float, epsilon: float) -> float:
    """The least delta for which rho-zCDP is known to imply (epsilon, delta)-privacy.

    Args:
        rho: at least 0.
        epsilon: at least 0.

    Raises:
        ValueError: a number is negative or not finite.

    Example:
        >>> round(delta_from_rho(0.5, 4.0), 6)
        0.000196
    """
    rho, epsilon = non_negative("rho", rho), non_negative("epsilon", epsilon)
    if rho == 0:
        return 0.0

    def log_delta(log_excess: float) -> float:
        excess = math.exp(log_excess)  # alpha - 1
        power = (1 + excess) * (math.log(excess) - math.log1p(excess))
        return excess * ((1 + excess) * rho - epsilon) - log_excess + power

    found = minimize_scalar(log_delta, bounds=(_LEAST_LOG_ALPHA, _MOST_LOG_ALPHA), method="bounded")
    return min(1.0, math.exp(min(0.0, float(found.fun))))


def rho_from_epsilon_delta(epsilon: float, delta: float) -> float:
    """The largest rho for which rho-zCDP is known to imply (epsilon, delta)-privacy.

    Args:
        epsilon: positive.
        delta: between 0 and 1; less than one over the number of people, to mean anything.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> round(rho_from_epsilon_delta(1.0, 1e-9), 5)
        0.01497
    """
    epsilon, delta = positive("epsilon", epsilon), in_range("delta", delta, 0, 1, "neither")
    low, high = 0.0, epsilon + 1.0
    while delta_from_rho(high, epsilon) <= delta:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if delta_from_rho(middle, epsilon) <= delta:
            low = middle
        else:
            high = middle
    return low


def gaussian_sigma(sensitivity: float, rho: float) -> float:
    """The standard deviation of the noise that makes a measurement rho-zCDP.

    Args:
        sensitivity: the most that one person changes it by, in Euclidean norm; at least 0.
        rho: positive.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> gaussian_sigma(sensitivity=2.0, rho=0.5)
        2.0
    """
    return non_negative("sensitivity", sensitivity) / math.sqrt(2 * positive("rho", rho))
