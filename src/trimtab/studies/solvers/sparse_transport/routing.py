"""A mixture of experts of limited capacity, trained with each way to route."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import ClassificationData, load
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descend, reported

Router = Callable[[Tensor, int], Tensor]
"""Takes scores (tokens, experts) and a capacity to routing weights (tokens, experts), non-negative."""

METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("test accuracy (%)", percent=True),
    "overflow": Metric("tokens sent beyond a capacity (%)", best="min", percent=True),
    "density": Metric("experts that see a token, mean", best="min"),
    "dropped": Metric("tokens that no expert takes (%)", best="min", percent=True),
    "busiest": Metric("load of the busiest expert, shares of the mean load", best="min"),
    "seconds": Metric("time to train (s)", best="min"),
}


class Mixture(nn.Module):
    """A linear classifier plus routed experts: what no expert takes still has an answer.

    Args:
        dim: of the tokens.
        experts: how many.
        width: hidden width of an expert.
        num_classes: number of logits.
    """

    def __init__(self, dim: int, experts: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.shared = nn.Linear(dim, num_classes)
        self.gate = nn.Linear(dim, experts, bias=False)
        self.inward = nn.Parameter(torch.randn(experts, dim, width) / math.sqrt(dim))
        self.outward = nn.Parameter(torch.randn(experts, width, num_classes) / math.sqrt(width))

    def forward(self, x: Tensor, route: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, routing weights and scores. An expert's answer counts by its weight times its softmax gate."""
        scores = self.gate(x)
        weights = route(scores)
        hidden = F.relu(torch.einsum("td,edw->tew", x, self.inward))
        answers = torch.einsum("tew,ewc->tec", hidden, self.outward)
        logits = self.shared(x) + torch.einsum("te,tec->tc", weights * scores.softmax(1), answers)
        return logits, weights, scores


@dataclass(frozen=True)
class ExpertRouting:
    """Train a mixture of experts on Fashion-MNIST (digits at the smoke budget), then route unseen images at once.

    A token is an image's 32 leading principal components, standardised. An expert's capacity is its share of the batch
    times `capacity_factor`; tokens that it is sent beyond that are dropped from it, those with the lowest score first.

    Attributes:
        experts: how many.
        capacity_factor: see above.
        tokens: routed together at the end.
    """

    experts: int = 16
    capacity_factor: float = 1.25
    tokens: int = 2000

    def train(self, router: Router, trial: Trial, *, balance: float = 0.0) -> Result:
        """One run of a router, with the weight of a loss that balances the loads of hard routing."""
        data = load(trial.pick(smoke="digits", laptop="fashion_mnist", paper="fashion_mnist"))
        train, test = self._tokens(data, trial)
        labels, answers = data.y_train.to(trial.device), data.y_test[: len(test)].to(trial.device)
        model = trial.seeded(lambda: Mixture(train.shape[1], self.experts, 32, data.num_classes)).to(trial.device)
        steps, batch = trial.pick(smoke=8, laptop=250, paper=4000), trial.pick(smoke=128, laptop=256, paper=1024)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        order = trial.generator(1)

        def loss(step: int) -> Tensor:
            index = torch.randint(len(train), (batch,), generator=order).to(trial.device)
            logits, weights, scores = model(train[index], lambda scores: self._held(router, scores))
            value = F.cross_entropy(logits, labels[index])
            return value + balance * balance_loss(scores, weights) if balance else value

        started = time.process_time()
        descend(optimizer, loss, reported(steps, trial.report), anneal=steps)
        seconds = time.process_time() - started
        with torch.no_grad():
            sent = router(model.gate(test), self._capacity(len(test)))
            logits, weights, _ = model(test, lambda scores: self._held(router, scores))
        loads = (sent > 0).sum(0).sort(descending=True).values.float()
        beyond = (loads - self._capacity(len(test))).clamp_min(0).sum()
        return Result(
            {
                "accuracy": float((logits.argmax(1) == answers).float().mean()),
                "overflow": float(beyond / len(test)),
                "density": float((weights > 0).float().sum(1).mean()),
                "dropped": float((weights.sum(1) == 0).float().mean()),
                "busiest": float(loads[0] / loads.mean()),
                "seconds": seconds,
            },
            {"load": Curve(list(range(1, self.experts + 1)), loads.tolist(), "expert, the busiest first")},
        )

    def _capacity(self, tokens: int) -> int:
        return min(tokens, math.ceil(self.capacity_factor * tokens / self.experts))

    def _held(self, router: Router, scores: Tensor) -> Tensor:
        """The router's weights, without those that overflow. Dense routing sends all to all, and is left as it is."""
        capacity = self._capacity(len(scores))
        weights = router(scores, capacity)
        sent = weights > 0
        if bool(sent.all()):
            return weights
        kept = scores.masked_fill(~sent, -math.inf).topk(capacity, dim=0).indices
        return weights * torch.zeros_like(weights).scatter_(0, kept, 1.0)

    def _tokens(self, data: ClassificationData, trial: Trial) -> tuple[Tensor, Tensor]:
        x, test = data.x_train.flatten(1), data.x_test[: self.tokens].flatten(1)
        mean = x.mean(0)
        covariance = (x - mean).T @ (x - mean) / len(x)
        values, vectors = torch.linalg.eigh(covariance)
        projection = vectors[:, -32:] / values[-32:].sqrt()
        return ((x - mean) @ projection).to(trial.device), ((test - mean) @ projection).to(trial.device)


def balance_loss(scores: Tensor, weights: Tensor) -> Tensor:
    """Experts times the sum of their shares of the tokens and of the gates; 1 where both are uniform.

    From Fedus, Zoph and Shazeer, "Switch Transformers", JMLR 2022, arXiv 2101.03961.
    """
    shares = (weights > 0).float().mean(0)
    return scores.shape[1] * (shares * scores.softmax(1).mean(0)).sum()
