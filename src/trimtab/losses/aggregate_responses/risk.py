"""What theory says of the risk."""

from __future__ import annotations

import numpy as np

from trimtab.ops.arguments import in_range, integer, non_negative


def aggregate_risk(
    rho: float,
    *,
    num_samples: int,
    num_features: int,
    bag_size: float,
    signal: float = 1.0,
    noise: float = 1.0,
    alpha: float = 0.0,
) -> float:
    r"""The risk $E\|\hat\theta_\rho - \theta\|^2$ of a linear model on standard normal features in random equal bags.

    For `rho` 0, or bags of one, without `alpha` it is exact: $\sigma^2 d / (m - d - 1)$, the mean trace of the inverse
    of a Wishart matrix of the m means. Elsewhere it is the limit for many samples and features in a fixed proportion.
    Within bags, means and deviations of the features are independent, so that with $p = m / (1 + \delta)$ and the trace
    $\delta$ of the inverse Gram matrix, from

    $$
    d = \frac{m \delta}{1 + \delta} + \frac{(n - m) \rho \delta}{1 + \rho \delta} + \alpha \delta, \qquad
    c = \frac{p \delta}{d}, \qquad R = \|\theta\|^2 \bigl((1 - c)^2 (1 + V) + c^2 \rho^2 W\bigr) + \sigma^2 V
    $$

    the estimate shrinks to $c\, \theta$ on average, and $V$ and $W$ are minus the derivatives of $\delta$ with respect
    to the weights of the means (here 1) and of the deviations (here $\rho$).

    Args:
        rho: weight of the instance-level loss, in [0, 1].
        num_samples: n.
        num_features: d.
        bag_size: k, at least 1; there are m = n / k bags.
        signal: squared norm of the true weights.
        noise: variance of one sample's response given its features, sigma squared. The noise of `private_bag_means`
            adds `8 bound^2 / (k epsilon^2)`.
        alpha: ridge penalty, as in `AggregateRidge`.

    Raises:
        ValueError: if an argument is out of its range, or the estimate is not determined: without `alpha` there must be
            more samples than features, or where `rho` is 0 or bags are of one, more bags than features and one.

    Example:
        >>> [round(aggregate_risk(rho, num_samples=1000, num_features=100, bag_size=5), 3) for rho in (0.0, 0.3, 1.0)]
        [1.01, 0.483, 0.68]
    """
    rho = in_range("rho", rho, 0, 1)
    n, d = integer("num_samples", num_samples), integer("num_features", num_features)
    m = n / in_range("bag_size", bag_size, 1, n)
    signal, noise, alpha = non_negative("signal", signal), non_negative("noise", noise), non_negative("alpha", alpha)
    rest = n - m
    of_means_alone = alpha == 0 and (rho == 0 or rest == 0)
    rank = m - 1 if of_means_alone else n
    if alpha == 0 and d >= rank:
        raise ValueError(
            f"num_features must be below {rank:g} without alpha at rho={rho:g} and bag_size={bag_size:g}, got {d}"
        )
    if of_means_alone:
        return noise * d / (m - d - 1)
    # The equation for delta, multiplied out; its right-hand side grows with delta, so that one root is positive.
    roots = np.roots(
        [
            alpha * rho,
            rho * (m + rest - d) + alpha * (1 + rho),
            m + rest * rho + alpha - d * (1 + rho),
            -d,
        ]
    )
    delta = float(roots.real[np.abs(roots.imag) < 1e-9 * np.abs(roots)].max())
    of_means, of_deviations = m / (1 + delta) ** 2, rest / (1 + rho * delta) ** 2
    scale = delta / (of_means + rho * of_deviations + alpha)
    variance, leak = scale * of_means, scale * of_deviations
    shrinkage = m / (1 + delta) * delta / d
    bias = (1 - shrinkage) ** 2 * (1 + variance) + (shrinkage * rho) ** 2 * leak
    return float(signal * bias + noise * variance)
