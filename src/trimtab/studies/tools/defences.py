"""Ways to train against attacks that everyone would want to see beside a new one, and the attacks that test them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.ops.attack import eval_mode, pgd, random_in_ball
from trimtab.studies.engine.study import Setting
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.training import Supervised, Workbench

BOUNDS = (0.0, 1.0)
_WARM_UP = 0.1


@dataclass
class Lesson:
    """What an objective may know, and how far training is.

    Attributes:
        eps: radius of the ball that the network is tested in, in the largest change of a pixel.
        num_classes: number of classes.
        generator: source of all draws.
        setting: the values that the search chose, or tries.
        progress: share of the training that is done.
    """

    eps: float
    num_classes: int
    generator: torch.Generator
    setting: Setting = field(default_factory=dict)
    progress: float = 0.0

    @property
    def radius(self) -> float:
        """The radius to train with now: it rises over the first tenth, or nothing would be learnt in a large ball."""
        return max(1e-3, self.eps * min(1.0, self.progress / _WARM_UP))

    def attack(self, model: nn.Module, x: Tensor, objective: Callable[[Tensor], Tensor], steps: int) -> Tensor:
        """Images of the ball at which `objective` is large, from a random start."""
        start = random_in_ball(x, self.radius, generator=self.generator)
        with eval_mode(model):
            return pgd(objective, x, self.radius, steps=steps, start=start, bounds=BOUNDS)


Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""The loss of a network on a batch of images and labels."""


def plain(lesson: Lesson) -> Objective:
    """Cross-entropy of the images themselves."""
    return lambda model, x, y: F.cross_entropy(model(x), y)


def pgd_training(lesson: Lesson, steps: int = 7) -> Objective:
    """Cross-entropy of attacked images (Madry et al., ICLR 2018)."""

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        worst = lesson.attack(model, x, lambda moved: F.cross_entropy(model(moved), y, reduction="none"), steps)
        return F.cross_entropy(model(worst), y)

    return objective


def trades(lesson: Lesson, steps: int = 7) -> Objective:
    """Cross-entropy of the images, and how far predictions move in the ball (Zhang et al., ICML 2019)."""
    beta = float(lesson.setting.get("beta", 6.0))

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        still = logits.detach().log_softmax(1)

        def drift(moved: Tensor, clean: Tensor) -> Tensor:
            return F.kl_div(model(moved).log_softmax(1), clean, reduction="none", log_target=True).sum(1)

        worst = lesson.attack(model, x, lambda moved: drift(moved, still), steps)
        return F.cross_entropy(logits, y) + beta * drift(worst, logits.log_softmax(1)).mean()

    return objective


def grad_align(lesson: Lesson) -> Objective:
    """One-step training that keeps the gradient's direction the same all over the ball (Andriushchenko, NeurIPS 2020).

    FGSM starts at the image, and the weight times one minus the cosine of the gradients at the image and at a random
    point of the ball is added.
    """
    weight = float(lesson.setting.get("weight", 0.2))

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        near = (x + random_in_ball(x, lesson.radius, generator=lesson.generator)).clamp(*BOUNDS)
        slopes = []
        for point in (x, near):
            moved = point.clone().requires_grad_()
            loss = F.cross_entropy(model(moved), y, reduction="sum")
            slopes.append(torch.autograd.grad(loss, moved, create_graph=True)[0].flatten(1))
        apart = 1 - F.cosine_similarity(slopes[0], slopes[1], dim=1).mean()
        worst = (x + lesson.radius * slopes[0].detach().sign().view_as(x)).clamp(*BOUNDS)
        return F.cross_entropy(model(worst), y) + weight * apart

    return objective


class Defended(Supervised):
    """Plain training on an objective that may attack the network."""

    def __init__(self, bench: Workbench, lesson: Lesson, make: Callable[[Lesson], Objective]) -> None:
        super().__init__(bench)
        self.lesson, self.objective = lesson, make(lesson)
        self.total, self.done = bench.plan.epochs * bench.plan.steps_per_epoch, 0

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.network.train()
        self.lesson.progress = self.done / self.total
        loss = self.objective(self.network, x, y)
        self.done += 1
        # A step from a batch on which the attack wins is not thrown far away.
        return descent_step(self.optimizer, loss, clip=1.0)


def withstood(
    network: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    eps: float,
    *,
    steps: int,
    start: Float[Tensor, "n ..."] | None = None,
) -> Bool[Tensor, " n"]:
    """Which images are still rightly classified after an attack by their cross-entropy."""
    network = network.eval()

    def height(moved: Tensor) -> Tensor:
        return F.cross_entropy(network(moved), y, reduction="none")

    step_size = eps if steps == 1 else None
    moved = pgd(height, x, eps, steps=steps, step_size=step_size, start=start, bounds=BOUNDS)
    with torch.no_grad():
        right: Tensor = network(moved).argmax(1) == y
    return right
