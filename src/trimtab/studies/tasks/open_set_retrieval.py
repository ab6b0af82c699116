"""Image retrieval among classes that training has not seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.metric.retrieval import map_at_r, recall_at_k
from trimtab.metric.samplers import PKSampler
from trimtab.metric.tcm import opis, utility_curves
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import predict

Base = Literal["arcface", "triplet", "npair"]

# Builds a metric loss `loss(embeddings, labels)` from the number of training classes and the embedding's width.
MetricLossFactory = Callable[[int, int], nn.Module]


def base_loss(name: Base) -> MetricLossFactory:
    """A base loss of pytorch-metric-learning, with that package's settings."""
    try:
        from pytorch_metric_learning import losses
    except ImportError as error:
        raise ImportError("the base losses come from pytorch-metric-learning: pip install 'trimtab[metric]'") from error
    makers: dict[Base, MetricLossFactory] = {
        "arcface": lambda classes, dim: cast(nn.Module, losses.ArcFaceLoss(classes, dim)),
        "triplet": lambda classes, dim: cast(nn.Module, losses.TripletMarginLoss()),
        "npair": lambda classes, dim: cast(nn.Module, losses.NPairsLoss()),
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
        "opis": Metric("threshold inconsistency (OPIS)", best="min"),
        "opis_worst": Metric("OPIS of the worst 10 % of classes", best="min"),
        "frr_spread": Metric("spread of false rejects over classes (%)", best="min", percent=True),
        "far_spread": Metric("spread of false accepts over classes (%)", best="min", percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(self, loss: MetricLossFactory | None = None, regularizer: Callable[[], nn.Module] | None = None) -> Arm:
        """A contestant that brings its own loss, or a term that is added to it, both called (embeddings, labels).

        Args:
            loss: makes the loss from the number of classes and the embedding's width; the task's base by default.
            regularizer: makes a further term.
        """
        return self.arm(loss=loss, regularizer=regularizer)

    def run(
        self,
        trial: Trial,
        loss: MetricLossFactory | None = None,
        regularizer: Callable[[], nn.Module] | None = None,
        **options: Any,
    ) -> Result:
        seen, unseen = list(range(6)), list(range(6, 10))
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        train = data.classes(seen).subset(
            train=trial.pick(smoke=600, laptop=6_000, paper=len(data.y_train)), generator=trial.generator()
        )
        test = data.classes(unseen).subset(
            test=trial.pick(smoke=100, laptop=2_000, paper=len(data.y_test)), generator=trial.generator(1)
        )
        x, y = train.x_train.to(trial.device), train.y_train.to(trial.device)
        dim = 64
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = nets.small_cnn(train.in_shape, dim).to(trial.device)
            criterion = (loss or base_loss(self.base))(len(seen), dim).to(trial.device)
        terms = [criterion, *([regularizer().to(trial.device)] if regularizer else [])]
        parameters = [p for module in (model, *terms) for p in module.parameters()]
        epochs = trial.pick(smoke=2, laptop=self.epochs, paper=40)
        sampler = PKSampler(train.y_train, len(seen), 10, generator=trial.generator(2))
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(sampler))
        recall: list[float] = []
        seconds = 0.0
        for epoch in range(epochs):
            model.train()
            started = time.perf_counter()
            for batch in sampler:
                index = torch.tensor(batch, device=x.device)
                embeddings, labels = model(x[index]), y[index]
                value: Tensor = sum((term(embeddings, labels) for term in terms), torch.zeros((), device=x.device))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
            seconds += time.perf_counter() - started
            found = predict(model, test.x_test.to(trial.device)).cpu()
            recall.append(recall_at_k(found, test.y_test))
            trial.report((epoch + 1) / epochs)
        # One threshold for all classes, where a twentieth of all negative pairs is accepted.
        pooled = utility_curves(found, test.y_test, far=(0.05, 0.05), num_thresholds=2)
        return Result(
            {
                "recall_at_1": recall[-1],
                "map_at_r": map_at_r(found, test.y_test),
                "opis": opis(found, test.y_test),
                "opis_worst": opis(found, test.y_test, worst=0.1),
                "frr_spread": float((1 - pooled.sensitivity[:, 0]).std()),
                "far_spread": float((1 - pooled.specificity[:, 0]).std()),
                "seconds": seconds,
            },
            {"recall_at_1": Curve([float(epoch + 1) for epoch in range(epochs)], recall)},
        )
