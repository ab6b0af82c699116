r"""Learning from bag means of the response: fit the bags' means, fit every member to its bag's mean, or interpolate.

For data whose responses are known only as averages over disjoint bags of samples, for privacy or by the way they were
collected. The bag-level loss is unbiased and noisy, the instance-level loss shrinks predictions; the weight between
them is a bias-variance trade-off.

With $m$ bags, the bag $a$ of $k_a$ samples and mean response $\bar y_a$,

$$
\mathcal{L}_\rho = \frac{1 - \rho}{m} \sum_a \ell\Bigl(\bar y_a, \frac{1}{k_a} \sum_{i \in a} f(x_i)\Bigr)
+ \frac{\rho}{m} \sum_a \frac{1}{k_a} \sum_{i \in a} \ell\bigl(\bar y_a, f(x_i)\bigr)
$$

For the squared loss $\mathcal{L}_\rho = \mathcal{L}_0 + \rho\, V$ with $V$ the mean variance of the predictions within
bags. Linear models then have, with $S$ the $m \times n$ matrix of $1 / \sqrt{k_a}$ where sample $i$ is in bag $a$,

$$
\hat\theta_\rho = \bigl((1 - \rho) X^\top S^\top S X + \rho X^\top X + \alpha I\bigr)^{-1} X^\top S^\top S y
$$

Labels are kept $\varepsilon$-differentially private by noise on the bag means of clipped responses:
$\bar y_a + \mathrm{Laplace}(2B / (k_a \varepsilon))$.

Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate responses: Instance Level versus Bag
Level Loss Functions", ICLR 2024, arXiv 2401.11081.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

Elementwise = Callable[[Tensor, Tensor], Tensor]
Loss = Literal["mse", "bce"] | Elementwise
Weighting = Literal["bag", "sample"]


def bag_level_loss(
    pred: Float[Tensor, " batch"],
    bag_target: Float[Tensor, " bags"],
    bag_index: Int[Tensor, " batch"],
    *,
    loss: Loss = "mse",
    weighting: Weighting = "bag",
) -> Float[Tensor, ""]:
    """The loss between bags' responses and the means of their members' predictions.

    Args:
        pred: predictions; logits for "bce".
        bag_target: mean responses of the bags; for "bce" shares of positives, in [0, 1].
        bag_index: bag of each sample, in [0, bags). A batch should hold bags whole; those without a member in it do
            not count.
        loss: "mse" for the squared error, "bce" for cross-entropy with the mean of the members' probabilities (not of
            their logits), or a function of predictions and targets, both (n,), that returns losses (n,).
        weighting: whether each "bag" counts alike or each "sample", so that bags count by their size.

    Raises:
        TypeError: if a dtype is wrong (`pred` and `bag_target` floating point, `bag_index` int64).
        ValueError: if shapes do not fit, a batch is empty, or `loss` or `weighting` is unknown.

    Example:
        >>> pred, bag_index = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
        >>> bag_level_loss(pred, torch.tensor([3.0, 5.0]), bag_index)
        tensor(0.5000)
    """
    pred = _checked(pred, bag_target, bag_index, loss, weighting)
    sizes, weights = _weights(bag_target, bag_index, weighting, pred.dtype)
    target = bag_target.to(pred.dtype)
    if loss == "bce":
        log_right = _log_mean_exp(F.logsigmoid(pred), bag_index, sizes)
        log_wrong = _log_mean_exp(F.logsigmoid(-pred), bag_index, sizes)
        values = -target * log_right - (1 - target) * log_wrong
    else:
        means = torch.zeros_like(target).scatter_add(0, bag_index, pred) / sizes.clamp_min(1)
        values = _elementwise(loss)(means, target)
    return weights @ values


def instance_level_loss(
    pred: Float[Tensor, " batch"],
    bag_target: Float[Tensor, " bags"],
    bag_index: Int[Tensor, " batch"],
    *,
    loss: Loss = "mse",
    weighting: Weighting = "bag",
) -> Float[Tensor, ""]:
    """The loss between each sample's prediction and its bag's response; arguments are those of `bag_level_loss`.

    Example:
        >>> pred, bag_index = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
        >>> instance_level_loss(pred, torch.tensor([3.0, 5.0]), bag_index)  # the variance within bags is 1 and 0
        tensor(1.)
    """
    pred = _checked(pred, bag_target, bag_index, loss, weighting)
    sizes, weights = _weights(bag_target, bag_index, weighting, pred.dtype)
    values = _elementwise(loss)(pred, bag_target.to(pred.dtype).index_select(0, bag_index))
    return (weights / sizes.clamp_min(1)).index_select(0, bag_index) @ values


class AggregateLoss(nn.Module):
    """The interpolating loss, called as `loss(pred, bag_target, bag_index)`.

    Args:
        rho: weight of the instance-level loss, in [0, 1]: 0 is the bag-level loss alone.
        loss: "mse", "bce" (predictions are logits) or an elementwise function, see `bag_level_loss`.
        weighting: whether each "bag" counts alike or each "sample".

    Raises:
        ValueError: if `rho` is outside [0, 1], or `loss` or `weighting` is unknown.

    Example:
        >>> loss = AggregateLoss(rho=0.5, loss="bce")
        >>> loss(torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.5, 1.0]), torch.tensor([0, 0, 1]))
        tensor(0.6931)
    """

    def __init__(self, rho: float, loss: Loss = "mse", weighting: Weighting = "bag") -> None:
        super().__init__()
        _check_weight(rho)
        _check_kind(loss, weighting)
        self.rho = rho
        self.loss: Loss = loss
        self.weighting: Weighting = weighting

    def forward(
        self,
        pred: Float[Tensor, " batch"],
        bag_target: Float[Tensor, " bags"],
        bag_index: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """The loss of a batch of whole bags.

        Raises:
            TypeError: if a dtype is wrong.
            ValueError: if shapes do not fit or the batch is empty.
        """
        value = pred.new_zeros((), dtype=torch.promote_types(pred.dtype, torch.float32))
        for weight, part in ((1 - self.rho, bag_level_loss), (self.rho, instance_level_loss)):
            if weight:
                value = value + weight * part(pred, bag_target, bag_index, loss=self.loss, weighting=self.weighting)
        return value


def _checked(pred: Tensor, bag_target: Tensor, bag_index: Tensor, loss: Loss, weighting: str) -> Tensor:
    """The predictions, in float32 where they came in half precision."""
    for name, values in (("pred", pred), ("bag_target", bag_target)):
        if not values.is_floating_point():
            raise TypeError(f"{name}: dtype {values.dtype}; it must be a floating-point type")
        if values.ndim != 1 or not len(values):
            raise ValueError(f"{name}: shape {tuple(values.shape)}; it must be a vector with at least one entry")
    if bag_index.dtype != torch.int64:
        raise TypeError(f"bag_index: dtype {bag_index.dtype}; it must be torch.int64")
    if bag_index.shape != pred.shape:
        raise ValueError(f"bag_index: shape {tuple(bag_index.shape)}; it must be {tuple(pred.shape)}, as that of pred")
    _check_kind(loss, weighting)
    return pred.float() if pred.dtype in (torch.float16, torch.bfloat16) else pred


def _check_kind(loss: Loss, weighting: str) -> None:
    if not callable(loss) and loss not in ("mse", "bce"):
        raise ValueError(f"loss: {loss!r}; it must be 'mse', 'bce' or a function of predictions and targets")
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting: {weighting!r}; it must be 'bag' or 'sample'")


def _check_weight(rho: float) -> None:
    if not 0 <= rho <= 1:
        raise ValueError(f"rho: {rho}; it must be in [0, 1]")


def _elementwise(loss: Loss) -> Elementwise:
    if callable(loss):
        return loss
    if loss == "bce":
        return lambda pred, target: F.binary_cross_entropy_with_logits(pred, target, reduction="none")
    return lambda pred, target: (pred - target).square()


def _weights(
    bag_target: Tensor, bag_index: Tensor, weighting: Weighting, dtype: torch.dtype
) -> tuple[Float[Tensor, " bags"], Float[Tensor, " bags"]]:
    """Sizes of the bags, and their weights, which sum to one and are zero for bags without members."""
    sizes = torch.zeros(len(bag_target), dtype=dtype, device=bag_target.device)
    sizes = sizes.scatter_add(0, bag_index, torch.ones(len(bag_index), dtype=dtype, device=bag_index.device))
    counted = sizes if weighting == "sample" else (sizes > 0).to(dtype)
    return sizes, counted / counted.sum()


def _log_mean_exp(values: Tensor, bag_index: Tensor, sizes: Tensor) -> Float[Tensor, " bags"]:
    """Logarithm of the mean of `exp(values)` in each bag, zero for bags without members."""
    floor = torch.finfo(values.dtype).min
    largest = torch.full_like(sizes, floor).scatter_reduce(0, bag_index, values.detach(), "amax")
    total = torch.zeros_like(sizes).scatter_add(0, bag_index, (values - largest.index_select(0, bag_index)).exp())
    there = sizes > 0
    return torch.where(there, largest + torch.where(there, total / sizes.clamp_min(1), 1.0).log(), 0.0)


def private_bag_means(
    y: Float[Tensor, " n"],
    bag_index: Int[Tensor, " n"],
    *,
    bound: float,
    epsilon: float,
    generator: torch.Generator | None = None,
    noise: Float[Tensor, " bags"] | None = None,
) -> Float[Tensor, " bags"]:
    r"""Bag means that keep each response $\varepsilon$-differentially private (the labels, not the features).

    Responses are clipped to [-bound, bound], so that one of them moves its bag's mean by no more than `2 bound / k`;
    bags are disjoint, so that the privacy of one is the privacy of all. As every mechanism on floating-point numbers
    it is not hardened against attacks on their last digits.

    Args:
        y: responses.
        bag_index: bag of each, in [0, bags), every bag with at least one; it must not depend on `y`.
        bound: largest absolute response that is kept, positive; the paper takes it of the order of sqrt(log n).
        epsilon: privacy, positive; smaller is stricter.
        generator: of the noise.
        noise: (bags,) draws of the Laplace distribution with scale 1, in place of drawing them.

    Raises:
        TypeError: if `y` is not floating point or `bag_index` not int64.
        ValueError: if shapes do not fit, a response is not finite, a bag is empty, or `bound` or `epsilon` is not
            positive.

    Example:
        >>> y, bag_index = torch.tensor([1.0, 2.0, 9.0, 0.0]), torch.tensor([0, 0, 1, 1])
        >>> private_bag_means(y, bag_index, bound=5.0, epsilon=1.0, noise=torch.tensor([0.0, 0.1]))
        tensor([1.5000, 3.0000])
    """
    for name, number in (("bound", bound), ("epsilon", epsilon)):
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: {number}; it must be a positive number")
    if not y.is_floating_point():
        raise TypeError(f"y: dtype {y.dtype}; it must be a floating-point type")
    if y.ndim != 1 or not len(y) or not y.isfinite().all():
        raise ValueError(f"y: shape {tuple(y.shape)}; it must be a vector of finite numbers with at least one entry")
    sizes = torch.from_numpy(_bag_sizes(bag_index.cpu().numpy(), len(y))).to(y)
    if noise is None:
        uniform = torch.rand(2, len(sizes), generator=generator, dtype=torch.float64).clamp_min(1e-300)
        noise = (uniform[0] / uniform[1]).log().to(y)  # the difference of two exponential draws
    if noise.shape != sizes.shape:
        raise ValueError(f"noise: shape {tuple(noise.shape)}; it must be {tuple(sizes.shape)}, one draw a bag")
    sums = torch.zeros_like(sizes).index_add(0, bag_index, y.clamp(-bound, bound))
    return (sums + 2 * bound / epsilon * noise) / sizes


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

    It is the limit for many samples and features in a fixed proportion; for `rho` 0 it is
    $\sigma^2 d / (m - d)$, where the exact value has $m - d - 1$. Within bags, means and deviations of the features are
    independent, so that with $p = m / (1 + \delta)$ and the trace $\delta$ of the inverse Gram matrix, from

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
            more samples than features, or more bags than features where `rho` is 0.

    Example:
        >>> [round(aggregate_risk(rho, num_samples=1000, num_features=100, bag_size=5), 3) for rho in (0.0, 0.3, 1.0)]
        [1.0, 0.483, 0.68]
    """
    _check_weight(rho)
    for name, number, least in (("num_samples", num_samples, 1), ("num_features", num_features, 1)):
        if number < least:
            raise ValueError(f"{name}: {number}; it must be at least {least}")
    if not 1 <= bag_size <= num_samples:
        raise ValueError(f"bag_size: {bag_size}; it must be between 1 and num_samples={num_samples}")
    for name, value in (("signal", signal), ("noise", noise), ("alpha", alpha)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: {value}; it must be a number that is not negative")
    d, m = num_features, num_samples / bag_size
    rest = num_samples - m
    rank = num_samples if rho > 0 else m
    if alpha == 0 and d >= rank:
        raise ValueError(
            f"num_features: {d}; without alpha it must be below {rank:g} at rho={rho}, bag_size={bag_size}"
        )
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


class AggregateRidge(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Linear regression from bag means by the interpolating squared loss, in closed form.

    Args:
        rho: weight of the instance-level loss, in [0, 1]. A sequence of weights is searched by cross-validation over
            bags: held-out bag means are predicted, with an error that for bags filled at random ranks weights as the
            error on single samples does.
        alpha: ridge penalty, not negative. Of several minimisers without it, the smallest is taken.
        fit_intercept: learn a constant too, which is not penalised.
        weighting: whether each "sample" counts alike, as in the paper's formula, or each "bag".
        cv: number of folds for the search of `rho`, bags dealt in turn; fewer where there are fewer bags.

    Attributes:
        coef_: (features,) weights.
        intercept_: constant, 0 without one.
        rho_: the weight used.
        cv_errors_: mean squared error on held-out bags for each of a sequence of weights.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> X, bags = rng.normal(size=(300, 2)), np.arange(300) // 3
        >>> bag_means = (X @ [1.0, -2.0]).reshape(100, 3).mean(1)
        >>> AggregateRidge(rho=0.0).fit(X, bag_means, bags).coef_.round(3)
        array([ 1., -2.])
    """

    def __init__(
        self,
        rho: float | Sequence[float] = 0.5,
        alpha: float = 0.0,
        fit_intercept: bool = True,
        weighting: Weighting = "sample",
        cv: int = 5,
    ) -> None:
        self.rho = rho
        self.alpha = alpha
        self.fit_intercept = fit_intercept
        self.weighting = weighting
        self.cv = cv

    def fit(self, X: Any, y: Any, bag_index: Any = None) -> Self:
        """Learns from samples and the mean responses of their bags.

        Args:
            X: (n, features) samples.
            y: (bags,) mean responses.
            bag_index: (n,) bag of each sample, in [0, bags), every bag with at least one; without it every sample is
                its own bag, and this is ridge regression.

        Raises:
            TypeError: if `bag_index` does not hold integers.
            ValueError: shapes do not fit, a value is not finite, or a parameter is out of its range.
        """
        rhos = np.atleast_1d(np.asarray(self.rho, dtype=np.float64))
        if rhos.ndim != 1 or not len(rhos):
            raise ValueError(f"rho: {self.rho!r}; it must be a number or a sequence of numbers")
        for rho in rhos:
            _check_weight(float(rho))
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha: {self.alpha}; it must be a number that is not negative")
        _check_kind("mse", self.weighting)
        if self.cv < 2:
            raise ValueError(f"cv: {self.cv}; it must be at least 2")
        if bag_index is None:
            X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
            bag_index = np.arange(len(X))
        else:
            X = validate_data(self, X, dtype=np.float64)
            y = np.asarray(y, dtype=np.float64)
            if y.ndim != 1 or not np.isfinite(y).all():
                raise ValueError(f"y: shape {y.shape}; it must be a vector of finite numbers, one a bag")
        bag_index = np.asarray(bag_index)
        sizes = _bag_sizes(bag_index, len(X))
        if len(sizes) != len(y):
            raise ValueError(f"y: {len(y)} responses for {len(sizes)} bags of bag_index; there must be one a bag")

        members = csr_matrix((1 / sizes[bag_index], (bag_index, np.arange(len(X)))), shape=(len(y), len(X)))
        means = members @ X
        weights = sizes if self.weighting == "sample" else np.full(len(y), len(X) / len(y))
        deviations = (X - means[bag_index]) * np.sqrt(weights / sizes)[bag_index, None]
        self.rho_ = float(rhos[0])
        if len(rhos) > 1:
            folds = np.arange(len(y)) % min(self.cv, len(y))
            errors = np.zeros(len(rhos))
            for fold in np.unique(folds) if len(y) > 1 else []:
                out, inside = folds == fold, folds[bag_index] != fold
                coefs, intercepts = self._solve(means[~out], y[~out], weights[~out], deviations[inside], rhos)
                errors += weights[out] @ (means[out] @ coefs.T + intercepts - y[out, None]) ** 2 / weights.sum()
            self.cv_errors_ = errors
            self.rho_ = float(rhos[errors.argmin()])
        coefs, intercepts = self._solve(means, y, weights, deviations, np.array([self.rho_]))
        self.coef_, self.intercept_ = coefs[0], float(intercepts[0])
        return self

    def _solve(
        self,
        means: Float[np.ndarray, "bags features"],
        y: Float[np.ndarray, " bags"],
        weights: Float[np.ndarray, " bags"],
        deviations: Float[np.ndarray, "n features"],
        rhos: Float[np.ndarray, " rhos"],
    ) -> tuple[Float[np.ndarray, "rhos features"], Float[np.ndarray, " rhos"]]:
        """Weights and constants for several `rho`, from bag means and weighted deviations from them."""
        x_mean, y_mean = np.zeros(means.shape[1]), 0.0
        if self.fit_intercept:
            x_mean, y_mean = weights @ means / weights.sum(), weights @ y / weights.sum()
        centred = means - x_mean
        right = (weights[:, None] * centred).T @ (y - y_mean)
        of_means, of_deviations = (weights[:, None] * centred).T @ centred, deviations.T @ deviations
        gram = of_means + rhos[:, None, None] * of_deviations + self.alpha * np.eye(len(x_mean))
        # The pseudo-inverse gives the smallest solution where bags or samples are fewer than features.
        coefs = np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ right
        return coefs, y_mean - coefs @ x_mean

    def predict(self, X: Any) -> Float[np.ndarray, " n"]:
        """Responses of single samples (n, features)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return cast(np.ndarray, X @ self.coef_ + self.intercept_)


def _bag_sizes(bag_index: np.ndarray, num_samples: int) -> Float[np.ndarray, " bags"]:
    """Members of each bag, none of which may be empty."""
    if bag_index.dtype.kind not in "iu":
        raise TypeError(f"bag_index: dtype {bag_index.dtype}; it must hold integers")
    if bag_index.shape != (num_samples,):
        raise ValueError(f"bag_index: shape {bag_index.shape}; it must be ({num_samples},), one entry per sample")
    if bag_index.min() < 0:
        raise ValueError(f"bag_index: it holds {bag_index.min()}; bags are counted from 0")
    sizes = np.bincount(bag_index).astype(np.float64)
    if not sizes.all():
        raise ValueError(f"bag_index: bag {int(sizes.argmin())} has no member; bags must be numbered without gaps")
    return sizes
