r"""Gradient descent on the logistic loss with large steps, its limit the batch perceptron, and the normalised step.

For separating two classes exactly in few full passes, above all where most samples are easy: dividing the gradient by
the mean weight of mistakes takes the number of samples out of the number of iterations.

With margins $m_i = y_i \langle a_i, \theta \rangle$ and weights $w_i = 1 / (1 + e^{m_i})$,

$$
\text{LR+GD:}\quad \theta \leftarrow \theta + \frac{\gamma}{n} \sum_i w_i y_i a_i, \qquad
\text{Normalized LR+GD:}\quad \theta \leftarrow \theta + \gamma \frac{\sum_i w_i y_i a_i}{\sum_i w_i}
$$

From $\theta = 0$ and as $\gamma \to \infty$, $\theta / \gamma$ of the first follows the batch perceptron, which needs
up to $n R^2 / \mu^2$ iterations for samples of norm at most R and margin $\mu$; the second needs up to
$R^2 / \mu^2 + 2 \ln(2n - 1) / (\gamma \mu^2)$.

Reference: Alexander Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with
Large Step Sizes", AAAI 2025, arXiv 2412.08424.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, check_X_y, validate_data
from torch import Tensor

from trimtab.ops.arguments import assured, integer, positive, tensor_problem


def logistic_step(
    theta: Float[Tensor, " d"], X: Float[Tensor, "n d"], y: Float[Tensor, " n"], gamma: float
) -> Float[Tensor, " d"]:
    """One step of gradient descent on the mean logistic loss.

    Args:
        theta: (d,) weights.
        X: (n, d) samples.
        y: (n,) labels, -1 and 1.
        gamma: step size, positive.

    Raises:
        ValueError: shapes do not fit, a label is neither -1 nor 1, or `gamma` is not positive.

    Example:
        >>> logistic_step(torch.zeros(2), torch.eye(2), torch.tensor([1.0, -1.0]), gamma=4.0)
        tensor([ 1., -1.])
    """
    samples = _signed(theta, X, y, gamma)
    return theta + gamma * _logistic_weights(samples @ theta) @ samples


def normalized_logistic_step(
    theta: Float[Tensor, " d"], X: Float[Tensor, "n d"], y: Float[Tensor, " n"], gamma: float
) -> Float[Tensor, " d"]:
    """One step of Normalized LR+GD (Section 6); its length is at most `gamma` times the largest norm of a sample.

    The quotient is a softmax of log-weights, so that it stays defined where all weights underflow.

    Args:
        theta: (d,) weights.
        X: (n, d) samples.
        y: (n,) labels, -1 and 1.
        gamma: step size, positive.

    Raises:
        ValueError: shapes do not fit, a label is neither -1 nor 1, or `gamma` is not positive.

    Example:
        >>> normalized_logistic_step(torch.zeros(2), torch.eye(2), torch.tensor([1.0, -1.0]), gamma=4.0)
        tensor([ 2., -2.])
    """
    samples = _signed(theta, X, y, gamma)
    return theta + gamma * _normalized_weights(samples @ theta) @ samples


def batch_perceptron_step(
    theta: Float[Tensor, " d"], X: Float[Tensor, "n d"], y: Float[Tensor, " n"]
) -> Float[Tensor, " d"]:
    """One step of the batch perceptron (Section 3), to which LR+GD over `gamma` tends from zero.

    Samples with margin 0 count as mistakes; where all margins are 0, as at `theta = 0`, the step is half as long.

    Args:
        theta: (d,) weights.
        X: (n, d) samples.
        y: (n,) labels, -1 and 1.

    Raises:
        ValueError: shapes do not fit, or a label is neither -1 nor 1.

    Example:
        >>> batch_perceptron_step(torch.tensor([1.0, 1.0]), torch.eye(2), torch.tensor([1.0, -1.0]))
        tensor([1.0000, 0.5000])
    """
    samples = _signed(theta, X, y, 1.0)
    return theta + _perceptron_weights(samples @ theta) @ samples


def normalized_logistic_loss(logits: Float[Tensor, " n"], targets: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """A loss under which plain SGD with learning rate `gamma` on a linear model is Normalized LR+GD.

    The mean of the negative margins, weighted by how wrong each sample is; the weights are constants to autograd. It is
    negative once all samples are right. For networks the paper names it as an outlook and promises nothing.

    Args:
        logits: (n,) scores of the second class, of the whole data set.
        targets: (n,) labels 0 and 1.

    Raises:
        TypeError: an argument is no real tensor.
        ValueError: `logits` is not a non-empty vector, `targets` has another shape, or a target is neither 0 nor 1.

    Example:
        >>> logits = torch.tensor([0.0, 3.0], requires_grad=True)
        >>> normalized_logistic_loss(logits, torch.tensor([1.0, 1.0])).backward()
        >>> logits.grad
        tensor([-0.9134, -0.0866])
    """
    if problem := tensor_problem(logits=logits, targets=targets):
        raise TypeError(problem)
    if logits.dim() != 1 or not len(logits):
        raise ValueError(f"logits must have shape (n,) with n > 0, got {tuple(logits.shape)}")
    if targets.shape != logits.shape:
        raise ValueError(f"targets must have shape {tuple(logits.shape)}, got {tuple(targets.shape)}")
    assured((targets == 0) | (targets == 1), "targets must be 0 or 1, got others")
    margins = (2 * targets.to(logits.dtype) - 1) * logits
    return -(_normalized_weights(margins.detach()) @ margins)


def _signed(theta: Tensor, X: Tensor, y: Tensor, gamma: float) -> Float[Tensor, "n d"]:
    """The samples times their labels, which the classifier must bring to one side."""
    if problem := tensor_problem(theta=theta, X=X, y=y):
        raise TypeError(problem)
    if X.dim() != 2 or not len(X):
        raise ValueError(f"X must have shape (n, d) with n > 0, got {tuple(X.shape)}")
    if theta.shape != X.shape[1:]:
        raise ValueError(f"theta must have shape ({X.shape[1]},), got {tuple(theta.shape)}")
    if y.shape != X.shape[:1]:
        raise ValueError(f"y must have shape ({len(X)},), got {tuple(y.shape)}")
    _check_gamma(gamma)
    assured((y == 1) | (y == -1), "y must be -1 or 1, got others")
    return X * y[:, None].to(X.dtype)


def _check_gamma(gamma: float) -> None:
    positive("gamma", gamma)


def _logistic_weights(margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return torch.sigmoid(-margins) / len(margins)


def _normalized_weights(margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return F.logsigmoid(-margins).softmax(0)


def _perceptron_weights(margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    wrong = (margins <= 0).to(margins.dtype) / len(margins)
    return torch.where((margins == 0).all(), 0.5 * wrong, wrong)


class _Separator(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Full-batch steps from zero until every training sample is on its side; a subclass weights the samples."""

    def __init__(self, max_iter: int = 10_000, fit_intercept: bool = False) -> None:
        self.max_iter = max_iter
        self.fit_intercept = fit_intercept

    def _step_weights(self, margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        raise NotImplementedError

    def _check_parameters(self) -> None:
        integer("max_iter", self.max_iter)

    def fit(self, X: Any, y: Any) -> Self:
        """Learns from samples (n, d) and labels of two classes.

        Raises:
            ValueError: there are not exactly two classes, or a parameter is out of its range.

        Warns:
            sklearn.exceptions.ConvergenceWarning: after `max_iter` steps some samples are still on the wrong side.
        """
        self._check_parameters()
        given = X
        X, y = check_X_y(X, y, dtype=np.float64, estimator=self)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) != 2:
            raise ValueError(f"y must hold two classes, got 1 class: {classes[0]!r}")
        validate_data(self, given, skip_check_array=True)  # remembers the columns, once nothing can be refused any more
        self.classes_ = classes

        features = np.hstack([X, np.ones((len(X), 1))]) if self.fit_intercept else X
        samples = torch.from_numpy(features * (2.0 * codes - 1)[:, None])
        theta = samples.new_zeros(samples.shape[1])
        losses: list[float] = []
        mistakes: list[int] = []
        while True:
            margins = samples @ theta
            losses.append(float(F.softplus(-margins).mean()))
            mistakes.append(int((margins <= 0).sum()))
            if not mistakes[-1] or len(mistakes) > self.max_iter:
                break
            theta = theta + self._step_weights(margins) @ samples
        self.n_iter_ = len(mistakes) - 1
        self.history_ = {"loss": np.array(losses), "mistakes": np.array(mistakes)}
        self.coef_ = theta[None, : X.shape[1]].numpy().copy()
        self.intercept_ = theta[X.shape[1] :].numpy().copy() if self.fit_intercept else np.zeros(1)
        if mistakes[-1]:
            warnings.warn(
                f"{type(self).__name__} stopped after {self.n_iter_} iterations with {mistakes[-1]} of {len(X)} "
                "training samples on the wrong side: raise max_iter, or the classes cannot be separated",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, " n"]:
        """Scores of samples (n, d), positive for the second class."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        scores: np.ndarray = X @ self.coef_[0] + self.intercept_[0]
        return scores

    def predict(self, X: Any) -> np.ndarray:
        """Classes of samples (n, d)."""
        scores = self.decision_function(X)
        predicted: np.ndarray = self.classes_[(scores > 0).astype(int)]
        return predicted

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags


class _GradientSeparator(_Separator):
    def __init__(self, gamma: float = 1.0, max_iter: int = 10_000, fit_intercept: bool = False) -> None:
        super().__init__(max_iter=max_iter, fit_intercept=fit_intercept)
        self.gamma = gamma

    def _check_parameters(self) -> None:
        super()._check_parameters()
        _check_gamma(self.gamma)


class LogisticGD(_GradientSeparator):
    """Logistic regression by gradient descent from zero, stopped at the first separating weights (LR+GD).

    Args:
        gamma: step size, positive; large ones separate sooner, at higher losses on the way.
        max_iter: most iterations.
        fit_intercept: append a constant feature of 1; without it, the separating hyperplane passes through the origin.

    Attributes:
        coef_: (1, d) weights.
        intercept_: (1,) weight of the constant feature, 0 without one.
        classes_: the two classes; scores are positive for the second.
        n_iter_: number of steps.
        history_: "loss", the mean logistic loss, and "mistakes", samples on the wrong side or on the border, of the
            weights from zero to the last: `n_iter_ + 1` numbers each.

    Example:
        >>> X, y = [[0.5, -1.0]] + 99 * [[-0.5, -1.0]], [1] + 99 * [0]
        >>> LogisticGD(gamma=100.0).fit(X, y).n_iter_, NormalizedLogisticGD(gamma=100.0).fit(X, y).n_iter_
        (31, 2)
    """

    def _step_weights(self, margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.gamma * _logistic_weights(margins)


class NormalizedLogisticGD(_GradientSeparator):
    """Normalized LR+GD, stopped at the first separating weights.

    Parameters and attributes are those of `LogisticGD`; the larger `gamma`, the fewer iterations are guaranteed.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> NormalizedLogisticGD(gamma=100.0).fit(X, y == 0).score(X, y == 0)
        1.0
    """

    def _step_weights(self, margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.gamma * _normalized_weights(margins)


class BatchPerceptron(_Separator):
    """The batch perceptron: add the mean over all samples of those that are wrong, until none is.

    Parameters and attributes are those of `LogisticGD`, without `gamma`.

    Example:
        >>> BatchPerceptron().fit([[2.0, 1.0], [-1.0, 1.0]], [1, 0]).n_iter_
        1
    """

    def _step_weights(self, margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return _perceptron_weights(margins)


class NormalizedBatchPerceptron(_Separator):
    """The batch perceptron with the mean over the wrong samples alone: the limit of Normalized LR+GD (Theorem 5.3).

    Parameters and attributes are those of `LogisticGD`, without `gamma`.

    Example:
        >>> NormalizedBatchPerceptron().fit([[2.0, 1.0], [-1.0, 1.0]], [1, 0]).n_iter_
        1
    """

    def _step_weights(self, margins: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        wrong = (margins <= 0).to(margins.dtype)
        return wrong / wrong.sum()
