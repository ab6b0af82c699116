"""What an optimizer does to the length of weights that a normalisation layer makes scale invariant."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trimtab import optim
from trimtab.data import load
from trimtab.studies.engine.study import Curve, Experiment, Metric, Result, Trial
from trimtab.studies.tools.training import OptimizerFactory, Plan, Training, Workbench, accuracy, fit


def watched_training(make: OptimizerFactory, trial: Trial) -> Result:
    """Train a batch-normalised MLP on digits and watch its first layer, whose scale the network does not feel.

    What the layer computes depends on the direction of each unit's weights alone, so a step counts for what it turns
    them by: the effective step, the distance of two successive directions. It shrinks as the weights grow longer.
    """
    data = load("digits").subset(trial.pick(smoke=512, laptop=None, paper=None), None, generator=trial.generator())
    x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
    test = data.x_test.to(trial.device), data.y_test.to(trial.device)
    epochs = trial.pick(smoke=4, laptop=20, paper=200)
    watched: list[_Watched] = []

    def watch(network: nn.Module, plan: Plan) -> None:
        watched.append(_Watched(network.get_parameter("1.weight")))

    bench = Workbench(
        Training(optimizer=make, prepare=watch),
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Linear(x[0].numel(), 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 128, bias=False),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, data.num_classes),
        ),
        (x, y),
        (x, y),
        num_classes=data.num_classes,
        epochs=epochs,
        trial=trial,
    )
    rule = bench.rule()
    (first,) = watched
    rule.optimizers[0].register_step_post_hook(lambda *_: first.observe())
    reached: list[float] = []

    def after_epoch(epoch: int) -> None:
        reached.append(accuracy(rule, *test))
        first.close_epoch()

    # A constant rate, so that what is seen of the effective step is the weights' doing.
    fit(bench, rule, anneal=False, after_epoch=after_epoch)
    passed = [float(epoch + 1) for epoch in range(epochs)]
    return Result(
        {
            "effective_step": sum(first.steps) / epochs,
            "slowdown": first.steps[0] / first.steps[-1],
            "norm_growth": first.norms[-1],
            "cosine": sum(first.cosines) / epochs,
            "test_accuracy": reached[-1],
        },
        {
            "norm_growth": Curve(passed, first.norms),
            "effective_step": Curve(passed, first.steps),
            "test_accuracy": Curve(passed, reached),
        },
    )


class _Watched:
    """A weight that is followed; `steps` and `cosines` are means of epochs, `norms` stand at their ends."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.last, self.first = weight, weight.detach().clone(), weight.detach().norm()
        self.steps: list[float] = []
        self.cosines: list[float] = []
        self.norms: list[float] = []
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    @torch.no_grad()
    def observe(self) -> None:
        """After an optimizer step; the gradient is still the one at the weights before it."""
        if self.weight.grad is None:
            return
        step = (F.normalize(self.weight, dim=1) - F.normalize(self.last, dim=1)).norm(dim=1).mean()
        self._seen.append((step, F.cosine_similarity(self.weight.grad, self.last, dim=1).abs().mean()))
        self.last.copy_(self.weight)

    def close_epoch(self) -> None:
        steps, cosines = zip(*self._seen, strict=True)
        self.steps.append(torch.stack(steps).mean().item())
        self.cosines.append(torch.stack(cosines).mean().item())
        self.norms.append((self.weight.detach().norm() / self.first).item())
        self._seen.clear()


def sgd(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def fast_sgd(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
    """SGD at twice the rate: larger steps without any projection."""
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


def sgdp(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
    """SGDP at the rate of SGD."""
    return optim.SGDP(parameters, lr=0.1, momentum=0.9)


def adam(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(parameters, lr=3e-3)


def adamp(parameters: Any, plan: Plan) -> torch.optim.Optimizer:
    """AdamP at the rate of Adam."""
    return optim.AdamP(parameters, lr=3e-3)


effective_steps = Experiment(
    name="effective steps",
    arms={
        "SGD": partial(watched_training, sgd),
        "SGD, twice the rate": partial(watched_training, fast_sgd),
        "SGDP": partial(watched_training, sgdp),
        "Adam": partial(watched_training, adam),
        "AdamP": partial(watched_training, adamp),
    },
    metrics={
        "effective_step": Metric("effective step, mean over the training", best=None),
        "slowdown": Metric("effective step of the first epoch over that of the last", best=None),
        "norm_growth": Metric("length of the first layer's weights, last over first", best=None),
        "cosine": Metric("cosine of gradient and weights (absolute)", best=None),
        "test_accuracy": Metric("test accuracy (%)", percent=True),
    },
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    reads=("digits",),
    cost=1.0,
)
