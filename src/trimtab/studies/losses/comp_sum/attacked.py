"""Image classification under attack: accuracy on clean images and on the worst ones within a small ball."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.ops.attack import eval_mode, random_in_ball
from trimtab.studies.engine.study import Curve, Metric, Result, Trial
from trimtab.studies.tools.defences import Lesson, Objective, plain, withstood
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.images import Images
from trimtab.studies.tools.training import Supervised, Training, Workbench, accuracy, fit

METRICS = {
    "robust_accuracy": Metric("accuracy under attack (%)", percent=True),
    "test_accuracy": Metric("clean test accuracy (%)", percent=True),
    "seconds": Metric("training time (s)", best="min"),
}
EPS = 0.15

ObjectiveFactory = Callable[[Lesson, int], Objective]
"""Makes an objective for a lesson and a number of ascent steps."""


def cross_entropy(lesson: Lesson, steps: int) -> Objective:
    """No defence."""
    return plain(lesson)


def trades(lesson: Lesson, steps: int, beta: float = 6.0) -> Objective:
    """Cross-entropy at the clean images, and how far predictions move in the ball (Zhang et al., ICML 2019)."""

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with eval_mode(model), torch.no_grad():
            still = model(x).log_softmax(1)

        def drift(moved: Tensor, clean: Tensor) -> Tensor:
            return F.kl_div(model(moved).log_softmax(1), clean, reduction="none", log_target=True).sum(1)

        attacked = lesson.attack(model, x, lambda moved: drift(moved, still), steps)
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
        return descent_step(self.optimizer, self.objective(self.network, x, y))


def train_and_attack(make: ObjectiveFactory, trial: Trial) -> Result:
    """Train a small CNN on digits; the attack on the test images takes 40 steps from the best of two random starts."""
    train, test = trial.pick(smoke=(256, 100), laptop=(None, 360), paper=(None, None))
    data = load("digits").subset(train, test, generator=trial.generator())
    images = Images.of(data, data.y_train, trial.device)
    lesson = Lesson(EPS, images.num_classes, trial.generator(2), progress=1.0)
    sgd = Training(optimizer=lambda params, plan: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4))
    bench = images.bench(trial, sgd, "cnn", trial.pick(smoke=2, laptop=25, paper=100), batch_size=64)
    rule, reached = Defended(bench, make(lesson, trial.pick(smoke=2, laptop=10, paper=10))), list[float]()
    done = fit(bench, rule, after_epoch=lambda epoch: reached.append(accuracy(rule, images.x_test, images.y_test)))
    standing, steps = torch.ones_like(images.y_test, dtype=torch.bool), trial.pick(smoke=4, laptop=40, paper=100)
    for _ in range(2):
        start = random_in_ball(images.x_test, EPS, generator=lesson.generator)
        standing &= withstood(rule.network, images.x_test, images.y_test, EPS, steps=steps, start=start)
    return Result(
        {"robust_accuracy": standing.float().mean().item(), "test_accuracy": reached[-1], "seconds": done.seconds},
        {"test_accuracy": Curve([float(epoch + 1) for epoch in range(len(reached))], reached)},
    )
