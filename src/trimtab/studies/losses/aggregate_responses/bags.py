"""Regression, and a binary classification, from the mean responses of bags filled at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from trimtab import losses, nets
from trimtab.data import load
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descent_step

# Denser near 0, where the risk falls fastest.
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
EPSILONS = (0.5, 1.0, 2.0)
BAG_SIZES = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Setting:
    """What is known of a linear problem before its responses are seen.

    Attributes:
        num_samples, num_features, bag_size: its sizes.
        noise: variance of a response given its features, of the true weights' squared norm; nan where unknown.
        rho: weight of the instance-level loss where all of them are gone through.
    """

    num_samples: int
    num_features: int
    bag_size: int
    noise: float = math.nan
    rho: float = math.nan


class Regressor(Protocol):
    """Learns linear weights from bag means."""

    coef_: np.ndarray
    intercept_: float

    def fit(self, X: np.ndarray, y: np.ndarray, bag_index: np.ndarray) -> Any: ...


Estimator = Callable[[Setting], Regressor]
Criterion = Callable[[float], nn.Module]
"""Makes a loss `(logits, bag_target, bag_index)` of the weight of its instance-level part."""


class RidgeOnBagMeans:
    """scikit-learn's ridge regression on bag means, its penalty chosen by leaving out one bag at a time."""

    def __init__(self, fit_intercept: bool = False) -> None:
        self.ridge = RidgeCV(alphas=np.logspace(-3, 4, 22), fit_intercept=fit_intercept)

    def fit(self, X: np.ndarray, y: np.ndarray, bag_index: np.ndarray) -> None:
        sizes = np.bincount(bag_index)
        means = np.stack([np.bincount(bag_index, column) for column in X.T], axis=1) / sizes[:, None]
        # Bags of one size: the square root of it brings the noise back to that of a sample.
        scale = math.sqrt(sizes.mean())
        self.ridge.fit(scale * means, scale * y)
        self.coef_, self.intercept_ = self.ridge.coef_, self.ridge.intercept_ / scale


def best_weight(setting: Setting) -> float:
    """The weight with the least risk by the formula, among the eleven; it knows the noise."""
    return min(WEIGHTS, key=lambda rho: risk_by_formula(setting, rho))


def risk_by_formula(setting: Setting, rho: float) -> float:
    """`aggregate_risk` for weights of norm 1; infinite where the estimate is not determined."""
    if rho == 0 and setting.num_samples <= setting.num_features * setting.bag_size:
        return math.inf
    return losses.aggregate_risk(
        rho,
        num_samples=setting.num_samples,
        num_features=setting.num_features,
        bag_size=setting.bag_size,
        noise=setting.noise,
    )


GAUSSIAN: Mapping[str, Metric] = {
    "risk": Metric("risk, geometric mean", best="min"),
    "regret": Metric("largest excess over the better end (%)", best="min", percent=True),
    "low_snr": Metric("risk at signal-to-noise 1/4", best="min"),
    "high_snr": Metric("risk at signal-to-noise 4, more bags than features", best="min"),
}
WEIGHTED: Mapping[str, Metric] = {
    "interior": Metric("settings whose best weight is inside (0, 1) (%)", best=None, percent=True),
    "formula_error": Metric("mean deviation of the risk from the formula (%)", best="min", percent=True),
}
PRIVATE: Mapping[str, Metric] = {
    **{f"private_risk_{eps:g}": Metric(f"risk at epsilon {eps:g}, best bag size", best="min") for eps in EPSILONS},
    **{f"bagging_{eps:g}": Metric(f"risk of bags of 50 over bags of 1 at epsilon {eps:g}") for eps in EPSILONS},
    **{f"best_size_{eps:g}": Metric(f"best bag size at epsilon {eps:g}", best=None) for eps in EPSILONS},
}
DIABETES: Mapping[str, Metric] = {
    "unexplained": Metric("unexplained variance of single responses (%)", best="min", percent=True)
}
IMAGES: Mapping[str, Metric] = {
    "test_accuracy": Metric("test accuracy (%)", percent=True),
    "test_loss": Metric("test cross-entropy (nats)", best="min"),
    "weight": Metric("weight of the instance-level loss", best=None),
}


@dataclass(frozen=True)
class Linear:
    """Samples (n, d) of a linear problem, their responses (n,) and the true weights (d,), of norm 1."""

    X: np.ndarray
    y: np.ndarray
    theta: np.ndarray

    @classmethod
    def draw(cls, setting: Setting, generator: torch.Generator) -> Linear:
        n, d = setting.num_samples, setting.num_features
        X = torch.randn(n, d, generator=generator, dtype=torch.float64)
        theta = F.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
        y = X @ theta + setting.noise**0.5 * torch.randn(n, generator=generator, dtype=torch.float64)
        return cls(X.numpy(), y.numpy(), theta.numpy())

    def risk(self, estimator: Regressor, bag_size: int, bag_y: np.ndarray | None = None) -> float:
        """Squared error of the weights learned from the means of bags of consecutive samples, or from `bag_y`."""
        if bag_y is None:
            bag_y = self.y.reshape(-1, bag_size).mean(1)
        estimator.fit(self.X, bag_y, np.arange(len(self.y)) // bag_size)
        return float(np.square(estimator.coef_ - self.theta).sum())


def _cells(trial: Trial) -> list[tuple[float, Setting]]:
    """Signal-to-noise ratios and settings of the grid."""
    n, d = trial.pick(smoke=(100, 10), laptop=(1000, 100), paper=(1000, 100))
    return [(snr, Setting(n, d, k, noise=1 / snr)) for k in (2, 5, 10) for snr in (0.25, 1.0, 4.0)]


def gaussian(trial: Trial, estimator: Estimator) -> Result:
    """1,000 standard normal samples of 100 features, bags of 2, 5 and 10, signal-to-noise ratios of 1/4, 1 and 4.

    The risk is the squared error of the weights, whose norm is 1.
    """
    repeats = trial.pick(smoke=3, laptop=6, paper=50)
    risks: dict[tuple[int, float], float] = {}
    regrets, cells = [], _cells(trial)
    for i, (snr, setting) in enumerate(cells):
        drawn = [Linear.draw(setting, trial.generator(r)) for r in range(repeats)]
        found, *others = (
            float(np.mean([one.risk(make(setting), setting.bag_size) for one in drawn]))
            for make in (estimator, _fixed(0.0), _fixed(1.0))
        )
        risks[setting.bag_size, snr] = found
        regrets.append(found / min(others) - 1)
        trial.report((i + 1) / len(cells))
    return Result(
        {
            "risk": _geometric_mean(risks.values()),
            "regret": max(regrets),
            "low_snr": _geometric_mean(risk for (_, snr), risk in risks.items() if snr == 0.25),
            "high_snr": _geometric_mean(risk for (k, snr), risk in risks.items() if snr == 4 and k < 10),
        }
    )


def weights(trial: Trial, estimator: Estimator) -> Result:
    """The same at eleven weights of the instance-level loss."""
    repeats = trial.pick(smoke=3, laptop=6, paper=50)
    curves, interior, deviations, cells = {}, [], [], _cells(trial)
    for i, (snr, setting) in enumerate(cells):
        drawn = [Linear.draw(setting, trial.generator(r)) for r in range(repeats)]
        found = [
            float(np.mean([one.risk(estimator(_with(setting, rho)), setting.bag_size) for one in drawn]))
            for rho in WEIGHTS
        ]
        formula = [risk_by_formula(setting, rho) for rho in WEIGHTS]
        interior.append(0 < int(np.argmin(found)) < len(WEIGHTS) - 1)
        deviations += [abs(a / b - 1) for a, b in zip(found, formula, strict=True) if math.isfinite(b)]
        # The bag end of bags of 10 would not fit into the figure.
        curves[f"bags of {setting.bag_size}, ratio {snr:g}"] = Curve(WEIGHTS[1:], found[1:])
        curves[f"bags of {setting.bag_size}, ratio {snr:g}, formula"] = Curve(WEIGHTS[1:], formula[1:])
        trial.report((i + 1) / len(cells))
    return Result({"interior": float(np.mean(interior)), "formula_error": float(np.mean(deviations))}, curves)


def _fixed(rho: float) -> Estimator:
    return lambda setting: losses.AggregateRidge(rho, fit_intercept=False)


def _with(setting: Setting, rho: float) -> Setting:
    return Setting(setting.num_samples, setting.num_features, setting.bag_size, setting.noise, rho)


def private(trial: Trial, estimator: Estimator) -> Result:
    """4,000 samples of 10 features, clipped bag means with Laplace noise, by bag size."""
    n, d = trial.pick(smoke=(1000, 5), laptop=(4000, 10), paper=(4000, 10))
    repeats = trial.pick(smoke=5, laptop=30, paper=200)
    # Responses have variance 2, and hardly any of n normal ones is beyond sqrt(2 log n) deviations.
    bound = math.sqrt(2 * 2 * math.log(n))
    metrics: dict[str, float] = {}
    curves = {}
    plain = Setting(n, d, 1, noise=1.0)
    drawn = [Linear.draw(plain, trial.generator(r)) for r in range(repeats)]
    for i, epsilon in enumerate(EPSILONS):
        found = []
        for k in BAG_SIZES:
            setting = Setting(n, d, k, noise=1.0 + 8 * bound**2 / (k * epsilon**2))
            draws, risks = trial.generator(1000 + 10 * k + i), []
            for one in drawn:
                bags = torch.arange(n) // k
                bag_y = losses.private_bag_means(
                    torch.from_numpy(one.y), bags, bound=bound, epsilon=epsilon, generator=draws
                )
                risks.append(one.risk(estimator(setting), k, bag_y.numpy()))
            found.append(float(np.mean(risks)))
        metrics[f"private_risk_{epsilon:g}"] = min(found)
        metrics[f"bagging_{epsilon:g}"] = found[-1] / found[0]
        metrics[f"best_size_{epsilon:g}"] = float(BAG_SIZES[int(np.argmin(found))])
        curves[f"risk at epsilon {epsilon:g} by bag size"] = Curve([float(k) for k in BAG_SIZES], found)
        trial.report((i + 1) / len(EPSILONS))
    return Result(metrics, curves)


def diabetes(trial: Trial, estimator: Estimator) -> Result:
    """Bags of 5 patients; tested on single ones."""
    X, y = load_diabetes(return_X_y=True)
    k, found = 5, []
    for repeat in range(trial.pick(smoke=3, laptop=20, paper=100)):
        order = torch.randperm(len(y), generator=trial.generator(repeat)).numpy()
        train, test = order[:350], order[350:]
        mean, scale = X[train].mean(0), X[train].std(0)
        model = estimator(Setting(len(train), X.shape[1], k))
        model.fit((X[train] - mean) / scale, y[train].reshape(-1, k).mean(1), np.arange(len(train)) // k)
        wrong = (X[test] - mean) / scale @ model.coef_ + model.intercept_ - y[test]
        found.append(np.square(wrong).mean() / y[test].var())
    return Result({"unexplained": float(np.mean(found))})


def images(trial: Trial, loss: Criterion, weights: Sequence[float]) -> Result:
    """An MLP on two alike classes of Fashion-MNIST, bags of 5. Of several weights, the one that fits validation bags
    best is tested.
    """
    k, bags_per_step = 5, 20
    data = load("digits").classes([3, 8]) if trial.budget == "smoke" else load("fashion_mnist").classes([2, 4])
    train, validation = trial.pick(smoke=(160, 75), laptop=(2000, 500), paper=(9000, 3000))
    order = torch.randperm(len(data.y_train), generator=trial.generator())[: train + validation]
    x, x_held = data.x_train[order].split([train, validation])
    y, y_held = data.y_train[order].float().split([train, validation])
    epochs = trial.pick(smoke=3, laptop=15, paper=30)
    judged = []
    for i, weight in enumerate(weights):
        model = trial.seeded(lambda: nets.mlp(x[0].numel(), num_classes=1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        criterion, draws = loss(weight), trial.generator(1)
        for _ in range(epochs):
            for chosen in torch.randperm(train // k, generator=draws).split(bags_per_step):
                rows = (chosen[:, None] * k + torch.arange(k)).flatten()
                targets, index = _bagged(y[rows], k)
                descent_step(optimizer, criterion(model(x[rows])[:, 0], targets, index))
            schedule.step()
        with torch.no_grad():
            fit = losses.bag_level_loss(model(x_held)[:, 0], *_bagged(y_held, k), loss="bce").item()
            logits = model(data.x_test)[:, 0]
        judged.append((fit, weight, logits))
        trial.report((i + 1) / len(weights))
    _, weight, logits = min(judged, key=lambda one: one[0])
    return Result(
        {
            "test_accuracy": ((logits > 0) == (data.y_test == 1)).float().mean().item(),
            "test_loss": F.binary_cross_entropy_with_logits(logits, data.y_test.float()).item(),
            "weight": weight,
        }
    )


def _bagged(y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Shares of positives of bags of k consecutive samples, and the samples' bags."""
    return y.view(-1, k).mean(1), torch.arange(len(y)) // k


def _geometric_mean(values: Any) -> float:
    return float(np.exp(np.mean(np.log(list(values)))))
