"""Image retrieval among classes that training has not seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.metric.binomial_deviance import BinomialDevianceLoss
from trimtab.metric.clustering import nmi
from trimtab.metric.retrieval import map_at_r, recall_at_k
from trimtab.metric.samplers import PKSampler
from trimtab.metric.tcm import opis, utility_curves
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import predict

Base = Literal["arcface", "triplet", "npair", "binomial"]

# Builds a metric loss `loss(embeddings, labels)` from the number of training classes and the embedding's width.
MetricLossFactory = Callable[[int, int], nn.Module]

# Builds a loss from a metric loss and the weight of what is added to it.
WeightedLoss = Callable[[nn.Module, float], nn.Module]


def base_loss(name: Base) -> MetricLossFactory:
    """A base loss with the settings of pytorch-metric-learning, which has no binomial deviance: that one is ours."""
    try:
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise ImportError("the base losses come from pytorch-metric-learning: pip install 'trimtab[metric]'") from error
    makers: dict[Base, MetricLossFactory] = {
        "arcface": lambda classes, dim: cast(nn.Module, losses.ArcFaceLoss(classes, dim)),
        "triplet": lambda classes, dim: cast(nn.Module, losses.TripletMarginLoss()),
        "npair": lambda classes, dim: cast(nn.Module, losses.NPairsLoss()),
        "binomial": lambda classes, dim: BinomialDevianceLoss(),
    }
    if name not in makers:
        raise ValueError(f"base: {name!r}; it must be one of {', '.join(makers)}")
    return makers[name]


@dataclass(frozen=True)
class OpenSetRetrieval(Task):
    """Train an embedding on six classes and retrieve among the other four.

    Batches hold six classes of ten images; the network is a small CNN with an embedding of 64 numbers.

    Attributes:
        dataset: "fashion_mnist", "mnist" or "digits"; at the smoke budget always digits.
        base: the loss of pytorch-metric-learning that is trained where a contestant brings none.
        epochs: length of the training at the laptop budget.
    """

    dataset: str = "fashion_mnist"
    base: Base = "arcface"
    epochs: int = 6

    name: ClassVar[str] = "open-set-retrieval"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "recall_at_1": Metric("recall@1 (%)", percent=True),
        "map_at_r": Metric("MAP@R (%)", percent=True),
        "nmi": Metric("NMI (%)", percent=True),
        "seen_recall_at_1": Metric("recall@1, seen classes (%)", percent=True),
        "seen_nmi": Metric("NMI, seen classes (%)", percent=True),
        "opis": Metric("threshold inconsistency (OPIS)", best="min"),
        "opis_worst": Metric("OPIS of the worst 10 % of classes", best="min"),
        "frr_spread": Metric("spread of false rejects over classes (%)", best="min", percent=True),
        "far_spread": Metric("spread of false accepts over classes (%)", best="min", percent=True),
        "weight": Metric("weight, chosen on held-out classes", best=None),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(self, loss: MetricLossFactory | None = None, regularizer: Callable[[], nn.Module] | None = None) -> Arm:
        """A contestant that brings its own loss, or a term that is added to it, both called (embeddings, labels).

        Args:
            loss: makes the loss from the number of classes and the embedding's width; the task's base by default.
            regularizer: makes a further term.
        """
        return self.arm(loss=loss, regularizer=regularizer)

    def train_weighted(self, weighted: WeightedLoss, weights: Sequence[float], layer_only: bool = False) -> Arm:
        """A contestant that wraps the task's base loss and has a weight.

        Where there are several weights, the one with the highest recall@1 on three of the six classes, after half the
        training on the other three, is chosen, the smaller one of equals. Which three is drawn anew with each seed.

        Args:
            weighted: makes the loss from the base loss and a weight.
            weights: what to choose from.
            layer_only: call the loss with a third argument `confused`, the embeddings that the last layer makes of
                detached features, so that a term on them trains that layer alone.
        """
        return self.arm(weighted=weighted, weights=tuple(weights), layer_only=layer_only)

    def run(
        self,
        trial: Trial,
        loss: MetricLossFactory | None = None,
        regularizer: Callable[[], nn.Module] | None = None,
        weighted: WeightedLoss | None = None,
        weights: Sequence[float] = (),
        layer_only: bool = False,
        **options: Any,
    ) -> Result:
        seen, unseen = list(range(6)), list(range(6, 10))
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        train = data.classes(seen).subset(
            train=trial.pick(smoke=600, laptop=6_000, paper=len(data.y_train)), generator=trial.generator()
        )
        num_test = trial.pick(smoke=100, laptop=2_000, paper=len(data.y_test))
        test = data.classes(unseen).subset(test=num_test, generator=trial.generator(1))
        make = loss or base_loss(self.base)
        epochs = trial.pick(smoke=2, laptop=self.epochs, paper=40)

        def fit(
            x: Tensor, y: Tensor, epochs: int, weight: float | None, after_epoch: Callable[[nn.Module], None]
        ) -> Fit:
            def make_weighted(classes: int, dim: int) -> nn.Module:
                return weighted(make(classes, dim), weight) if weighted and weight is not None else make(classes, dim)

            return _fit(trial, x, y, epochs, make_weighted, regularizer, layer_only, after_epoch)

        chosen = weights[0] if weights else None
        searched: dict[float, float] = {}
        if len(weights) > 1:
            held_out = torch.isin(train.y_train, torch.randperm(len(seen), generator=trial.generator(3))[:3])
            kept_labels = train.y_train[~held_out].unique(return_inverse=True)[1]
            for done, weight in enumerate(sorted(weights)):
                tried = fit(train.x_train[~held_out], kept_labels, max(1, epochs // 2), weight, lambda model: None)
                of_held_out = predict(tried.model, train.x_train[held_out].to(trial.device)).cpu()
                searched[weight] = recall_at_k(of_held_out, train.y_train[held_out])
                trial.report((done + 1) / (len(weights) + 2))
            chosen = max(searched, key=lambda weight: searched[weight])

        recall: list[float] = []
        tests: list[Tensor] = []

        def after_epoch(model: nn.Module) -> None:
            tests[:] = [predict(model, test.x_test.to(trial.device)).cpu()]
            recall.append(recall_at_k(tests[0], test.y_test))
            trial.report(1 - 2 / (len(searched) + 2) * (1 - len(recall) / epochs) if searched else len(recall) / epochs)

        fitted = fit(train.x_train, train.y_train, epochs, chosen, after_epoch)
        found = tests[0]
        of_seen = predict(fitted.model, train.x_test[:num_test].to(trial.device)).cpu()
        # One threshold for all classes, where a twentieth of all negative pairs is accepted.
        pooled = utility_curves(found, test.y_test, far=(0.05, 0.05), num_thresholds=2)
        curves = {"recall_at_1": Curve([float(epoch + 1) for epoch in range(epochs)], recall)}
        if searched:
            curves["held_out_recall_at_1"] = Curve(list(searched), list(searched.values()))
        return Result(
            {
                "recall_at_1": recall[-1],
                "map_at_r": map_at_r(found, test.y_test),
                "nmi": nmi(found, test.y_test),
                "seen_recall_at_1": recall_at_k(of_seen, train.y_test[:num_test]),
                "seen_nmi": nmi(of_seen, train.y_test[:num_test]),
                "opis": opis(found, test.y_test),
                "opis_worst": opis(found, test.y_test, worst=0.1),
                "frr_spread": float((1 - pooled.sensitivity[:, 0]).std()),
                "far_spread": float((1 - pooled.specificity[:, 0]).std()),
                "seconds": fitted.seconds,
                **({"weight": chosen} if chosen is not None else {}),
            },
            curves,
        )


@dataclass(frozen=True)
class Fit:
    """An embedding, and the time in its training steps."""

    model: nets.Classifier
    seconds: float


def _fit(
    trial: Trial,
    x: Tensor,
    y: Tensor,
    epochs: int,
    loss: MetricLossFactory,
    regularizer: Callable[[], nn.Module] | None,
    layer_only: bool,
    after_epoch: Callable[[nn.Module], None],
) -> Fit:
    """Train a small CNN on batches of all classes with ten images each."""
    sampler = PKSampler(y, int(y.max()) + 1, 10, generator=trial.generator(2))
    x, y = x.to(trial.device), y.to(trial.device)
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = nets.small_cnn(tuple(x.shape[1:]), 64).to(trial.device)
        criterion = loss(int(y.max()) + 1, 64).to(trial.device)
    terms = [criterion, *([regularizer().to(trial.device)] if regularizer else [])]
    parameters = [p for module in (model, *terms) for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(sampler))
    seconds = 0.0
    for _ in range(epochs):
        model.train()
        started = time.perf_counter()
        for batch in sampler:
            index = torch.tensor(batch, device=x.device)
            features, labels = model.features(x[index]), y[index]
            arguments = [model.head(features), labels, *([model.head(features.detach())] if layer_only else [])]
            value: Tensor = sum((term(*arguments) for term in terms), torch.zeros((), device=x.device))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - started
        after_epoch(model)
    return Fit(model, seconds)
