"""Image classification under attack, where every way to train has the same number of passes through the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.nets import mlp
from trimtab.ops.attack import random_in_ball
from trimtab.ops.intervals import box_around
from trimtab.robust import IBPLoss, auto_attack, single_step_adversary, worst_case_logits
from trimtab.studies.engine.study import Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools import defences
from trimtab.studies.tools.defences import Defended, Lesson, Objective, withstood
from trimtab.studies.tools.images import Images, shown_epochs, worth_halving
from trimtab.studies.tools.training import Training, Workbench, accuracy, fit


@dataclass(frozen=True, kw_only=True)
class Defence(Entrant):
    """What a defender brings.

    Attributes:
        objective: makes the loss of a network on a batch from what is known of the attacker.
        passes: forward and backward passes through the task's network that a step takes, about: who needs more makes
            fewer steps.
        width: how many times as wide as the task's the network is; passes are to be counted accordingly.
    """

    objective: Callable[[Lesson], Objective]
    passes: float = 1.0
    width: int = 1


@dataclass(frozen=True)
class RobustAccuracy(Task[Defence]):
    """Train a small network so that it is right on the worst images within a ball of the largest norm.

    3,200 training images at half of their resolution at the laptop budget, 128 to a batch, two hidden layers of 256 and
    128 units. All have the same passes through it, and networks are tested by more than they were trained with: PGD
    of 50 steps on the cross-entropy from a random start, and AutoAttack, at the laptop budget with 50 steps, three
    target classes and 500 queries. Contestants choose among six settings by 10 steps on held-out images; larger rates
    were added for everybody when most had chosen the largest of the first ones.

    Attributes:
        dataset: "mnist", "fashion_mnist", "digits", or a file `.npz` with `x_train`, `y_train`, `x_test` and `y_test`;
            at the smoke budget digits.
        eps: the largest change of a pixel, of a range from 0 to 1.
    """

    dataset: str = "fashion_mnist"
    eps: float = 0.15

    name: ClassVar[str] = "robust-accuracy"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "robust_accuracy": Metric("accuracy under AutoAttack (%)", percent=True),
        "pgd_accuracy": Metric("accuracy under PGD-50 (%)", percent=True),
        "fgsm_accuracy": Metric("accuracy under FGSM (%)", percent=True),
        "test_accuracy": Metric("clean test accuracy (%)", percent=True),
        "certified_accuracy": Metric("accuracy certified by interval bounds (%)", percent=True),
        "abnormal": Metric("images whose loss falls under one step (%)", best="min", percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }
    accepts: ClassVar[type[Defence]] = Defence
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 6
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)}
    cost: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 1:
            raise ValueError(f"eps must be in (0, 1], got {self.eps}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"clothes": clothes, "written digits": written_digits}

    @classmethod
    def references(cls) -> Mapping[str, Defence]:
        rates = {"lr": (0.1, 0.3, 0.9)}
        return {
            "plain": Defence(objective=defences.plain),
            "RS-FGSM": Defence(objective=one_step, passes=2),
            "N-FGSM": Defence(objective=partial(one_step, noise="n"), passes=2),
            "PGD-7": Defence(objective=defences.pgd_training, passes=8),
            "TRADES": Defence(objective=defences.trades, passes=9, search={**rates, "beta": (1.0, 6.0)}),
            "GradAlign": Defence(objective=defences.grad_align, passes=5, search={**rates, "weight": (0.2, 1.0)}),
            "IBP": Defence(objective=interval_training, passes=3, search={**rates, "kappa": (0.0, 0.5)}),
        }

    def images(self, trial: Trial) -> Images:
        """The images as they are drawn for a run."""
        whole = load(self.datasets(trial.budget)[0])
        train, test = trial.pick(smoke=(320, 60), laptop=(4000, 400), paper=(None, None))
        data = whole.subset(train, test, generator=trial.generator())
        return Images.of(data, data.y_train, trial.device, halve=worth_halving(data, trial))

    def bench(self, trial: Trial, entrant: Defence, images: Images) -> Workbench:
        """Network and length of training: as many epochs as make the passes that all may make."""
        hidden = [entrant.width * units for units in trial.pick(smoke=(32,), laptop=(256, 128), paper=(512, 512))]
        batch = trial.pick(smoke=64, laptop=128, paper=128)
        passes = trial.pick(smoke=80, laptop=600, paper=100_000)
        steps = max(1, len(images.y) // batch)
        return Workbench(
            Training(),
            lambda: mlp(images.x[0].numel(), hidden, images.num_classes),
            (images.x, images.y),
            (images.x_held, images.y_held),
            num_classes=images.num_classes,
            epochs=max(1, round(passes / entrant.passes / steps)),
            trial=trial,
            batch_size=batch,
        )

    def run(self, trial: Trial, entrant: Defence) -> Result:
        images = self.images(trial)
        bench = self.bench(trial, entrant, images)
        lesson = Lesson(self.eps, images.num_classes, trial.generator(2), trial.setting)
        rule, epochs = Defended(bench, lesson, entrant.objective), bench.plan.epochs
        start = partial(random_in_ball, eps=self.eps, generator=trial.generator(3))

        def share(x: Tensor, y: Tensor, steps: int) -> float:
            return withstood(rule.network, x, y, self.eps, steps=steps, start=start(x)).float().mean().item()

        if trial.searching:
            fit(bench, rule)
            held = slice(trial.pick(smoke=30, laptop=300, paper=1000))
            return Result(
                score=share(images.x_held[held], images.y_held[held], trial.pick(smoke=2, laptop=10, paper=20))
            )
        shown, few = sorted(shown_epochs(epochs, 8)), slice(trial.pick(smoke=20, laptop=150, paper=1000))
        reached: list[float] = []

        def measure(epoch: int) -> None:
            if epoch in shown:
                reached.append(share(images.x_test[few], images.y_test[few], trial.pick(smoke=2, laptop=10, paper=20)))

        done = fit(bench, rule, after_epoch=measure)
        x, y, network, steps = (
            images.x_test,
            images.y_test,
            rule.network.eval(),
            trial.pick(smoke=4, laptop=50, paper=50),
        )
        by_entropy = withstood(network, x, y, self.eps, steps=steps, start=start(x))
        by_all = auto_attack(
            network,
            x,
            y,
            self.eps,
            steps=trial.pick(smoke=4, laptop=50, paper=100),
            num_targets=trial.pick(smoke=2, laptop=3, paper=9),
            num_queries=trial.pick(smoke=10, laptop=500, paper=5000),
            generator=trial.generator(5),
        )
        with torch.no_grad():
            worst = worst_case_logits(network, box_around(x, self.eps), y, images.num_classes)
        certain = worst.scatter(1, y[:, None], -torch.inf).amax(1) < 0
        return Result(
            {
                "robust_accuracy": (by_entropy & by_all.robust).float().mean().item(),
                "pgd_accuracy": by_entropy.float().mean().item(),
                "fgsm_accuracy": withstood(network, x, y, self.eps, steps=1).float().mean().item(),
                "test_accuracy": accuracy(network, x, y),
                "certified_accuracy": certain.float().mean().item(),
                "abnormal": abnormal_share(network, x, y, self.eps, trial.generator(4)),
                "seconds": done.seconds,
            },
            {"pgd_accuracy": Curve([(epoch + 1) / epochs for epoch in shown], reached, "share of the training")},
        )


def one_step(lesson: Lesson, noise: Any = "rs") -> Objective:
    """Cross-entropy after one step of the attack, from the start of RS-FGSM or of N-FGSM."""

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        moved, _ = single_step_adversary(model, x, y, lesson.radius, noise=noise, generator=lesson.generator)
        return F.cross_entropy(model(moved), y)

    return objective


def interval_training(lesson: Lesson) -> Objective:
    """Certified training by interval bounds, with the setting's share of the plain cross-entropy."""
    criterion = IBPLoss(lesson.eps, float(lesson.setting.get("kappa", 0.5)))

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        criterion.set_progress(lesson.progress)
        loss: Tensor = criterion(model, x, y)
        return loss

    return objective


def abnormal_share(network: nn.Module, x: Tensor, y: Tensor, eps: float, generator: torch.Generator) -> float:
    """Share of images whose loss falls in one attack step from a random start."""
    moved, before = single_step_adversary(network, x, y, eps, generator=generator)
    with torch.no_grad():
        after = F.cross_entropy(network(moved), y, reduction="none")
    return (F.cross_entropy(before, y, reduction="none") > after).float().mean().item()


clothes = RobustAccuracy()
written_digits = RobustAccuracy(dataset="mnist")
