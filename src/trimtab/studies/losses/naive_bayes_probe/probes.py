"""How many labelled samples a linear classifier on given features needs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import norm
from sklearn.preprocessing import MinMaxScaler
from torch import Tensor

from trimtab import nets
from trimtab.data import ClassificationData, load
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.trained_once import trained_once
from trimtab.studies.tools.training import Training, fitted


class Classifier(Protocol):
    """What scikit-learn calls a classifier."""

    def fit(self, X: np.ndarray, y: np.ndarray) -> Any: ...

    def score(self, X: np.ndarray, y: np.ndarray) -> float: ...


Probe = Callable[[float], Classifier]
"""Makes an unfitted classifier of one hyper-parameter's value."""

Labelled = tuple[np.ndarray, np.ndarray]
SHOTS = (1, 2, 5, 10, 20, 50, 100)

GROWTH: Mapping[str, Metric] = {
    "needed": Metric("samples needed at the largest dimension", best="min"),
    "growth": Metric("exponent of the samples needed in the dimension", best="min"),
    "seconds": Metric("time of a fit with most samples (s)", best="min"),
}
ACCURACY: Mapping[str, Metric] = {
    "few_shot": Metric("test accuracy with 1 to 5 samples a class (%)", percent=True),
    "many_shot": Metric("test accuracy with most samples (%)", percent=True),
    "settled_at": Metric("samples a class to come within 2 points of it", best="min"),
    "seconds": Metric("time of a fit with most samples (s)", best="min"),
}


def growth(trial: Trial, probe: Probe, classes: int) -> Result:
    """The number of samples at which the mean error over fresh training sets is within 0.01 of the Bayes error.

    The samples are Gaussians with common variances, n in one half of the n features and 1 in the other, around -1, 1
    and 2 in every feature.

    Args:
        trial: the trial.
        probe: called with its usual setting, 0.
        classes: 2 or 3.
    """
    # Logistic regression takes hundreds of times longer on three classes.
    laptop = (50, 100, 200, 400) if classes == 2 else (50, 75, 100, 150)
    dimensions = trial.pick(smoke=(80, 100), laptop=laptop, paper=(100, 200, 400, 1000))
    repeats = trial.pick(smoke=1, laptop=5, paper=5)
    tested = trial.pick(smoke=500, laptop=4000, paper=10_000)
    search = _Search(probe, (0.0,))
    found = []
    for i, n in enumerate(dimensions):
        held_out = [mixture(n, classes, tested, trial.generator(part)) for part in (1, 2)]
        aim = bayes_error(n, classes) + 0.01

        def enough(m: int, n: int = n, held_out: list[Labelled] = held_out, aim: float = aim) -> bool:
            draws = (mixture(n, classes, m, trial.generator(1000 * m + r)) for r in range(repeats))
            return bool(np.mean([1 - search(draw, *held_out) for draw in draws]) < aim)

        found.append(float(smallest(enough, 2 * classes, 16 * n)))
        trial.report((i + 1) / len(dimensions))
    sizes, needed = np.array(dimensions, dtype=float), np.array(found)
    return Result(
        {
            "needed": found[-1],
            "growth": float(np.polyfit(np.log(sizes), np.log(needed), 1)[0]),
            "seconds": search.seconds,
        },
        {"samples needed": Curve(list(sizes), found, x_label="dimension")},
    )


@dataclass(frozen=True)
class Features:
    """Features of images from a convolutional network, and samples of five classes that it has not seen.

    A classifier with several settings is fitted with each, and the one that does best on validation samples is tested.

    Attributes:
        data: "fashion_mnist" or "mnist"; digits at the smoke budget.
        kind: of a network "trained" on the data's first five classes, or of one layer of "random" 5 x 5 filters.
    """

    data: str
    kind: Literal["trained", "random"]

    def run(self, trial: Trial, probe: Probe, settings: Sequence[float]) -> Result:
        """One classifier, by the number of samples a class."""
        data = load("digits" if trial.budget == "smoke" else self.data)
        search = _Search(probe, settings)
        unseen = data.classes([5, 6, 7, 8, 9])
        extract = self._extractor(trial, data)
        shots = trial.pick(smoke=SHOTS[:4], laptop=SHOTS, paper=SHOTS)
        repeats = trial.pick(smoke=2, laptop=5, paper=20)
        # A quarter of the training images decides between settings; fits draw from the rest.
        order = torch.randperm(len(unseen.y_train), generator=trial.generator(1))
        order = order[: trial.pick(smoke=400, laptop=3000, paper=len(order))]
        chosen, pool = order[: len(order) // 4], order[len(order) // 4 :]
        tested = unseen.subset(test=trial.pick(smoke=200, laptop=2000, paper=None), generator=trial.generator(2))
        X, y = extract(unseen.x_train[pool]), unseen.y_train[pool].numpy()
        validation = extract(unseen.x_train[chosen]), unseen.y_train[chosen].numpy()
        test = extract(tested.x_test), tested.y_test.numpy()
        accuracies = []
        for i, shot in enumerate(shots):
            scores = []
            for repeat in range(repeats):
                shuffled = torch.randperm(len(y), generator=trial.generator(100 + repeat)).numpy()
                rows = np.concatenate([shuffled[y[shuffled] == k][:shot] for k in range(5)])
                scale = MinMaxScaler().fit(X[rows])
                parts = [(scale.transform(x), labels) for x, labels in ((X[rows], y[rows]), validation, test)]
                scores.append(search(*parts))
            accuracies.append(float(np.mean(scores)))
            trial.report((i + 1) / len(shots))
        settled = next(shot for shot, found in zip(shots, accuracies, strict=True) if found >= accuracies[-1] - 0.02)
        return Result(
            {
                "few_shot": float(np.mean(accuracies[:3])),
                "many_shot": accuracies[-1],
                "settled_at": float(settled),
                "seconds": search.seconds,
            },
            {"test accuracy": Curve([float(shot) for shot in shots], accuracies, x_label="samples a class")},
        )

    def _extractor(self, trial: Trial, data: ClassificationData) -> Callable[[Tensor], np.ndarray]:
        if self.kind == "random":
            filters = torch.randn(64, data.in_shape[0], 5, 5, generator=trial.generator(3))

            def random_features(x: Tensor) -> np.ndarray:
                parts = [F.adaptive_avg_pool2d(F.conv2d(part, filters, padding=2).relu(), 3) for part in x.split(500)]
                return torch.cat(parts).flatten(1).double().numpy()

            return random_features
        # It has seen the first five classes.
        count, epochs = trial.pick(smoke=(400, 3), laptop=(10_000, 3), paper=(None, 20))
        seen = data.classes([0, 1, 2, 3, 4]).subset(train=count, generator=trial.generator(4))
        model, samples = trial.seeded(lambda: nets.small_cnn(data.in_shape, 5)), (seen.x_train, seen.y_train)
        train = lambda: fitted(trial, Training(), model, samples, num_classes=5, epochs=epochs, lr=0.05)
        trained_once(trial, model, train, key=f"unseen classes {self.data} {trial.seed}").eval()

        @torch.no_grad()
        def trained_features(x: Tensor) -> np.ndarray:
            found: Tensor = torch.cat([model.features(part) for part in x.split(500)])
            return found.double().numpy()

        return trained_features


@dataclass
class _Search:
    """Fits a classifier with each setting; `seconds` is the processor time of the last fit.

    A run has one thread, so that this is what a fit takes alone, also where runs share the machine.
    """

    probe: Probe
    settings: Sequence[float]
    seconds: float = math.nan

    def __call__(self, train: Labelled, validation: Labelled, test: Labelled) -> float:
        """Test accuracy of the classifier that does best on validation samples."""
        fitted = []
        for setting in self.settings:
            started = time.process_time()
            classifier = self.probe(setting)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of not having converged, which shows in the result
                classifier.fit(*train)
            self.seconds = time.process_time() - started
            # A single candidate needs no judge.
            fitted.append((classifier.score(*validation) if len(self.settings) > 1 else 0.0, classifier))
        return max(fitted, key=lambda one: one[0])[1].score(*test)


def mixture(n: int, classes: int, size: int, generator: torch.Generator) -> Labelled:
    """Samples (size, n) of the Gaussian mixture and their classes, each of which is there."""
    while True:
        y = torch.randint(classes, (size,), generator=generator)
        if len(y.unique()) == classes:
            break
    deviations = torch.ones(n, dtype=torch.float64)
    deviations[: n // 2] = math.sqrt(n)
    noise = torch.randn(size, n, generator=generator, dtype=torch.float64)
    return (_levels(classes)[y][:, None] + deviations * noise).numpy(), y.numpy()


def _levels(classes: int) -> Tensor:
    return torch.tensor([-1.0] + [2.0**k for k in range(classes - 1)], dtype=torch.float64)


def bayes_error(n: int, classes: int) -> float:
    """Least possible error on the mixture, whose classes stand on a line once features have variance 1."""
    unit = math.sqrt((n // 2) / n + (n - n // 2))
    gaps = np.diff(_levels(classes).numpy()) * unit
    return float(2 * norm.cdf(-gaps / 2).sum() / classes)


def smallest(enough: Callable[[int], bool], low: int, high: int) -> int:
    """The least number from `low` on that is enough, by doubling, then halving to 5 %; `high` if none below it is.

    Example:
        >>> smallest(lambda m: m >= 19, 4, 1000), smallest(lambda m: m >= 200, 4, 1000)
        (19, 200)
    """
    too_few, step = low - 1, low
    while step < high and not enough(step):
        too_few, step = step, 2 * step
    step = min(step, high)
    while step - too_few > max(1, step // 20):
        middle = (too_few + step) // 2
        too_few, step = (too_few, middle) if enough(middle) else (middle, step)
    return step
