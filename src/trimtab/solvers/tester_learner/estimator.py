"""The estimator: descent on one half of the samples, tests and the choice among iterates on the other."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, check_X_y, validate_data

from trimtab.ops.arguments import in_range, integer, one_of, positive
from trimtab.solvers.tester_learner.certificate import (
    HalfspaceCertificate,
    RejectedError,
    RejectionWarning,
)
from trimtab.solvers.tester_learner.checks import Checks, worst
from trimtab.solvers.tester_learner.descent import halfspace_iterates
from trimtab.solvers.tester_learner.directions import Matrix
from trimtab.solvers.tester_learner.slabs import Slabs


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
    - sample size: the bands hold enough samples for the tests to mean anything. Where this alone fails, there are too
      few samples to tell (`report_.only_too_few`), and nothing speaks against them. As in the paper, whose number of
      samples is a polynomial of d and 1/`epsilon`, a larger `epsilon` needs fewer: with the defaults in 5 dimensions
      0.1 takes about 11,000 samples and 0.5 about 2,000; `report_.enough_samples` and `report_.least_epsilon` say what
      it would be here.

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
        given = X
        X, y = check_X_y(X, y, dtype=np.float64, ensure_min_samples=2, estimator=self)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) != 2:
            raise ValueError(f"y must be of two classes, got 1 class: {classes[0]!r}")
        validate_data(self, given, skip_check_array=True)  # remembers the columns, once nothing can be refused any more
        self.classes_ = classes
        labels = 2.0 * codes - 1

        random = check_random_state(self.random_state)
        order = random.permutation(len(X))
        descent, held = order[: len(X) // 2], order[len(X) // 2 :]
        kept = np.linspace(self.n_iter, 0, self.n_candidates, endpoint=False).round().astype(np.int64)
        sigmas = self._sigmas(self.epsilon)
        checks = self._checks(X.shape[1], sigmas)
        X_held, y_held = X[held], labels[held]
        tests = list(checks.moments("moments", X))
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
            tests.append(checks.sample_size(sigma, len(held)))
            local = [test for w in found for test in checks.around(w, X_held, sigma)]
            tests.extend(worst(local, sigma))
            rate = self.noise_rate if self.noise == "massart" else 0.0
            tests.append(checks.stationarity(found, X_held, y_held, sigma, rate))

        self.candidates_ = np.stack(candidates)
        # A negation is wrong where its candidate is right, and all tests are alike for both.
        wrong = ((X_held @ self.candidates_.T > 0) != (y_held[:, None] > 0)).mean(0)
        best = int(np.minimum(wrong, 1 - wrong).argmin())
        self.error_ = float(min(wrong[best], 1 - wrong[best]))
        w = self.candidates_[best] * (1 if wrong[best] <= 0.5 else -1)
        self.coef_, self.intercept_ = w[None].copy(), np.zeros(1)
        self.sigma_ = sigmas[best * len(sigmas) // len(candidates)]
        slabs = Slabs.of(w, X_held, self.sigma_)
        angles = np.geomspace(min(self.sigma_, math.pi / 4), math.pi / 4, 8)
        factor = max(slabs.disagreement(angle) / angle for angle in angles)
        # Half of the samples, the larger one, is for the tests.
        enough = 2 * max(map(checks.enough, sigmas)) - 1
        least = self._least_epsilon(X.shape[1], len(held))
        self.report_ = HalfspaceCertificate(tuple(tests), float(factor), enough, least)
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
        otherwise = 'on_reject="warn" or "ignore" predicts all the same, without a guarantee'
        if self.report_.only_too_few:
            few = "there are too few samples to tell, and no test of them failed"
            return f"{few}: {self.report_.remedy}; {otherwise}"
        failed = ", ".join(f"{test.name} ({test.statistic:.3g} > {test.threshold:.3g})" for test in self.report_.failed)
        return f"the data failed {failed}; {otherwise}"

    def _sigmas(self, epsilon: float) -> list[float]:
        if self.noise == "massart":
            return [epsilon * (1 - 2 * self.noise_rate) / (1 - self.noise_rate)]
        return [epsilon * 2**j for j in range(1 + math.floor(math.log2(1 / epsilon)))]

    def _checks(self, d: int, sigmas: list[float]) -> Checks:
        return Checks.of(
            d,
            sigmas,
            num_candidates=self.n_candidates,
            degree=self.degree,
            tolerance=self.tolerance,
            delta=self.delta,
        )

    def _least_epsilon(self, d: int, n: int) -> float:
        """The least epsilon, rounded up to two digits, for which n samples of the test half are enough."""

        def suffices(epsilon: float) -> bool:
            sigmas = self._sigmas(epsilon)
            return self._checks(d, sigmas).enough(min(sigmas)) <= n

        if not suffices(1.0):
            return math.inf
        low, high = 0.0, 1.0
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if suffices(middle) else (middle, high)
        digit = 10.0 ** (math.floor(math.log10(high)) - 1)
        return min(1.0, round(math.ceil(high / digit) * digit, 12))

    def _check_arguments(self) -> None:
        one_of("noise", self.noise, ("massart", "agnostic"))
        one_of("on_reject", self.on_reject, ("raise", "warn", "ignore"))
        in_range("epsilon", self.epsilon, 0, 1, "right")
        in_range("delta", self.delta, 0, 1, "neither")
        in_range("noise_rate", self.noise_rate, 0, 0.5, "left")
        in_range("tolerance", self.tolerance, 0, 0.5)
        positive("lr", self.lr)
        for name, least in {"degree": 2, "n_iter": 1, "batch_size": 1, "n_candidates": 1}.items():
            integer(name, getattr(self, name), least)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
