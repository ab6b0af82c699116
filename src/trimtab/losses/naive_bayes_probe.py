r"""Gaussian naive Bayes with shared variances: a linear classifier on frozen features that is fitted in one pass.

In the place of a logistic linear probe where labels are few, features many, or data come as a stream: it needs two sums
per class, no optimiser, and of the order of log n samples for n features, where logistic regression needs n.

With $m_k$ of the $m$ samples in class $k$, their mean $\mu_k$ and population variances $s_k$,

$$
\pi_k = \frac{m_k}{m}, \qquad v_j = \sum_k \pi_k s_{kj} + \epsilon, \qquad
\hat y(x) = \arg\max_k\; \log \pi_k - \frac12 \sum_j \frac{(x_j - \mu_{kj})^2}{v_j}
$$

which is linear in $x$: the squares of $x$ are common to all classes. Two batches are merged by

$$
\mu_k = \frac{m_k' \mu_k' + m_k'' \mu_k''}{m_k' + m_k''}, \qquad
m_k s_k = m_k' s_k' + m_k'' s_k'' + \frac{m_k' m_k''}{m_k' + m_k''} (\mu_k' - \mu_k'')^2
$$

Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
Implications", ICML 2023, arXiv 2302.02334. The authors bring features to [0, 1] beforehand.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_X_y, validate_data
from torch import Tensor, nn

from trimtab.ops.arguments import positive


def class_moments(
    X: Float[np.ndarray, "n features"], codes: Int[np.ndarray, " n"], num_classes: int
) -> tuple[Float[np.ndarray, " classes"], Float[np.ndarray, "classes features"], Float[np.ndarray, " features"]]:
    """Samples of each class, their mean (0 where there are none), and the squared deviations summed over all samples.

    Args:
        X: features.
        codes: classes, in [0, num_classes).
        num_classes: number of classes.

    Example:
        >>> class_moments(np.array([[1.0], [3.0], [7.0]]), np.array([0, 0, 1]), 2)
        (array([2., 1.]), array([[2.], [7.]]), array([2.]))
    """
    counts = np.bincount(codes, minlength=num_classes).astype(X.dtype)
    members = csr_matrix((np.ones(len(X)), (codes, np.arange(len(X)))), shape=(num_classes, len(X)))
    means = members @ X / np.maximum(counts, 1)[:, None]
    # A second pass over the samples, for differences of large squares would cost digits.
    deviations = X - means[codes]
    return counts, means, np.einsum("ij,ij->j", deviations, deviations)


class NaiveBayesProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Gaussian naive Bayes whose variances are shared by the classes.

    Features and labels may be numpy arrays or tensors on any device; results are numpy arrays.

    Args:
        var_smoothing: added to every variance, positive; once, however many batches there were.
        relative_smoothing: measure `var_smoothing` in units of the largest variance of a feature over all samples, as
            scikit-learn's `GaussianNB` does, instead of absolutely.

    Attributes:
        classes_: (classes,) labels.
        class_count_: (classes,) samples seen.
        class_prior_: (classes,) their shares; a class of `classes_` not seen yet has none and is never predicted.
        mean_: (classes, features) means.
        var_: (features,) shared variances, smoothing included.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> probe = NaiveBayesProbe().fit(X[::2], y[::2])
        >>> round(probe.score(X[1::2], y[1::2]), 2)
        0.96
        >>> probe.to_linear()
        Linear(in_features=4, out_features=3, bias=True)
    """

    classes_: np.ndarray
    class_count_: Float[np.ndarray, " classes"]
    class_prior_: Float[np.ndarray, " classes"]
    mean_: Float[np.ndarray, "classes features"]
    var_: Float[np.ndarray, " features"]
    _deviations: Float[np.ndarray, " features"]
    _centre: Float[np.ndarray, " features"]

    def __init__(self, var_smoothing: float = 1e-9, relative_smoothing: bool = False) -> None:
        self.var_smoothing = var_smoothing
        self.relative_smoothing = relative_smoothing

    def fit(self, X: Any, y: Any) -> Self:
        """Learns from samples (n, features) and their labels (n,), forgetting earlier ones.

        Raises:
            ValueError: shapes do not fit, a value is not finite, labels are not classes, or `var_smoothing` is not
                positive.
        """
        return self._update(X, y, classes=None, first=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """Takes in one batch more; any split into batches gives what `fit` gives on all samples.

        Args:
            X: (n, features) samples.
            y: (n,) labels.
            classes: all labels that will ever come; needed at the first call, may be left out later.

        Raises:
            ValueError: as `fit`, and where `classes` is missing at first, changes later, or lacks a label of `y`.
        """
        first = not hasattr(self, "classes_")
        if first and classes is None:
            raise ValueError("classes must be passed on the first call to partial_fit")
        if classes is not None:
            classes = np.unique(_to_numpy(classes))
            if not first and not np.array_equal(classes, self.classes_):
                raise ValueError(f"classes must be {self.classes_} as at the first call to partial_fit, got {classes}")
        return self._update(X, y, classes=classes, first=first)

    def _update(self, X: Any, y: Any, *, classes: np.ndarray | None, first: bool) -> Self:
        positive("var_smoothing", self.var_smoothing)
        given = _to_numpy(X)
        if first:
            X, y = check_X_y(given, _to_numpy(y), dtype=np.float64, estimator=self)
        else:
            X, y = validate_data(self, given, _to_numpy(y), dtype=np.float64, reset=False)
        check_classification_targets(y)
        if not first:
            classes = self.classes_
        elif classes is None:
            classes = np.unique(y)
        codes = np.searchsorted(classes, y).clip(max=len(classes) - 1)
        if (unknown := classes[codes] != y).any():
            raise ValueError(f"y must be among the classes {classes}, got {y[unknown][0]!r}")
        counts, means, deviations = class_moments(X, codes, len(classes))
        if first:
            validate_data(self, given, skip_check_array=True)  # remembers the columns, once nothing can be refused
        else:
            seen = self.class_count_ + counts
            share = (counts / np.maximum(seen, 1))[:, None]
            step = means - self.mean_
            deviations += self._deviations + ((self.class_count_[:, None] * share) * step**2).sum(0)
            counts, means = seen, self.mean_ + share * step
        self.classes_, self.class_count_, self.mean_, self._deviations = classes, counts, means, deviations
        self.class_prior_ = counts / counts.sum()
        self._centre = self.class_prior_ @ means
        within = deviations / counts.sum()
        unit = 1.0
        if self.relative_smoothing:
            unit = float((within + self.class_prior_ @ (means - self._centre) ** 2).max()) or 1.0
        self.var_ = within + self.var_smoothing * unit
        return self

    def _linear(self) -> tuple[Float[np.ndarray, "classes features"], Float[np.ndarray, " classes"]]:
        """Weights, and biases for features from which `_centre` is taken: squares of large offsets never arise."""
        means = self.mean_ - self._centre
        with np.errstate(divide="ignore"):  # a class not seen yet
            log_prior = np.log(self.class_prior_)
        return means / self.var_, log_prior - 0.5 * (means**2 / self.var_).sum(1)

    def _scores(self, X: Any) -> Float[np.ndarray, "n classes"]:
        check_is_fitted(self)
        X = validate_data(self, _to_numpy(X), dtype=np.float64, reset=False)
        weight, bias = self._linear()
        scores: np.ndarray = (X - self._centre) @ weight.T + bias
        return scores

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each sample (n, features)."""
        scores = self._scores(X)
        predicted: np.ndarray = self.classes_[scores.argmax(1)]
        return predicted

    def predict_log_proba(self, X: Any) -> Float[np.ndarray, "n classes"]:
        """Logarithms of the classes' probabilities for samples (n, features)."""
        found: np.ndarray = log_softmax(self._scores(X), axis=1)
        return found

    def predict_proba(self, X: Any) -> Float[np.ndarray, "n classes"]:
        """The classes' probabilities for samples (n, features)."""
        found: np.ndarray = softmax(self._scores(X), axis=1)
        return found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy on samples (n, features) with labels (n,), with weights (n,) if they are given."""
        return float(accuracy_score(_to_numpy(y), self.predict(X), sample_weight=_to_numpy(sample_weight)))

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The classifier as a layer, whose logits have `predict_log_proba` as log-softmax: a head, or a start for one.

        Args:
            dtype: of its parameters; torch's default type if None.
        """
        check_is_fitted(self)
        weight, bias = self._linear()
        num_classes, num_features = weight.shape
        layer = nn.Linear(num_features, num_classes, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias - weight @ self._centre))
        return layer


def _to_numpy(values: Any) -> Any:
    """A tensor as an array, which numpy alone refuses on an accelerator, with a gradient or in bfloat16."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.double() if values.is_floating_point() else values).numpy()
