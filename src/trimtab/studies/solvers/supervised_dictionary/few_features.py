"""Classification through a handful of features: learned for the classes, or for the data alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import NMF, PCA, MiniBatchDictionaryLearning
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from trimtab.studies.engine.study import Curve, Metric, Result, Setting, Trial

Matrix = NDArray[np.float64]

RARITY = 10  # samples of the common class for each one of the rare class


@dataclass(frozen=True)
class Part:
    """Samples in rows, labels 0 and 1, and covariates (n, any number)."""

    x: Matrix
    y: NDArray[np.int64]
    aux: Matrix


@dataclass(frozen=True)
class Contest:
    """What a contestant is given.

    Attributes:
        train, valid, test: parts of the data; settings are chosen by `valid`.
        rank: how many features may be used.
        seed: of the contestant's own draws.
        quick: whether this is a run of seconds, in which iterations should be few.
    """

    train: Part
    valid: Part
    test: Part
    rank: int
    seed: int
    quick: bool

    @property
    def unit(self) -> float:
        """The weight of a squared reconstruction error at which an unexplained sample counts as a loss of one."""
        return float(len(self.train.x) / (self.train.x**2).sum())


class Classifier(Protocol):
    """What a contestant builds."""

    def fit(self, X: Any, y: Any, aux: Any = None) -> Any: ...

    def decision_function(self, X: Any, aux: Any = None) -> Matrix: ...


Build = Callable[..., Classifier]
"""Makes an unfitted classifier for a contest and a setting, given by name."""


class FeaturesThenRegression:
    """Learned features, brought to one scale, and a linear classifier on them and the covariates.

    Args:
        learner: of the features, which sees the labels where it asks for them; None takes the samples as they are.
        head: the classifier.
    """

    def __init__(self, learner: Any, head: Any) -> None:
        self.learner, self.head = learner, head

    def fit(self, X: Matrix, y: NDArray[np.int64], aux: Matrix | None = None) -> Self:
        self.learner_ = None if self.learner is None else clone(self.learner).fit(X, y)
        self.scaler_ = StandardScaler().fit(self.transform(X)) if self.learner_ is not None else None
        self.head_ = clone(self.head).fit(self._design(X, aux), y)
        return self

    def transform(self, X: Matrix) -> Matrix:
        return X if self.learner_ is None else np.asarray(self.learner_.transform(X), dtype=np.float64)

    def inverse_transform(self, codes: Matrix) -> Matrix:
        return codes if self.learner_ is None else np.asarray(self.learner_.inverse_transform(codes))

    def decision_function(self, X: Matrix, aux: Matrix | None = None) -> Matrix:
        return np.asarray(self.head_.decision_function(self._design(X, aux)))

    def _design(self, X: Matrix, aux: Matrix | None) -> Matrix:
        features = self.transform(X)
        if self.scaler_ is not None:
            features = self.scaler_.transform(features)
        return features if aux is None else np.concatenate([features, aux], axis=1)


STRENGTHS = [{"C": C} for C in (0.001, 0.0056, 0.032, 0.18, 1.0, 5.6, 32.0, 180.0, 1000.0)]
PENALISED = [{"C": C, "alpha": alpha} for C in (0.1, 1.0, 10.0) for alpha in (0.0, 0.01, 0.1)]
SHRINKAGES = [{"shrinkage": share} for share in (1e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)]


def _regression(C: float) -> LogisticRegression:
    return LogisticRegression(C=C, max_iter=1000)


def regression(contest: Contest, C: float) -> Classifier:
    """Logistic regression on all the columns."""
    return FeaturesThenRegression(None, _regression(C))


def discriminant(contest: Contest, shrinkage: float) -> Classifier:
    """Linear discriminant analysis on all the columns, with shrunk covariances."""
    return FeaturesThenRegression(None, LinearDiscriminantAnalysis("lsqr", shrinkage=shrinkage))


def least_squares(contest: Contest, C: float) -> Classifier:
    """Partial least squares: features that vary together with the labels."""
    return FeaturesThenRegression(PLSRegression(contest.rank), _regression(C))


def pca(contest: Contest, C: float) -> Classifier:
    """Principal components."""
    return FeaturesThenRegression(PCA(contest.rank, random_state=contest.seed), _regression(C))


def nmf(contest: Contest, C: float, alpha: float) -> Classifier:
    """Non-negative matrix factorisation, of features scaled to [0, 1] where they have signs."""
    # The penalty is multiplied by the number of features (or samples) in scikit-learn, and is here a share of X.
    alpha = alpha * float(np.abs(contest.train.x).mean())
    learner = NMF(contest.rank, alpha_W=alpha, random_state=contest.seed, max_iter=50 if contest.quick else 300)
    if contest.train.x.min() < 0:
        return FeaturesThenRegression(make_pipeline(MinMaxScaler(clip=True), learner), _regression(C))
    return FeaturesThenRegression(learner, _regression(C))


def dictionary(contest: Contest, C: float, alpha: float) -> Classifier:
    """Sparse coding."""
    # Without a penalty, its coordinate descent does not come to an end.
    learner = MiniBatchDictionaryLearning(
        contest.rank,
        alpha=max(alpha, 1e-3),
        transform_algorithm="lasso_cd",
        transform_alpha=max(alpha, 1e-3),
        random_state=contest.seed,
        max_iter=1 if contest.quick else 20,
        batch_size=64,
    )
    return FeaturesThenRegression(learner, _regression(C))


def compete(trial: Trial, contest: Contest, build: Build, grid: Sequence[Setting]) -> Result:
    """Fits every setting, chooses one by the validation part's AUC, and measures it on the test part."""
    train, valid, test = contest.train, contest.valid, contest.test
    aux = bool(train.aux.shape[1])
    best: tuple[float, Classifier, float] | None = None
    errors, aucs = [], []
    settings = grid[:: max(1, len(grid) // 2)] if contest.quick else grid

    def scores(model: Classifier, part: Part) -> Matrix:
        return model.decision_function(part.x, part.aux) if aux else model.decision_function(part.x)

    for done, setting in enumerate(settings):
        model = build(contest, **setting)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of not having converged, which shows in the result
            # A run has one thread: its processor time is what it would take alone, also where runs share the machine.
            started = time.process_time()
            model = model.fit(train.x, train.y, train.aux) if aux else model.fit(train.x, train.y)
            seconds = time.process_time() - started
        reached = float(roc_auc_score(valid.y, scores(model, valid)))
        errors.append(_reconstruction_error(model, test.x))
        aucs.append(float(roc_auc_score(test.y, scores(model, test))))
        if best is None or reached > best[0]:
            best, chosen = (reached, model, seconds), done
        trial.report((done + 1) / len(settings))
    if best is None:
        raise ValueError("grid must hold at least one setting")
    _, model, seconds = best
    precision, recall, thresholds = precision_recall_curve(valid.y, scores(model, valid))
    balance = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    threshold = thresholds[balance[:-1].argmax()]
    order = np.argsort(errors)
    return Result(
        {
            "auc": aucs[chosen],
            "f1": float(f1_score(test.y, scores(model, test) >= threshold)),
            "reconstruction": errors[chosen],
            "seconds": seconds,
        },
        {"AUC": Curve([errors[i] for i in order], [aucs[i] for i in order], x_label="share that is not reconstructed")},
    )


def _reconstruction_error(model: Any, x: Matrix) -> float:
    restored = np.asarray(model.inverse_transform(model.transform(x)))
    return float(((x - restored) ** 2).sum() / (x**2).sum())


def thin_out(part: Part, generator: torch.Generator) -> Part:
    """The part with so few of class 1, drawn at random, that there are `RARITY` others for each."""
    rare = np.flatnonzero(part.y == 1)
    wanted = max(2, int((part.y == 0).sum()) // RARITY)
    kept = rare[torch.randperm(len(rare), generator=generator)[:wanted].numpy()]
    rows = np.sort(np.concatenate([np.flatnonzero(part.y == 0), kept]))
    return Part(part.x[rows], part.y[rows], part.aux[rows])


METRICS: Mapping[str, Metric] = {
    "auc": Metric("area under the ROC curve (%)", percent=True),
    "f1": Metric("F1 of the rare class (%)", percent=True),
    "reconstruction": Metric("share of the squared norm that is not reconstructed (%)", best=None, percent=True),
    "seconds": Metric("time of a fit (s)", best="min"),
}


@dataclass(frozen=True)
class HiddenDirection:
    """50 dimensions, of which the one that decides the label is among those of least variance; a seed is a sample.

    Attributes:
        rank: number of features.
        covariate: weight, in the log-odds, of a covariate that is not among the 50.
    """

    rank: int = 2
    covariate: float = 0.0

    def contest(self, trial: Trial) -> Contest:
        """The data of a trial."""
        train, valid, test = self._parts(trial, trial.generator())
        return Contest(train, valid, test, self.rank, trial.seed, trial.budget == "smoke")

    def run(self, trial: Trial, build: Build, grid: Sequence[Setting]) -> Result:
        """One contestant."""
        return compete(trial, self.contest(trial), build, grid)

    def _parts(self, trial: Trial, generator: torch.Generator) -> list[Part]:
        sizes = trial.pick(smoke=(150, 80, 80), laptop=(600, 300, 1000), paper=(2000, 1000, 5000))
        dim, strong = 50, 5

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        axes = torch.linalg.qr(normal(dim, dim)).Q
        scales = torch.ones(dim, dtype=torch.float64)
        scales[:strong] = torch.linspace(10, 6, strong, dtype=torch.float64)
        parts = []
        for size in sizes:
            x, aux = normal(size, dim), normal(size, 1)
            logits = 6 * x[:, -1] + self.covariate * aux[:, 0]
            y = torch.rand(size, generator=generator, dtype=torch.float64) < logits.sigmoid()
            covariates = aux.numpy() if self.covariate else np.empty((size, 0))
            parts.append(Part((x * scales @ axes.T).numpy(), y.long().numpy(), covariates))
        return parts
