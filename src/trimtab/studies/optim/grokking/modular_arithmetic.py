"""Addition modulo p learned from a part of its table: how soon, if ever, does a network understand the rest?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import optim
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.descent import descent_step

LEARNED = 0.95
METRICS = {
    "steps_to_grok": Metric("steps to 95 % test accuracy, or all of them", best="min"),
    "test_accuracy": Metric("test accuracy (%)", percent=True),
    "best_test_accuracy": Metric("best test accuracy (%)", percent=True),
    "train_accuracy": Metric("training accuracy (%)", percent=True),
    "collapsed": Metric("training samples whose own class gets no gradient (%)", best="min", percent=True),
    "alignment": Metric("cosine of descent with the weights", best=None),
    "seconds": Metric("training time (s)", best="min"),
}


def adamw(parameters: Any, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """AdamW as the authors have it, with an `eps` that no gradient is too small for."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), eps=1e-25, weight_decay=weight_decay)


@dataclass(frozen=True)
class Addition:
    """Train a ReLU network without biases on part of the table of addition modulo `p`, and test it on the rest.

    Two one-hot inputs, two hidden layers, the whole training set in each step, float32. A training that learns its
    part by heart has a training accuracy of one long before, if ever, it gets the others right (grokking).

    Attributes:
        p: the modulus; a smaller one at the smoke budget.
        fraction: share of the table that is trained on.
        steps: length of the training at the laptop budget.
        lr: learning rate of AdamW.
        width: of the hidden layers.
    """

    p: int
    fraction: float
    steps: int
    lr: float
    width: int = 200

    def plain(self, trial: Trial) -> Result:
        """AdamW on the cross-entropy of softmax."""
        return self.train(trial, nn.CrossEntropyLoss())

    def perpendicular(self, trial: Trial) -> Result:
        """The same with gradients orthogonal to the weights."""
        return self.train(trial, nn.CrossEntropyLoss(), projected=True)

    def stablemax(self, trial: Trial) -> Result:
        """StableMax in the softmax's place."""
        return self.train(trial, optim.StableMaxCrossEntropyLoss())

    def decayed(self, trial: Trial) -> Result:
        """The usual cure: of three weight decays the one that understands first, in hindsight, on this seed."""
        tried = [self.train(trial, nn.CrossEntropyLoss(), weight_decay=decay) for decay in (0.3, 1.0, 3.0)]
        return min(tried, key=lambda result: (result.metrics["steps_to_grok"], -result.metrics["test_accuracy"]))

    def double_precision(self, trial: Trial) -> Result:
        """AdamW on the cross-entropy of logits in float64: later to round, and nothing else."""
        return self.train(trial, InDoublePrecision())

    def train(
        self, trial: Trial, criterion: nn.Module, *, weight_decay: float = 0.0, projected: bool = False
    ) -> Result:
        """One training, watched at a hundred places."""
        p = trial.pick(smoke=min(self.p, 11), laptop=self.p, paper=113)
        steps = trial.pick(smoke=min(self.steps, 60), laptop=self.steps, paper=80_000)
        every = max(1, steps // 100)
        x, y = (part.to(trial.device) for part in table(p))
        order = torch.randperm(len(y), generator=trial.generator()).to(trial.device)
        train, test = order.split([round(self.fraction * len(y)), len(y) - round(self.fraction * len(y))])
        model = trial.seeded(lambda: network(p, self.width)).to(trial.device)
        stepper = adamw(model.parameters(), self.lr, weight_decay)
        stepper = optim.PerpGrad(stepper) if projected else stepper
        passed: list[float] = []
        lines: dict[str, list[float]] = {"test_accuracy": [], "train_accuracy": [], "collapsed": [], "alignment": []}
        inputs, targets, seconds = x[train], y[train], 0.0
        for step in range(1, steps + 1):
            started = time.process_time()
            descent_step(stepper, criterion(model(inputs), targets))
            seconds += time.process_time() - started
            if step % every == 0 or step == steps:
                with torch.no_grad():
                    seen, unseen = model(inputs), model(x[test])
                passed.append(float(step))
                lines["test_accuracy"].append((unseen.argmax(1) == y[test]).float().mean().item())
                lines["train_accuracy"].append((seen.argmax(1) == targets).float().mean().item())
                lines["collapsed"].append(collapsed(criterion, seen, targets))
                lines["alignment"].append(optim.nlm_alignment(model.parameters()).item())  # of the step's gradient
                trial.report(step / steps)
        grokked = [step for step, reached in zip(passed, lines["test_accuracy"], strict=True) if reached >= LEARNED]
        return Result(
            {
                "steps_to_grok": grokked[0] if grokked else float(steps),
                "best_test_accuracy": max(lines["test_accuracy"]),
                **{name: values[-1] for name, values in lines.items()},
                "seconds": seconds,
            },
            {name: Curve(passed[::2], values[::2], x_label="step") for name, values in lines.items()},
        )


class InDoublePrecision(nn.Module):
    """The cross-entropy of softmax, of logits in float64."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.double(), targets)


def network(p: int, width: int) -> nn.Module:
    """Two hidden layers without biases."""
    return nn.Sequential(
        nn.Linear(2 * p, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, p, bias=False),
    )


def collapsed(criterion: nn.Module, logits: Tensor, targets: Tensor) -> float:
    """Share of samples whose loss leaves the logit of their own class exactly without gradient.

    For softmax cross-entropy these are the samples whose loss is exactly zero.

    Example:
        >>> collapsed(nn.CrossEntropyLoss(), torch.tensor([[0.0, 30.0], [0.0, 3.0]]), torch.tensor([1, 1]))
        0.5
    """
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion(logits, targets), logits)
    return (gradient.gather(1, targets[:, None]) == 0).float().mean().item()


def table(p: int) -> tuple[Tensor, Tensor]:
    """All p x p pairs as two one-hot vectors each, and their sums modulo p.

    Example:
        >>> x, y = table(3)
        >>> x[5], y[5]  # 1 + 2
        (tensor([0., 1., 0., 0., 0., 1.]), tensor(0))
    """
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    return F.one_hot(pairs, p).flatten(1).float(), pairs.sum(1) % p
