"""Image classification under attack: accuracy on clean images and on the worst ones within a small ball."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.ops.attack import eval_mode, pgd, random_in_ball
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.images import Images
from trimtab.studies.tools.training import Supervised, Training, Workbench, accuracy, fit, predict

METRICS = {
    "robust_accuracy": Metric("accuracy under attack (%)", percent=True),
    "test_accuracy": Metric("clean test accuracy (%)", percent=True),
    "seconds": Metric("training time (s)", best="min"),
}
EPS = 0.15


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


class Defended(Supervised):
    """Plain training on an objective that may attack the network."""

    def __init__(self, bench: Workbench, objective: Objective) -> None:
        super().__init__(bench)
        self.objective = objective

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.network.train()
        self.optimizer.zero_grad()
        loss = self.objective(self.network, x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def train_and_attack(make: ObjectiveFactory, trial: Trial) -> Result:
    """Train a small CNN on digits; the attack on the test images takes 40 steps from the best of two random starts."""
    train, test = trial.pick(smoke=(256, 100), laptop=(None, 360), paper=(None, None))
    data = load("digits").subset(train, test, generator=trial.generator())
    images = Images.of(data, data.y_train, trial.device)
    ball = Ball(EPS, trial.pick(smoke=2, laptop=10, paper=10), (0.0, 1.0), trial.generator(2))
    sgd = Training(optimizer=lambda params, plan: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4))
    bench = images.bench(trial, sgd, "cnn", trial.pick(smoke=2, laptop=25, paper=100), batch_size=64)
    rule, reached = Defended(bench, make(ball)), list[float]()
    done = fit(bench, rule, after_epoch=lambda epoch: reached.append(accuracy(rule, images.x_test, images.y_test)))
    network = rule.network.eval()
    withstood = torch.ones_like(images.y_test, dtype=torch.bool)
    for _ in range(2):
        moved = pgd(
            lambda moved: F.cross_entropy(network(moved), images.y_test, reduction="none"),
            images.x_test,
            EPS,
            steps=trial.pick(smoke=4, laptop=40, paper=100),
            start=random_in_ball(images.x_test, EPS, generator=ball.generator),
            bounds=ball.bounds,
        )
        withstood &= predict(network, moved).argmax(1) == images.y_test
    return Result(
        {"robust_accuracy": withstood.float().mean().item(), "test_accuracy": reached[-1], "seconds": done.seconds},
        {"test_accuracy": Curve([float(epoch + 1) for epoch in range(len(reached))], reached)},
    )
