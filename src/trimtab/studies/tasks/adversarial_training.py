"""Image classification under attack: accuracy on clean images and on the worst ones within a small ball."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.ops.attack import eval_mode, pgd, random_in_ball
from trimtab.studies.study import Arm, Curve, Metric, Result, Task, Trial
from trimtab.studies.training import predict


@dataclass(frozen=True)
class Ball:
    """What a training objective may assume about the attacker.

    Attributes:
        eps: radius in the largest change of a pixel.
        steps: ascent steps of the attack in training.
        bounds: smallest and largest value of a pixel.
        generator: source of the attack's random starts.
    """

    eps: float
    steps: int
    bounds: tuple[float, float]
    generator: torch.Generator

    def attack(self, model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Images of the ball at which `objective` is large, found with the model in eval mode."""
        start = random_in_ball(x, self.eps, generator=self.generator)
        with eval_mode(model):
            return pgd(objective, x, self.eps, steps=self.steps, start=start, bounds=self.bounds)


Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
ObjectiveFactory = Callable[[Ball], Objective]


def cross_entropy(ball: Ball) -> Objective:
    """No defence."""
    return lambda model, x, y: F.cross_entropy(model(x), y)


def pgd_training(ball: Ball) -> Objective:
    """Cross-entropy at the attacked images (Madry et al., ICLR 2018)."""

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attacked = ball.attack(model, x, lambda moved: F.cross_entropy(model(moved), y, reduction="none"))
        return F.cross_entropy(model(attacked), y)

    return objective


def trades(ball: Ball, beta: float = 6.0) -> Objective:
    """Cross-entropy at the clean images, and how far predictions move in the ball (Zhang et al., ICML 2019)."""

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with eval_mode(model), torch.no_grad():
            still = model(x).log_softmax(1)

        def drift(moved: Tensor, clean: Tensor) -> Tensor:
            return F.kl_div(model(moved).log_softmax(1), clean, reduction="none", log_target=True).sum(1)

        attacked = ball.attack(model, x, lambda moved: drift(moved, still))
        logits = model(x)
        return F.cross_entropy(logits, y) + beta * drift(attacked, logits.log_softmax(1)).mean()

    return objective


@dataclass(frozen=True)
class AdversarialTraining(Task):
    """Train a small CNN with an objective of its own and attack it with projected gradient ascent.

    The attack on the test images takes 40 steps from the best of two random starts.

    Attributes:
        dataset: "digits", "mnist" or "fashion_mnist"; at the smoke budget always digits.
        eps: radius of the ball, in pixel values between 0 and 1.
        epochs: length of the training at the laptop budget.
    """

    dataset: str = "digits"
    eps: float = 0.15
    epochs: int = 25

    name: ClassVar[str] = "adversarial-training"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "robust_accuracy": Metric("accuracy under attack (%)", percent=True),
        "test_accuracy": Metric("clean test accuracy (%)", percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }

    def train(self, objective: ObjectiveFactory | None = None) -> Arm:
        """A contestant that brings its objective, `(model, x, y) -> scalar`, made for a ball; else cross-entropy."""
        return self.arm(objective=objective)

    def run(self, trial: Trial, objective: ObjectiveFactory | None = None, **options: Any) -> Result:
        data = load("digits" if trial.budget == "smoke" else self.dataset)
        data = data.subset(
            train=trial.pick(smoke=256, laptop=2_000, paper=len(data.y_train)),
            test=trial.pick(smoke=100, laptop=500, paper=None),
            generator=trial.generator(),
        )
        x, y = data.x_train.to(trial.device), data.y_train.to(trial.device)
        x_test, y_test = data.x_test.to(trial.device), data.y_test.to(trial.device)
        ball = Ball(self.eps, trial.pick(smoke=2, laptop=10, paper=10), (0.0, 1.0), trial.generator(2))
        loss = (objective or cross_entropy)(ball)
        with torch.random.fork_rng():
            torch.manual_seed(trial.seed)
            model = nets.small_cnn(data.in_shape, data.num_classes).to(trial.device)
        epochs, batch_size = trial.pick(smoke=2, laptop=self.epochs, paper=100), 64
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        steps = len(y) // batch_size
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        order, accuracy, seconds = trial.generator(1), list[float](), 0.0
        for epoch in range(epochs):
            model.train()
            started = time.perf_counter()
            shuffled = torch.randperm(len(y), generator=order).to(x.device)
            for index in shuffled[: steps * batch_size].view(steps, batch_size):
                optimizer.zero_grad()
                loss(model, x[index], y[index]).backward()
                optimizer.step()
                schedule.step()
            seconds += time.perf_counter() - started
            accuracy.append((predict(model, x_test).argmax(1) == y_test).float().mean().item())
            trial.report((epoch + 1) / epochs)
        model.eval()
        withstood = torch.ones_like(y_test, dtype=torch.bool)
        for _ in range(2):
            attacked = pgd(
                lambda moved: F.cross_entropy(model(moved), y_test, reduction="none"),
                x_test,
                self.eps,
                steps=trial.pick(smoke=4, laptop=40, paper=100),
                start=random_in_ball(x_test, self.eps, generator=ball.generator),
                bounds=ball.bounds,
            )
            withstood &= predict(model, attacked).argmax(1) == y_test
        return Result(
            {
                "robust_accuracy": withstood.float().mean().item(),
                "test_accuracy": accuracy[-1],
                "seconds": seconds,
            },
            {"test_accuracy": Curve([float(epoch + 1) for epoch in range(epochs)], accuracy)},
        )
