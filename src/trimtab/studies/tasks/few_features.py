"""Classification through a handful of features: learned for the classes, or for the data alone."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.decomposition import NMF, PCA, MiniBatchDictionaryLearning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_recall_curve, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from trimtab.data import load
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial

Matrix = NDArray[np.float64]
Dataset = Literal["low-variance", "breast_cancer", "mnist"]

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
Setting = Mapping[str, float]


class FeaturesThenRegression:
    """Features learned without labels, brought to one scale, and a logistic regression on them and the covariates."""

    def __init__(self, learner: Any, C: float) -> None:
        self.learner, self.C = learner, C

    def fit(self, X: Matrix, y: NDArray[np.int64], aux: Matrix | None = None) -> Self:
        self.learner_ = None if self.learner is None else clone(self.learner).fit(X)
        self.scaler_ = StandardScaler().fit(self.transform(X)) if self.learner_ is not None else None
        self.regression_ = LogisticRegression(C=self.C, max_iter=1000).fit(self._design(X, aux), y)
        return self

    def transform(self, X: Matrix) -> Matrix:
        return X if self.learner_ is None else np.asarray(self.learner_.transform(X), dtype=np.float64)

    def inverse_transform(self, codes: Matrix) -> Matrix:
        return codes if self.learner_ is None else np.asarray(self.learner_.inverse_transform(codes))

    def decision_function(self, X: Matrix, aux: Matrix | None = None) -> Matrix:
        return np.asarray(self.regression_.decision_function(self._design(X, aux)))

    def _design(self, X: Matrix, aux: Matrix | None) -> Matrix:
        features = self.transform(X)
        if self.scaler_ is not None:
            features = self.scaler_.transform(features)
        return features if aux is None else np.concatenate([features, aux], axis=1)


STRENGTHS = tuple(float(C) for C in np.logspace(-3, 3, 9))
PENALISED = [{"C": C, "alpha": alpha} for C in (0.1, 1.0, 10.0) for alpha in (0.0, 0.01, 0.1)]


def regression(contest: Contest, C: float = 1.0) -> Classifier:
    """Logistic regression on all that there is."""
    return FeaturesThenRegression(None, C)


def pca(contest: Contest, C: float = 1.0) -> Classifier:
    """Principal components."""
    return FeaturesThenRegression(PCA(contest.rank, random_state=contest.seed), C)


def nmf(contest: Contest, C: float = 1.0, alpha: float = 0.0) -> Classifier:
    """Non-negative matrix factorisation, of features scaled to [0, 1] where they have signs."""
    # The penalty is multiplied by the number of features (or samples) in scikit-learn, and is here a share of X.
    alpha = alpha * float(np.abs(contest.train.x).mean())
    learner = NMF(contest.rank, alpha_W=alpha, random_state=contest.seed, max_iter=50 if contest.quick else 300)
    if contest.train.x.min() < 0:
        return FeaturesThenRegression(make_pipeline(MinMaxScaler(clip=True), learner), C)
    return FeaturesThenRegression(learner, C)


def dictionary(contest: Contest, C: float = 1.0, alpha: float = 0.0) -> Classifier:
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
    return FeaturesThenRegression(learner, C)


def compete(contest: Contest, build: Build, grid: Sequence[Setting], trial: Trial) -> Result:
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
        {"AUC over reconstruction error": Curve([errors[i] for i in order], [aucs[i] for i in order])},
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
    "auc": Metric("area under the ROC curve"),
    "f1": Metric("F1 of the rare class"),
    "reconstruction": Metric("share of the squared norm that is not reconstructed", best=None),
    "seconds": Metric("time of a fit (s)", best="min"),
}


@dataclass(frozen=True)
class FewFeatures(Task):
    """Tell two classes apart by `rank` features learned from the data; a seed is a sample, or a split.

    Attributes:
        dataset: "low-variance" (50 dimensions, of which the one that decides the label is among those of least
            variance), "breast_cancer", or "mnist" (4 against ten times as many 9; small digits at the smoke budget).
        rank: number of features.
        covariate: weight, in the log-odds of "low-variance", of a covariate that is not among the 50.
    """

    dataset: Dataset = "low-variance"
    rank: int = 2
    covariate: float = 0.0

    name: ClassVar[str] = "few-features"
    metrics: ClassVar[Mapping[str, Metric]] = METRICS

    def __post_init__(self) -> None:
        if self.dataset not in get_args(Dataset):
            raise ValueError(f"dataset must be one of {', '.join(get_args(Dataset))}, got {self.dataset!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def solve(self, build: Build | None = None, grid: Sequence[Setting] | None = None) -> Arm:
        """A contestant: what builds a classifier for a contest and a setting, and the settings to choose from.

        Without one, a logistic regression on the samples as they are.
        """
        return self.arm(build=build, grid=grid)

    def run(self, trial: Trial, **options: Any) -> Result:
        build = options.get("build", regression)
        grid = options.get("grid", [{"C": C} for C in STRENGTHS])
        return compete(self.contest(trial), build, grid, trial)

    def contest(self, trial: Trial) -> Contest:
        """The data of a trial."""
        generator = trial.generator()
        parts = self._low_variance(trial, generator) if self.dataset == "low-variance" else self._load(trial, generator)
        train, valid, test = parts
        return Contest(train, valid, test, self.rank, trial.seed, trial.budget == "smoke")

    def _low_variance(self, trial: Trial, generator: torch.Generator) -> list[Part]:
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

    def _load(self, trial: Trial, generator: torch.Generator) -> list[Part]:
        images = self.dataset == "mnist"
        data = load("digits" if images and trial.budget == "smoke" else self.dataset)
        if images:
            data = data.classes([9, 4]).subset(*trial.pick(smoke=(None, None), laptop=(3000, 2000), paper=(None, None)))
        x = torch.cat([data.x_train, data.x_test]).flatten(1).double().numpy()
        y = torch.cat([data.y_train, data.y_test]).numpy()
        order = torch.randperm(len(y), generator=generator).numpy()
        ends = [len(y) // 2, len(y) * 3 // 4]
        parts = [Part(x[rows], y[rows], np.empty((len(rows), 0))) for rows in np.split(order, ends)]
        return [thin_out(part, generator) for part in parts] if images else parts
