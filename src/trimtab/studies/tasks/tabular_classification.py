"""Classification of tables and flattened images, by whatever learns from rows of numbers."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.cross_decomposition import PLSRegression
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import GaussianNB
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import adult, load
from trimtab.losses.label_noise import symmetric_noise
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Setting, Task, Trial
from trimtab.studies.tools.training import LossFactory, OptimizerFactory, Supervised, Training, Workbench, fit, predict

Matrix = NDArray[np.float64]
Labels = NDArray[np.int64]


class Classifier(Protocol):
    """What scikit-learn calls a classifier. It has `decision_function` or `predict_proba` too."""

    def fit(self, X: Matrix, y: Labels) -> Any: ...

    def predict(self, X: Matrix) -> Any: ...


@dataclass(frozen=True)
class Sample:
    """What a contestant learns from.

    Attributes:
        x: (n, features) numbers; columns of tables have mean 0 and deviation 1, pixels are in [0, 1].
        y: (n,) classes from 0 on.
        num_classes: number of classes.
        setting: the values that the search chose, or tries.
        seed: of the contestant's own draws.
        quick: whether this is a run of seconds, in which iterations should be few.
    """

    x: Float[Matrix, "n features"]
    y: Int[Labels, " n"]
    num_classes: int
    setting: Setting
    seed: int
    quick: bool


@dataclass(frozen=True, kw_only=True)
class Learner(Entrant):
    """What a contestant brings: an estimator of its own, or a part of the task's network.

    Attributes:
        estimator: makes an unfitted classifier.
        loss: makes the loss of the task's MLP, called with logits and labels. For two classes there is one logit a
            sample, of shape (batch, 1).
        optimizer: makes the optimizer of the task's MLP.
    """

    estimator: Callable[[Sample], Classifier] | None = None
    loss: LossFactory | None = None
    optimizer: OptimizerFactory | None = None

    def __post_init__(self) -> None:
        if self.estimator is not None and (self.loss or self.optimizer):
            raise ValueError("estimator must stand without loss and optimizer: it trains in a way of its own")


@dataclass(frozen=True)
class Table:
    """Samples to learn from, held-out samples for choices, labelled as badly, and right ones for testing."""

    x: Matrix
    y: Labels
    x_held: Matrix
    y_held: Labels
    x_test: Matrix
    y_test: Labels
    num_classes: int


@dataclass(frozen=True)
class TabularClassification(Task[Learner]):
    """Classify rows of numbers, and choose among six settings by the accuracy on a quarter of them that is held out.

    The task's own network is an MLP of two layers of 256, trained by SGD with momentum for 40 epochs, and at least
    300 steps: on after it has fitted its labels.

    Attributes:
        dataset: "breast_cancer", "adult" (categories as indicators), "digits", "mnist", "fashion_mnist" (pixels as
            columns), or a file `.npz` with `x_train`, `y_train`, `x_test` and `y_test`; at the smoke budget tumours
            in place of incomes, and digits in place of images.
        pair: of images, the two classes.
        noise: share of training labels drawn anew, 0 for clean labels.
        size: most samples at the laptop budget, the held-out quarter among them.
    """

    dataset: str = "fashion_mnist"
    pair: tuple[int, int] = (2, 4)
    noise: float = 0.0
    size: int = 1_500

    name: ClassVar[str] = "tabular-classification"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "auc": Metric("area under the ROC curve (%)", percent=True),
        "train_accuracy": Metric("accuracy on the training labels (%)", best=None, percent=True),
        "seconds": Metric("time of a fit (s)", best="min"),
    }
    accepts: ClassVar[type[Learner]] = Learner
    tries: ClassVar[int] = 6
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 10, "paper": 10}
    cost: ClassVar[float] = 1.5

    def __post_init__(self) -> None:
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must be in [0, 1), got {self.noise}")
        if self.size < 8:
            raise ValueError(f"size must be at least 8, got {self.size}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "clothes": clothes,
            "few clothes": few_clothes,
            "wrong labels": wrong_labels,
            "tumours": tumours,
            "incomes": incomes,
        }

    @classmethod
    def references(cls) -> Mapping[str, Learner]:
        return {
            "logistic regression": Learner(
                estimator=lambda sample: LogisticRegression(C=sample.setting["C"], max_iter=2000),
                search={"C": (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)},
            ),
            "naive Bayes of each class's variances": Learner(
                estimator=lambda sample: GaussianNB(var_smoothing=sample.setting["var_smoothing"]),
                search={"var_smoothing": (1e-9, 1e-6, 1e-4, 1e-2, 0.1, 1.0)},
            ),
            "LDA": Learner(
                estimator=lambda sample: LinearDiscriminantAnalysis("lsqr", shrinkage=sample.setting["shrinkage"]),
                search={"shrinkage": (1e-3, 0.01, 0.1, 0.3, 0.6, 0.9)},
            ),
            "PLS": Learner(
                estimator=lambda sample: PartialLeastSquares(sample.setting["components"]),
                search={"components": (1, 2, 3, 5, 8, 13)},
            ),
            "random forest": Learner(estimator=_forest, search={"max_features": (0.05, 0.2), "leaf": (1, 3, 10)}),
            "gradient boosting": Learner(estimator=_boosting, search={"lr": (0.03, 0.1, 0.3), "leaves": (4, 16)}),
            "MLP": Learner(),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        if budget == "smoke" and not self.dataset.endswith(".npz"):
            return ("breast_cancer",) if self.dataset in ("breast_cancer", "adult") else ("digits",)
        return (self.dataset,)

    def run(self, trial: Trial, entrant: Learner) -> Result:
        table = self.table(trial)
        sample = Sample(table.x, table.y, table.num_classes, trial.setting, trial.seed, trial.budget == "smoke")
        model = entrant.estimator(sample) if entrant.estimator else Network(entrant, table, trial)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of not having converged, which shows in the result
            # A run has one thread: its processor time is what it would take alone, also where runs share the machine.
            started = time.process_time()
            model.fit(table.x, table.y)
            seconds = time.process_time() - started
        if trial.searching:
            return Result(score=_accuracy(model, table.x_held, table.y_held))
        return Result(
            {
                "test_accuracy": _accuracy(model, table.x_test, table.y_test),
                "auc": _auc(model, table.x_test, table.y_test),
                "train_accuracy": _accuracy(model, table.x, table.y),
                "seconds": seconds,
            }
        )

    def table(self, trial: Trial) -> Table:
        """The rows of a trial, as they are drawn for its seed."""
        x, y, x_test, y_test, num_classes = self._rows(trial)
        size, tested = trial.pick(smoke=(200, 200), laptop=(self.size, 4_000), paper=(20 * self.size, len(y_test)))
        order, fresh = (torch.randperm(len(part), generator=trial.generator(i)) for i, part in enumerate((y, y_test)))
        order, fresh = order[:size], fresh[:tested]
        targets = y[order]
        if self.noise:
            targets = symmetric_noise(targets, self.noise, num_classes, generator=trial.generator(2)).targets
        held = len(order) // 4
        rows, labels = x[order].double().numpy(), targets.numpy()
        return Table(
            rows[held:],
            labels[held:],
            rows[:held],
            labels[:held],
            x_test[fresh].double().numpy(),
            y_test[fresh].numpy(),
            num_classes,
        )

    def _rows(self, trial: Trial) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        name = self.datasets(trial.budget)[0]
        if name == "adult":
            return _incomes()
        data = load(name)
        if data.x_train.ndim > 2 and not name.endswith(".npz"):
            pair = (3, 8) if trial.budget == "smoke" else self.pair
            data = data.classes(list(pair))
        x, y, x_test, y_test = data.x_train.flatten(1), data.y_train, data.x_test.flatten(1), data.y_test
        if data.source == "scikit-learn":  # which has no test part of its own: a seed draws one
            order = torch.randperm(len(y) + len(y_test), generator=trial.generator(3))
            x, y = torch.cat([x, x_test])[order], torch.cat([y, y_test])[order]
            x, x_test = x.tensor_split([2 * len(y) // 3])
            y, y_test = y.tensor_split([2 * len(y) // 3])
        return x, y, x_test, y_test, data.num_classes


class Network:
    """The task's MLP as an estimator, with the loss or the optimizer of an entrant."""

    def __init__(self, entrant: Learner, table: Table, trial: Trial) -> None:
        x, y = torch.from_numpy(table.x).float().to(trial.device), torch.from_numpy(table.y).to(trial.device)
        batch = min(64, len(y))
        steps = len(y) // batch
        outputs = 1 if table.num_classes == 2 else table.num_classes
        self.bench = Workbench(
            Training(loss=entrant.loss or (lambda plan: CrossEntropy()), optimizer=entrant.optimizer),
            lambda: nets.mlp(x.shape[1], hidden=(256, 256), num_classes=outputs),
            (x, y),
            (x[:0], y[:0]),  # a network makes no choices here
            num_classes=table.num_classes,
            epochs=trial.pick(smoke=5, laptop=max(40, 300 // steps), paper=max(300, 5_000 // steps)),
            trial=trial,
            batch_size=batch,
        )

    def fit(self, X: Matrix, y: Labels) -> Self:
        self.rule = Supervised(self.bench)
        fit(self.bench, self.rule)
        return self

    def decision_function(self, X: Matrix) -> Matrix:
        found = predict(self.rule, torch.from_numpy(X).float().to(self.bench.device)).double().cpu().numpy()
        return found[:, 0] if found.shape[1] == 1 else found

    def predict(self, X: Matrix) -> Labels:
        scores = self.decision_function(X)
        return np.asarray(scores.argmax(1) if scores.ndim == 2 else scores > 0, dtype=np.int64)


class CrossEntropy(nn.Module):
    """Cross-entropy of one logit a sample for two classes, and of one a class for more."""

    def forward(self, logits: Float[Tensor, "batch outputs"], targets: Int[Tensor, " batch"]) -> Tensor:
        if logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], targets.to(logits))
        return F.cross_entropy(logits, targets)


class PartialLeastSquares:
    """Partial least squares on indicators of the classes, and a logistic regression on its components.

    Args:
        components: most components; there are no more than samples or features.
        C: of the logistic regression.
    """

    def __init__(self, components: int, C: float = 1.0) -> None:
        self.components, self.C = components, C

    def fit(self, X: Matrix, y: Labels) -> Self:
        indicators = (y[:, None] == np.unique(y)).astype(np.float64)
        self.pls_ = PLSRegression(min(self.components, *X.shape)).fit(X, indicators)
        self.regression_ = LogisticRegression(C=self.C, max_iter=1000).fit(self.pls_.transform(X), y)
        return self

    def decision_function(self, X: Matrix) -> Matrix:
        return np.asarray(self.regression_.decision_function(self.pls_.transform(X)))

    def predict(self, X: Matrix) -> Labels:
        return np.asarray(self.regression_.predict(self.pls_.transform(X)))


def _forest(sample: Sample) -> Any:
    return RandomForestClassifier(
        20 if sample.quick else 100,
        max_features=sample.setting["max_features"],
        min_samples_leaf=sample.setting["leaf"],
        random_state=sample.seed,
    )


def _boosting(sample: Sample) -> Any:
    return HistGradientBoostingClassifier(
        learning_rate=sample.setting["lr"],
        max_leaf_nodes=sample.setting["leaves"],
        max_iter=10 if sample.quick else 100,
        early_stopping=False,
        random_state=sample.seed,
    )


def _accuracy(model: Classifier, x: Matrix, y: Labels) -> float:
    return float(np.mean(np.asarray(model.predict(x)) == y))


def _auc(model: Any, x: Matrix, y: Labels) -> float:
    """Mean over the classes of each against the others; of two classes they are the same. NaN where a fit diverged."""
    if hasattr(model, "decision_function"):
        scores = np.asarray(model.decision_function(x))
    else:
        scores = np.asarray(model.predict_proba(x))
    if not np.isfinite(scores).all():
        return math.nan
    if scores.ndim == 1:
        return float(roc_auc_score(y, scores))
    return float(np.mean([roc_auc_score(y == label, scores[:, label]) for label in np.unique(y)]))


def _incomes() -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Adult: an indicator for every category, numbers of mean 0 and deviation 1; whether an income is above 50,000."""
    table = adult()
    label = table.columns.index("income")
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for j, size in enumerate(table.domain):
        if j == label:
            continue
        train, test = table.train[:, j], table.test[:, j]
        for into, part in zip(columns, (train, test), strict=True):
            if isinstance(size, int):
                into.append(F.one_hot(part.long(), size).float())
            else:
                into.append(((part - train.mean()) / train.std()).float()[:, None])
    x, x_test = (torch.cat(part, 1) for part in columns)
    return x, table.train[:, label].long(), x_test, table.test[:, label].long(), 2


clothes = TabularClassification()
few_clothes = replace(clothes, size=80)
wrong_labels = TabularClassification(pair=(0, 6), noise=0.2)
tumours = TabularClassification("breast_cancer")
incomes = TabularClassification("adult")
