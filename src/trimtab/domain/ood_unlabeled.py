r"""Robust self-supervised training (RSS): a few labels, and unlabelled data that may be slightly out of domain.

For classes that form clusters, with many unlabelled samples whose distribution is near that of the labelled ones. Each
unlabelled sample is given the label that the classifier itself would give it, and is then moved to where that label
holds worst, at a price for the way: the boundary is pushed out of the crowd, by about the distance that the data are
out of domain. Distributionally robust optimisation in its dual form,

$$
\phi_\gamma(x, y; \theta) = \sup_z\ \ell(z, y; \theta) - \gamma\, c(z, x), \qquad
\hat\theta = \arg\min_\theta\ \frac{1}{m} \sum_{i=1}^{m} \phi_\gamma(x_i, y_i; \theta)
+ \frac{\lambda}{n} \sum_{j=1}^{n} \phi_{\gamma'}\bigl(x'_j, h_\theta(x'_j); \theta\bigr),
$$

where no gradient flows through the classifier's own hard label $h_\theta$. As $\gamma$ grows $\phi_\gamma$ becomes the
plain loss (the non-robust variant); with $\lambda = 0$ labels alone count. Semi-supervised learning is the case without
a shift.

`robust_surrogate` finds the supremum by gradient ascent for any differentiable model and loss, as is possible in
polynomial time where $\gamma$ exceeds half the loss's smoothness. For a linear classifier of unit norm, the zero-one
loss and $c = \|z - x\|_2$ it is a ramp (`ramp_surrogate`), which `RSSLinearClassifier` minimises; `excess_bound` and
`unlabelled_needed` state the paper's rates for two Gaussians.

The paper's constants $\gamma$, $\gamma'$, $\lambda$ and its optimiser are not published; those here reproduce its
simulation's table within 0.01. Built from the paper's text, as no code has been released.

Reference: Seyed Amir Hossein Saberi, Amir Najafi, Alireza Heidari, Mohammad Hosein Movasaghinia, Abolfazl Motahari and
Babak H. Khalaj, "Out-Of-Domain Unlabeled Data Improves Generalization", ICLR 2024, arXiv 2310.00027.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_array
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, check_X_y, validate_data
from torch import Tensor, nn

from trimtab.ops.arguments import (
    floating_tensor,
    in_range,
    integer,
    non_negative,
    positive,
    real_problem,
)

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits and targets to one loss for each sample."""


def ramp_surrogate(margin: Float[Tensor, " batch"], gamma: float) -> Float[Tensor, " batch"]:
    r"""The robust zero-one loss of a linear classifier of unit norm, `min(1, max(0, 1 - gamma margin))`.

    What is within 1 / gamma of the boundary can be moved across it at a price below the loss it causes. Exact for the
    cost of Euclidean distance.

    Args:
        margin: signed distance from the boundary, $y \langle \theta, x \rangle$.
        gamma: price of moving by one unit; at infinity it is the zero-one loss.

    Raises:
        ValueError: `gamma` is not positive.

    Example:
        >>> ramp_surrogate(torch.tensor([-1.0, 0.0, 1.0, 3.0]), gamma=0.5)
        tensor([1.0000, 1.0000, 0.5000, 0.0000])
    """
    positive("gamma", gamma)
    return (1 - gamma * floating_tensor("margin", margin)).clamp(0.0, 1.0)


def robust_surrogate(
    loss: Loss,
    model: Callable[[Tensor], Tensor],
    x: Float[Tensor, "batch ..."],
    targets: Tensor,
    gamma: float,
    *,
    steps: int = 15,
    lr: float | None = None,
    start: Float[Tensor, "batch ..."] | None = None,
) -> Float[Tensor, " batch"]:
    """For each sample the largest loss less the squared distance that it has to be moved for it, times gamma.

    Found by gradient ascent; where gamma is above half the loss's smoothness the problem is concave and the ascent
    converges to its optimum, elsewhere to a local one. Weights see the loss at the point found (Danskin's theorem).

    Args:
        loss: from the model's outputs and targets to one number a sample, such as cross-entropy without a reduction.
        model: from inputs to outputs; samples must not depend on one another in it (batch statistics).
        x: samples.
        targets: their labels, or those that the model gives them.
        gamma: price of a squared distance of one.
        steps: of ascent.
        lr: step size; 1 / (4 gamma) where it is None.
        start: where the ascent begins; at `x` where it is None.

    Returns:
        One number a sample, no less than its loss but for what the ascent misses.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `gamma` is not positive, `start` has not the shape of `x`, or `loss` does not give one number a
            sample.

    Example:
        >>> def hinge(scores, y): return (1 - y * scores[:, 0]).clamp_min(0)
        >>> robust_surrogate(hinge, lambda x: x, torch.tensor([[0.0]]), torch.tensor([1.0]), gamma=1.0)
        tensor([1.2500])
    """
    if problem := real_problem(targets=targets):
        raise TypeError(problem)
    positive("gamma", gamma)
    integer("steps", steps, 0)
    floating_tensor("x", x)
    if start is not None and (start.shape != x.shape or start.dtype != x.dtype):
        raise ValueError(f"start must be of x's shape {tuple(x.shape)} and {x.dtype}, got {tuple(start.shape)}")
    rate = 1 / (4 * gamma) if lr is None else positive("lr", lr)
    moved = (x if start is None else start).detach().clone()
    for _ in range(steps):
        with torch.enable_grad():
            moved.requires_grad_()
            value = _each(loss(model(moved), targets), len(x)) - gamma * _squared(moved - x.detach())
            (slope,) = torch.autograd.grad(value.sum(), moved)
        moved = (moved + rate * slope).detach()
    return _each(loss(model(moved), targets), len(x)) - gamma * _squared(moved - x.detach())


def _each(values: Tensor, count: int) -> Tensor:
    if values.shape != (count,):
        raise ValueError(f"loss must give one number a sample, {count} in all, got shape {tuple(values.shape)}")
    return values


def _squared(offset: Tensor) -> Tensor:
    return offset.flatten(1).square().sum(1)


class RSSLoss(nn.Module):
    """The objective for any classifier with logits: labelled samples, and unlabelled ones under their own labels.

    Args:
        lam: weight of the unlabelled part.
        gamma: price of moving labelled samples; None leaves them where they are.
        gamma_unlabelled: price of moving unlabelled samples; None likewise, which is plain self-training.
        steps: of the inner ascent.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> model, rss = nn.Linear(2, 3), RSSLoss(lam=0.5)
        >>> sorted(rss(model, torch.randn(4, 2), torch.arange(4) % 3, torch.randn(20, 2)))
        ['labelled', 'total', 'unlabelled']
    """

    def __init__(
        self, lam: float = 1.0, gamma: float | None = 1.0, gamma_unlabelled: float | None = 1.0, *, steps: int = 15
    ) -> None:
        super().__init__()
        self.lam = non_negative("lam", lam)
        self.gamma = None if gamma is None else positive("gamma", gamma)
        self.gamma_unlabelled = None if gamma_unlabelled is None else positive("gamma_unlabelled", gamma_unlabelled)
        self.steps = integer("steps", steps, 0)

    def forward(
        self,
        model: Callable[[Tensor], Tensor],
        x: Float[Tensor, "m ..."],
        targets: Int[Tensor, " m"],
        unlabelled: Float[Tensor, "n ..."],
    ) -> dict[str, Tensor]:
        """`total`, and its parts `labelled` and `unlabelled` before weighting.

        Raises:
            TypeError: samples are not floating point, or `targets` not int64.
            ValueError: there are no labelled samples, or not as many as targets.
        """
        floating_tensor("x", x)
        floating_tensor("unlabelled", unlabelled)
        if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
            raise TypeError(f"targets must be int64, got {getattr(targets, 'dtype', type(targets).__name__)}")
        if len(x) == 0 or targets.shape != x.shape[:1]:
            raise ValueError(
                f"x and targets must be as many, at least one, got {tuple(x.shape)} and {tuple(targets.shape)}"
            )
        labelled = self._mean(model, x, targets, self.gamma)
        if self.lam == 0 or len(unlabelled) == 0:
            return {"total": labelled, "labelled": labelled, "unlabelled": torch.zeros_like(labelled)}
        with torch.no_grad():
            own = model(unlabelled).argmax(1)
        other = self._mean(model, unlabelled, own, self.gamma_unlabelled)
        return {"total": labelled + self.lam * other, "labelled": labelled, "unlabelled": other}

    def _mean(self, model: Callable[[Tensor], Tensor], x: Tensor, targets: Tensor, gamma: float | None) -> Tensor:
        if gamma is None:
            return nn.functional.cross_entropy(model(x), targets)
        each = nn.CrossEntropyLoss(reduction="none")
        return robust_surrogate(each, model, x, targets, gamma, steps=self.steps).mean()


class RSSLinearClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A hyperplane between two classes, by the ramp on labels and pseudo-labels.

    The direction starts at the difference of the labelled means and is kept at unit norm; Adam, full batches. Data are
    not scaled: gamma is in their unit.

    Args:
        lam: weight of the unlabelled part; more labels want a larger one.
        gamma: price of moving a labelled sample by one unit.
        gamma_unlabelled: price of moving an unlabelled one.
        robust: whether labelled samples count by the ramp; else by the logistic loss, which nothing moves.
        center: whether the boundary passes through the midpoint of the labelled means; else through the origin.
        lr: Adam's step size.
        n_iter: steps.

    Attributes:
        coef_: unit normal of the boundary, (1, features).
        intercept_: (1,).
        classes_: the two classes.
        n_iter_: steps made.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> unlabelled = rng.normal(size=(200, 2)) + np.array([3.0, 3.0]) * rng.choice([-1, 1], size=(200, 1))
        >>> model = RSSLinearClassifier().fit([[2.0, 1.0], [-2.0, 0.0]], [1, 0], unlabelled)
        >>> bool(model.coef_[0, 1] > 0.4)  # by the labels alone it would be 0.24
        True
    """

    def __init__(
        self,
        lam: float = 10.0,
        gamma: float = 0.5,
        gamma_unlabelled: float = 0.5,
        *,
        robust: bool = True,
        center: bool = True,
        lr: float = 0.05,
        n_iter: int = 150,
    ) -> None:
        self.lam = lam
        self.gamma = gamma
        self.gamma_unlabelled = gamma_unlabelled
        self.robust = robust
        self.center = center
        self.lr = lr
        self.n_iter = n_iter

    def fit(self, X: Any, y: Any, X_unlabelled: Any = None) -> Self:
        """Fits the boundary.

        Args:
            X: labelled samples, (m, features).
            y: their classes, two of them.
            X_unlabelled: unlabelled samples, (n, features); none where it is None.

        Raises:
            ValueError: data are not finite or do not fit, there are not two classes, or a parameter is out of range.
        """
        lam, gamma = non_negative("lam", self.lam), positive("gamma", self.gamma)
        gamma_unlabelled = positive("gamma_unlabelled", self.gamma_unlabelled)
        lr, steps = positive("lr", self.lr), integer("n_iter", self.n_iter)
        given = X
        X, y = check_X_y(X, y, dtype=np.float64, estimator=self)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        classes = np.unique(y)
        if len(classes) != 2:
            raise ValueError(f"y must hold two classes, got 1 class: {classes[0]!r}")
        if X_unlabelled is not None:
            X_unlabelled = check_array(X_unlabelled, dtype=np.float64)
            if X_unlabelled.shape[1] != X.shape[1]:
                raise ValueError(f"X_unlabelled must have {X.shape[1]} features as X, got {X_unlabelled.shape[1]}")
        validate_data(self, given, skip_check_array=True)  # remembers the columns, once nothing can be refused any more
        sign = torch.as_tensor(np.where(y == classes[1], 1.0, -1.0))
        x = torch.tensor(X)  # a copy: PyTorch takes no arrays that may not be written to
        means = [x[sign == side].mean(0) for side in (1.0, -1.0)]
        middle = (means[0] + means[1]) / 2 if self.center else torch.zeros_like(means[0])
        x = x - middle
        crowd = x[:0] if X_unlabelled is None else torch.tensor(X_unlabelled) - middle
        direction = _descend(
            sign[:, None] * x, crowd, (lam, gamma, gamma_unlabelled), robust=self.robust, lr=lr, steps=steps
        )
        self.classes_ = classes
        self.coef_ = direction.numpy()[None]
        self.intercept_ = -(self.coef_ @ middle.numpy())
        self.n_iter_ = steps
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Signed distance from the boundary, positive for the second class."""
        check_is_fitted(self)
        given = validate_data(self, X, reset=False, dtype=np.float64)
        scores: NDArray[np.float64] = given @ self.coef_[0] + self.intercept_[0]
        return scores

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each sample."""
        scores = self.decision_function(X)
        labels: NDArray[Any] = self.classes_[(scores > 0).astype(int)]
        return labels

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


def _descend(
    signed: Tensor, crowd: Tensor, weights: tuple[float, float, float], *, robust: bool, lr: float, steps: int
) -> Tensor:
    """The unit direction after so many steps from the mean of the signed labelled samples."""
    lam, gamma, gamma_unlabelled = weights
    mean = signed.mean(0)
    length = float(mean.norm())
    theta = mean / length if length > 0 else torch.ones_like(mean) / math.sqrt(len(mean))
    theta.requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr)
    for _ in range(steps):
        margin = signed @ theta
        loss = (ramp_surrogate(margin, gamma) if robust else nn.functional.softplus(-margin)).mean()
        if lam and len(crowd):
            # The margin by one's own label is never negative.
            loss = loss + lam * ramp_surrogate((crowd @ theta).abs(), gamma_unlabelled).mean()
        (slope,) = torch.autograd.grad(loss, theta)
        # Along the sphere alone: what a step gains by a longer vector is taken back, and would turn Adam's others.
        theta.grad = slope - (slope @ theta.detach()) * theta.detach()
        optimizer.step()
        with torch.no_grad():
            theta /= theta.norm().clamp_min(1e-12)
    return theta.detach()


def excess_bound(d: int, m: int, n: int, *, alpha: float, mean_norm: float, sigma: float, delta: float = 0.05) -> float:
    """How the excess zero-one error of RSS scales on two Gaussians (Theorem 4.2), constants left out.

    For labelled samples of mean +-mu, ||mu|| = `mean_norm`, and unlabelled ones of means and deviation at a Wasserstein
    distance of about `alpha`. Labels alone give (d / m)^(1/2).

    Args:
        d: dimension.
        m: number of labelled samples.
        n: number of unlabelled samples.
        alpha: how far the unlabelled distribution is from the labelled one.
        mean_norm: distance of a class's mean from the origin.
        sigma: deviation of the classes.
        delta: probability of failure.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> near, far = (excess_bound(50, 20, 10**6, alpha=a, mean_norm=1.5, sigma=1.0) for a in (0.0, 0.5))
        >>> near < far
        True
    """
    integer("d", d)
    integer("m", m)
    integer("n", n, 0)
    non_negative("alpha", alpha)
    positive("mean_norm", mean_norm)
    positive("sigma", sigma)
    in_range("delta", delta, 0, 1, "neither")
    kappa = math.exp(-(mean_norm**2) / (4 * sigma**2)) / math.sqrt(2 * sigma * math.sqrt(2 * math.pi))
    tail = 2 * math.log(1 / delta)
    crowd = (mean_norm**2 + sigma**2) * 2 * d * alpha / m + 4 * d / m * math.sqrt((2 * d + tail) / (2 * n + m))
    return kappa * math.sqrt(math.sqrt(crowd)) + math.sqrt(tail / m)


def unlabelled_needed(d: int, m: int) -> tuple[float, float]:
    """With what shift and how many unlabelled samples RSS improves on labels alone, up to constants: d/m and m^2/d.

    Example:
        >>> unlabelled_needed(d=50, m=20)
        (2.5, 8.0)
    """
    integer("d", d)
    integer("m", m)
    return d / m, m**2 / d
