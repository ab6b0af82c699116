"""Modular arithmetic learned from a part of its table: how soon, if ever, does a network understand the rest?"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from trimtab.optim.grokking import nlm_alignment
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import LossFactory, OptimizerFactory, Plan, cross_entropy

_LEARNED = 0.95


def adamw(params: Iterable[nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    """The optimizer of the baseline: without weight decay, and with an `eps` that no gradient is too small for."""
    return torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99), eps=1e-25, weight_decay=0.0)


@dataclass(frozen=True)
class ModularArithmetic(Task):
    """Train a ReLU network without biases on part of the table of an operation modulo `p`, and test it on the rest.

    Two one-hot inputs, two hidden layers of 200, the whole training set in each step, float32. A training that learns
    its part by heart has a training accuracy of one long before, if ever, it gets the others right (grokking).

    Attributes:
        p: the modulus; a smaller one at the smoke budget.
        operation: "add", "subtract" or "multiply".
        fraction: share of the table that is trained on.
        steps: length of the training at the laptop budget.
    """

    p: int = 59
    operation: Literal["add", "subtract", "multiply"] = "add"
    fraction: float = 0.5
    steps: int = 1500

    name: ClassVar[str] = "modular-arithmetic"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "test_accuracy": Metric("test accuracy (%)", percent=True),
        "best_test_accuracy": Metric("best test accuracy (%)", percent=True),
        "steps_to_grok": Metric("steps to 95 % test accuracy (all, if never)", best="min"),
        "train_accuracy": Metric("training accuracy (%)", percent=True),
        "collapsed": Metric("training samples whose own class gets no gradient (%)", best="min", percent=True),
        "alignment": Metric("cosine of descent with the weights", best=None),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(self, loss: LossFactory | None = None, optimizer: OptimizerFactory | None = None) -> Arm:
        """A contestant that brings its own loss or optimizer; without any it is cross-entropy with AdamW, no decay."""
        return self.arm(loss=loss, optimizer=optimizer)

    def run(
        self, trial: Trial, loss: LossFactory = cross_entropy, optimizer: OptimizerFactory = adamw, **options: Any
    ) -> Result:
        p = trial.pick(smoke=min(self.p, 11), laptop=self.p, paper=113)
        steps = trial.pick(smoke=min(self.steps, 60), laptop=self.steps, paper=80_000)
        every = max(1, steps // 150)
        x, y = (part.to(trial.device) for part in table(p, self.operation))
        order = torch.randperm(len(y), generator=trial.generator()).to(trial.device)
        train, test = order.split([round(self.fraction * len(y)), len(y) - round(self.fraction * len(y))])
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = nn.Sequential(
                nn.Linear(2 * p, 200, bias=False),
                nn.ReLU(),
                nn.Linear(200, 200, bias=False),
                nn.ReLU(),
                nn.Linear(200, p, bias=False),
            ).to(trial.device)
        plan = Plan(len(train), p, steps, 1)
        criterion, stepper = loss(plan).to(trial.device), optimizer(list(model.parameters()), plan)
        clock = time.process_time if torch.device(trial.device).type == "cpu" else time.perf_counter
        passed: list[float] = []
        lines: dict[str, list[float]] = {"test_accuracy": [], "train_accuracy": [], "collapsed": [], "alignment": []}
        inputs, targets, seconds = x[train], y[train], 0.0
        for step in range(1, steps + 1):
            started = clock()
            stepper.zero_grad()
            logits = model(inputs)
            criterion(logits, targets).backward()
            stepper.step()
            seconds += clock() - started
            if step % every == 0 or step == steps:
                with torch.no_grad():
                    seen, unseen = model(inputs), model(x[test])
                passed.append(float(step))
                lines["test_accuracy"].append((unseen.argmax(1) == y[test]).float().mean().item())
                lines["train_accuracy"].append((seen.argmax(1) == targets).float().mean().item())
                lines["collapsed"].append(collapsed(criterion, seen, targets))
                lines["alignment"].append(nlm_alignment(model.parameters()).item())  # of the step's gradient
                trial.report(step / steps)
        grokked = [step for step, accuracy in zip(passed, lines["test_accuracy"], strict=True) if accuracy >= _LEARNED]
        return Result(
            {
                **{name: values[-1] for name, values in lines.items()},
                "best_test_accuracy": max(lines["test_accuracy"]),
                "steps_to_grok": grokked[0] if grokked else float(steps),
                "seconds": seconds,
            },
            {name: Curve(passed, values) for name, values in lines.items()},
        )


def collapsed(criterion: nn.Module, logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of samples whose loss leaves the logit of their own class exactly without gradient.

    For softmax cross-entropy these are the samples whose loss is exactly zero.

    Example:
        >>> collapsed(nn.CrossEntropyLoss(), torch.tensor([[0.0, 30.0], [0.0, 3.0]]), torch.tensor([1, 1]))
        0.5
    """
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(criterion(logits, targets), logits)
    return (gradient.gather(1, targets[:, None]) == 0).float().mean().item()


def table(p: int, operation: str = "add") -> tuple[torch.Tensor, torch.Tensor]:
    """All p x p pairs as two one-hot vectors each, and the results of the operation modulo p.

    Raises:
        ValueError: `operation` is unknown.

    Example:
        >>> x, y = table(3, "subtract")
        >>> x[1], y[1]  # 0 - 1
        (tensor([1., 0., 0., 0., 1., 0.]), tensor(2))
    """
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    first, second = pairs.unbind(1)
    if operation not in ("add", "subtract", "multiply"):
        raise ValueError(f"operation: {operation!r}; it must be 'add', 'subtract' or 'multiply'")
    result = {"add": first + second, "subtract": first - second, "multiply": first * second}[operation]
    return F.one_hot(pairs, p).flatten(1).float(), result % p
