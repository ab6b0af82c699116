"""Functions with closed derivatives and the approximations of their Hessians that second-order methods use.

Each is called on a vector for its value and has `gradient(x)` and `hessian(x)`, and the approximations that it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.arguments import integer, non_negative, real_problem, tensor_problem
from trimtab.ops.arguments import labels as read_labels


class LogisticObjective:
    r"""Mean logistic loss of a linear classifier with two classes, plus half the squared norm times `l2`.

    $$ f(x) = \frac{1}{n} \sum_i \log(1 + e^{-y_i a_i^\top x}) + \frac{\mu}{2} \lVert x \rVert^2 $$

    Its Gauss-Newton and its Fisher matrix are the Hessian itself.

    Args:
        features: (n, d), the rows $a_i$; an intercept is a column of ones.
        labels: (n,), each 1 or -1.
        l2: at least 0.

    Raises:
        ValueError: a shape does not fit, a feature is not finite, a label is neither 1 nor -1, or `l2` is negative.

    Example:
        >>> f = LogisticObjective(torch.eye(2), torch.tensor([1.0, -1.0]))
        >>> f(torch.zeros(2)), f.gradient(torch.zeros(2))
        (tensor(0.6931), tensor([-0.2500,  0.2500]))
    """

    def __init__(self, features: Float[Tensor, "n d"], labels: Float[Tensor, " n"], *, l2: float = 0.0) -> None:
        _check_features(features, labels, l2)
        if not (labels.abs() == 1).all():
            raise ValueError("labels must be 1 or -1, got others")
        self.features, self.labels, self.l2 = features, labels.to(features), l2

    def __call__(self, x: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        margins = self.labels * (self.features @ x)
        return torch.nn.functional.softplus(-margins).mean() + 0.5 * self.l2 * x.dot(x)

    def gradient(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The first derivatives."""
        wrong = torch.sigmoid(-self.labels * (self.features @ x))
        return (wrong * self.labels) @ self.features / -len(self.labels) + self.l2 * x

    def hessian(self, x: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """The second derivatives."""
        scores = self.features @ x
        weights = torch.sigmoid(scores) * torch.sigmoid(-scores)
        return self._weighted(weights[:, None])

    def hessian_bound(self, x: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """The least matrix above all Hessians: each weight $s (1 - s)$ replaced by its maximum of a quarter."""
        return self._bound

    @cached_property
    def _bound(self) -> Tensor:
        return self._weighted(torch.full_like(self.features[:, :1], 0.25))

    def _weighted(self, weights: Tensor) -> Tensor:
        matrix = self.features.mT @ (weights * self.features) / len(self.labels)
        matrix.diagonal().add_(self.l2)
        return matrix


class SoftmaxObjective:
    r"""Mean cross-entropy of a linear classifier with many classes, plus half the squared norm times `l2`.

    $$ f(X) = \frac{1}{n} \sum_i \Bigl( \log \sum_c e^{x_c^\top a_i} - x_{y_i}^\top a_i \Bigr)
       + \frac{\mu}{2} \lVert X \rVert^2 $$

    The variable is the matrix of weights (num_classes, d), row after row.

    Args:
        features: (n, d), the rows $a_i$; an intercept is a column of ones.
        labels: (n,), each in 0 to `num_classes - 1`.
        num_classes: at least 2.
        l2: at least 0.

    Raises:
        ValueError: a shape does not fit, a feature is not finite, a label is out of its range, or `l2` is negative.

    Example:
        >>> f = SoftmaxObjective(torch.eye(2), torch.tensor([0, 1]), num_classes=4)
        >>> f(torch.zeros(8)).item() == torch.tensor(4.0).log().item()
        True
    """

    def __init__(
        self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], num_classes: int, *, l2: float = 0.0
    ) -> None:
        _check_features(features, labels, l2)
        integer("num_classes", num_classes, 2)
        labels = read_labels("labels", labels, num_classes)
        self.features, self.labels, self.num_classes, self.l2 = features, labels, num_classes, l2

    def scores(self, x: Float[Tensor, " weights"]) -> Float[Tensor, "n classes"]:
        """The logits of all samples."""
        if problem := real_problem(x=x):
            raise TypeError(problem)
        return self.features @ x.view(self.num_classes, -1).mT

    def __call__(self, x: Float[Tensor, " weights"]) -> Float[Tensor, ""]:
        if problem := real_problem(x=x):
            raise TypeError(problem)
        return torch.nn.functional.cross_entropy(self.scores(x), self.labels) + 0.5 * self.l2 * x.dot(x)

    def gradient(self, x: Float[Tensor, " weights"]) -> Float[Tensor, " weights"]:
        """The first derivatives."""
        excess = self.scores(x).softmax(1)
        excess[torch.arange(len(excess), device=x.device), self.labels] -= 1
        return (excess.mT @ self.features).flatten() / len(excess) + self.l2 * x

    def hessian(self, x: Float[Tensor, " weights"]) -> Float[Tensor, "weights weights"]:
        """The second derivatives; also the Fisher and the generalised Gauss-Newton matrix."""
        spread = self._spread(x)
        return self._blocks(spread).sub_(spread.mT @ spread, alpha=1 / len(spread))

    def gauss_newton(self, x: Float[Tensor, " weights"]) -> Float[Tensor, "weights weights"]:
        """The paper's weighted Gauss-Newton matrix: the Hessian's part with $\\mathrm{diag}(p)$, without $-p p^\\top$.

        Block diagonal, one block for each class.
        """
        return self._blocks(self._spread(x))

    def _spread(self, x: Tensor) -> Tensor:
        """(n, weights): each row of features times each class probability."""
        return (self.scores(x).softmax(1)[:, :, None] * self.features[:, None]).flatten(1)

    def _blocks(self, spread: Tensor) -> Tensor:
        n, d = self.features.shape
        matrix = spread.new_zeros(self.num_classes, d, self.num_classes, d)
        own = torch.arange(self.num_classes, device=spread.device)
        matrix[own, :, own] = (spread.mT @ self.features).view(self.num_classes, d, d) / n
        matrix = matrix.view(self.num_classes * d, -1)
        matrix.diagonal().add_(self.l2)
        return matrix


class NonlinearEquations:
    r"""A power of the norm of a vector of residuals, $f(x) = \lVert u(x) \rVert^p / p$; with p = 2 nonlinear least
    squares.

    With the Jacobian J of u, and g = Jᵀu, the second derivatives without those of u are
    $\lVert u \rVert^{p-2} J^\top J + (p - 2) \lVert u \rVert^{p-4} g g^\top$.

    Args:
        residuals: maps (d,) to (m,), differentiable by `torch.func`.
        power: at least 2.

    Raises:
        ValueError: `power` is below 2.

    Example:
        >>> rosenbrock = NonlinearEquations(lambda x: torch.stack([1 - x[0], 10 * (x[1] - x[0] ** 2)]))
        >>> rosenbrock(torch.zeros(2))
        tensor(0.5000)
    """

    def __init__(self, residuals: Callable[[Float[Tensor, " d"]], Float[Tensor, " m"]], *, power: float = 2.0) -> None:
        if not 2 <= power < math.inf:
            raise ValueError(f"power must be a number of at least 2, got {power!r}")
        self.residuals, self.power = residuals, power

    def __call__(self, x: Float[Tensor, " d"]) -> Float[Tensor, ""]:
        if problem := real_problem(x=x):
            raise TypeError(problem)
        return self.residuals(x).square().sum() ** (self.power / 2) / self.power

    def gradient(self, x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The first derivatives."""
        u, pulled_back = cast("tuple[Tensor, Any]", torch.func.vjp(self.residuals, x))
        scale = 1.0 if self.power == 2 else u.norm() ** (self.power - 2)
        slope: Tensor = pulled_back(u * scale)[0]
        return slope

    def hessian(self, x: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """The second derivatives, those of the residuals included."""
        if self.power > 2 and not self.residuals(x).any():  # where differentiating a norm gives no number
            return x.new_zeros(len(x), len(x))
        hessian: Tensor = torch.func.jacfwd(self.gradient)(x)
        return hessian

    def gauss_newton(self, x: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """The second derivatives without those of the residuals."""
        jacobian, norm = self._jacobian(x)
        return norm ** (self.power - 2) * (jacobian.mT @ jacobian) + self.fisher(x)

    def fisher(self, x: Float[Tensor, " d"]) -> Float[Tensor, "d d"]:
        """Of the second derivatives only the term along the gradient, of rank one; zero for least squares."""
        jacobian, norm = self._jacobian(x)
        if self.power == 2 or norm == 0:
            return jacobian.new_zeros(len(x), len(x))
        along = jacobian.mT @ (self.residuals(x) / norm)  # of unit length, so that no power of the norm is negative
        return (self.power - 2) * norm ** (self.power - 2) * torch.outer(along, along)

    def _jacobian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        jacobian: Tensor = torch.func.jacrev(self.residuals)(x)
        return jacobian, self.residuals(x).norm()


def _check_features(features: Tensor, labels: Tensor, l2: float) -> None:
    if problem := tensor_problem(features=features, labels=labels):
        raise TypeError(problem)
    if features.dim() != 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(f"features must be a floating point matrix with entries, got shape {tuple(features.shape)}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have shape ({len(features)},), got {tuple(labels.shape)}")
    if not features.isfinite().all():
        raise ValueError("features must be finite, got NaN or infinity")
    non_negative("l2", l2)
