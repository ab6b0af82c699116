"""Image classification from a handful of labels and many images without."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import nets
from trimtab.data import load
from trimtab.ops.averaging import Teacher
from trimtab.semisup.alignment import DistributionAlignment
from trimtab.semisup.views import strong_view, weak_view
from trimtab.studies.engine.study import Budget, Curve, Entrant, Metric, Result, Setting, Task, Trial
from trimtab.studies.tools import few_label_rules
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.images import worth_halving
from trimtab.studies.tools.training import accuracy

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Start:
    """What a rule is made from.

    Attributes:
        network: a new classifier, with `features` and a linear `head`.
        labels: of all labelled images, in their order.
        num_classes: number of classes.
        steps: length of the training.
        setting: the values that the search chose, or tries.
        generator: for a rule that draws.
    """

    network: nets.Classifier
    labels: Int[Tensor, " labelled"]
    num_classes: int
    steps: int
    setting: Setting
    generator: torch.Generator


@dataclass(frozen=True)
class Batch:
    """Some labelled images and views of some unlabelled ones.

    Attributes:
        x: weak views of labelled images.
        targets: their labels.
        index: their places among the labelled images; an image may come more than once.
        weak: weak views of unlabelled images.
        strong: strong views of the same.
        weak_again: draws other weak views of the same.
    """

    x: Float[Tensor, "batch channels height width"]
    targets: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]
    weak: Float[Tensor, "unlabelled channels height width"]
    strong: Float[Tensor, "unlabelled channels height width"]
    weak_again: Callable[[], Tensor]


def of_views(rule: Any, batch: Batch) -> Losses:
    """The loss of a rule that takes labelled images, their labels, weak and strong views."""
    found: Losses = rule.loss(batch.x, batch.targets, batch.weak, batch.strong)
    return found


@dataclass(frozen=True, kw_only=True)
class SemiSupervised(Entrant):
    """What a contestant brings.

    Attributes:
        rule: makes a module from what there is at the start: `forward(x)` gives logits, all its parameters are
            trained, and `update()`, if it exists, is called after each step.
        loss: from the rule and a batch to losses, of which "total" is minimised; "used" is the share of unlabelled
            images that contribute.
    """

    rule: Callable[[Start], nn.Module]
    loss: Callable[[Any, Batch], Losses] = of_views


@dataclass(frozen=True)
class Split:
    """The images of a run.

    Attributes:
        x, y: labelled images, as many of each class.
        x_held, y_held: further labelled images, on which settings are chosen.
        unlabelled: images without labels; none of the others.
        hidden: their labels, which no one sees but the measure at the end.
        x_test, y_test: for testing.
        num_classes: number of classes.
    """

    x: Float[Tensor, "labelled channels height width"]
    y: Int[Tensor, " labelled"]
    x_held: Float[Tensor, "held channels height width"]
    y_held: Int[Tensor, " held"]
    unlabelled: Float[Tensor, "unlabelled channels height width"]
    hidden: Int[Tensor, " unlabelled"]
    x_test: Float[Tensor, "test channels height width"]
    y_test: Int[Tensor, " test"]
    num_classes: int


@dataclass(frozen=True)
class FewLabels(Task[SemiSupervised]):
    """Train a small CNN from a few labels a class and thousands of images without, and test it on others.

    Images have half of their resolution at the laptop budget. A step has 16 labelled images, shifted at random, and a
    weak and a strong view of 64 others, the same for all; it is SGD with Nesterov momentum and a cosine schedule. What
    is tested is the moving average of the weights. Each contestant chooses between two settings by the accuracy on 200
    more labelled images. That is more than most variants train on: the choice is better than anyone's would be, and as
    good for everyone.

    Photographs ask for more: the network is twice as wide, training two and a half times as long, and half of all
    views are mirrored. Shorter, hardly a prediction would ever be sure enough to be learnt from.

    Attributes:
        dataset: "fashion_mnist", "mnist", "cifar10", "digits", or a file `.npz`; at the smoke budget digits.
        labels: number of labelled images.
        photographs: whether the images show things of the world in colour.
    """

    dataset: str = "fashion_mnist"
    labels: int = 40
    photographs: bool = False

    name: ClassVar[str] = "few-labels"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("test accuracy (%)", percent=True),
        "unlabelled": Metric("accuracy on the unlabelled images (%)", percent=True),
        "used": Metric("unlabelled images that contribute (%)", best=None, percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }
    accepts: ClassVar[type[SemiSupervised]] = SemiSupervised
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 2
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"threshold": (0.8, 0.95)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 5}
    cost: ClassVar[float] = 4.0

    def __post_init__(self) -> None:
        if self.labels < 10:
            raise ValueError(f"labels must be at least 10, got {self.labels}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {
            "40 labels": fashion_40,
            "250 labels": fashion_250,
            "40 labels of digits": mnist_40,
            "250 labels of photographs": photographs_250,
        }

    @classmethod
    def references(cls) -> Mapping[str, SemiSupervised]:
        return {
            "labelled only": SemiSupervised(rule=labelled_only, search={"lr": (0.03, 0.1)}),
            "pseudo-labels": SemiSupervised(rule=pseudo_label),
            "MixMatch": SemiSupervised(rule=mixmatch, loss=of_two_weak_views, search={"weight": (10.0, 75.0)}),
            "FixMatch": SemiSupervised(rule=fixmatch),
            "FixMatch, aligned": SemiSupervised(rule=aligned_fixmatch),
        }

    def split(self, trial: Trial) -> Split:
        """The trial's images."""
        data = load(self.datasets(trial.budget)[0])
        order = torch.randperm(len(data.y_train), generator=trial.generator())
        held, unlabelled, tested = trial.pick(
            smoke=(100, 400, 200), laptop=(200, 6_000, 2_000), paper=(1_000, len(order), len(data.y_test))
        )
        halve = worth_halving(data, trial)
        x_train, x_test = (
            nn.functional.avg_pool2d(x, 2).to(trial.device) if halve else x.to(trial.device)
            for x in (data.x_train[order[: self.labels * 20 + held + unlabelled]], data.x_test)
        )
        y = data.y_train[order[: len(x_train)]].to(trial.device)
        chosen = evenly(y, min(self.labels, 2 * data.num_classes) if trial.budget == "smoke" else self.labels)
        rest = torch.ones(len(y), dtype=torch.bool, device=y.device)
        rest[chosen] = False
        others = rest.nonzero().flatten()
        judged, seen = others[:held], others[held : held + unlabelled]
        shown = torch.randperm(len(data.y_test), generator=trial.generator(5))[:tested]
        return Split(
            x_train[chosen],
            y[chosen],
            x_train[judged],
            y[judged],
            x_train[seen],
            y[seen],
            x_test[shown],
            data.y_test[shown].to(trial.device),
            data.num_classes,
        )

    def run(self, trial: Trial, entrant: SemiSupervised) -> Result:
        split = self.split(trial)
        steps = trial.pick(smoke=12, laptop=800 if self.photographs else 320, paper=100_000)
        classes, shape = split.num_classes, tuple(split.x.shape[1:])
        width = trial.pick(smoke=4, laptop=16 if self.photographs else 8, paper=32)
        network = trial.seeded(lambda: nets.small_cnn(shape, classes, width=width))
        start = Start(network, split.y.cpu(), classes, steps, trial.setting, trial.generator(6))
        rule = trial.seeded(lambda: entrant.rule(start), 1).to(trial.device)
        average = Teacher(rule, decay=trial.pick(smoke=0.9, laptop=0.99, paper=0.999), warmup=True)
        optimizer = torch.optim.SGD(
            [p for p in rule.parameters() if p.requires_grad],
            lr=float(trial.setting.get("lr", 0.03)),
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        batches, used, shown, reached = Batches(split, trial, flip=self.photographs), [], [], []
        seconds, clock = 0.0, time.process_time
        for step in range(1, steps + 1):
            batch = batches.draw()
            started = clock()
            rule.train()
            found = entrant.loss(rule, batch)
            descent_step(optimizer, found["total"])
            schedule.step()
            if callable(update := getattr(rule, "update", None)):
                update()
            average.update(rule)
            seconds += clock() - started
            if 10 * step > 8 * steps:
                used.append(found["used"].detach())
            if step % max(1, steps // 5) == 0:
                trial.report(step / steps)
                if not trial.searching:
                    shown.append(float(step))
                    reached.append(accuracy(average.model, split.x_test, split.y_test))
        if trial.searching:
            return Result(score=accuracy(average.model, split.x_held, split.y_held))
        return Result(
            {
                "accuracy": accuracy(average.model, split.x_test, split.y_test),
                "unlabelled": accuracy(average.model, split.unlabelled, split.hidden),
                "used": torch.stack(used).mean().item(),
                "seconds": seconds,
            },
            {"accuracy": Curve(shown, reached, "step")},
        )


class Batches:
    """Draws a run's batches, the same for every contestant.

    Args:
        split: the images.
        trial: source of the draws.
        labelled, unlabelled: images of each kind in a batch.
        flip: whether half of the views are mirrored.
    """

    def __init__(
        self, split: Split, trial: Trial, labelled: int = 16, unlabelled: int = 64, *, flip: bool = False
    ) -> None:
        self.split, self.labelled, self.unlabelled, self.flip = split, labelled, unlabelled, flip
        self.order, self.views, self.more = (trial.generator(stream) for stream in (1, 2, 3))

    def draw(self) -> Batch:
        """The next batch."""
        split = self.split
        index = torch.randint(len(split.y), (self.labelled,), generator=self.order)
        chosen = torch.randint(len(split.hidden), (self.unlabelled,), generator=self.order)
        plain = split.unlabelled[chosen]
        return Batch(
            weak_view(split.x[index], flip=self.flip, generator=self.views),
            split.y[index],
            index,
            weak_view(plain, flip=self.flip, generator=self.views),
            strong_view(plain, flip=self.flip, generator=self.views),
            lambda: weak_view(plain, flip=self.flip, generator=self.more),
        )


def evenly(y: Int[Tensor, " n"], count: int) -> Int[Tensor, " count"]:
    """Places of the first `count` samples, as many of each class as can be.

    Example:
        >>> evenly(torch.tensor([0, 0, 0, 1, 1, 0]), 4)
        tensor([0, 1, 3, 4])
    """
    # How many of its own class stand before a sample; the samples with the fewest come first.
    before = nn.functional.one_hot(y).cumsum(0).gather(1, y[:, None])[:, 0]
    return before.argsort(stable=True)[:count].sort().values


def labelled_only(start: Start) -> nn.Module:
    """Cross-entropy on the labelled images alone."""
    return few_label_rules.LabelledOnly(start.network)


def pseudo_label(start: Start) -> nn.Module:
    """Pseudo-labels."""
    return few_label_rules.PseudoLabel(start.network, start.setting["threshold"])


def mixmatch(start: Start) -> nn.Module:
    """MixMatch, whose weight rises over a quarter of the training."""
    return few_label_rules.MixMatch(start.network, start.generator, start.setting["weight"], max(1, start.steps // 4))


def of_two_weak_views(rule: few_label_rules.MixMatch, batch: Batch) -> Losses:
    """The loss of a rule that takes labelled images, their labels and two weak views."""
    return rule.loss(batch.x, batch.targets, batch.weak, batch.weak_again())


def fixmatch(start: Start) -> nn.Module:
    """FixMatch."""
    return few_label_rules.FixMatch(start.network, start.setting["threshold"])


def aligned_fixmatch(start: Start) -> nn.Module:
    """FixMatch with predictions made even over the classes."""
    align = DistributionAlignment(start.num_classes)
    return few_label_rules.FixMatch(start.network, start.setting["threshold"], align)


fashion_40 = FewLabels()
fashion_250 = FewLabels(labels=250)
mnist_40 = replace(fashion_40, dataset="mnist")
photographs_250 = FewLabels("cifar10", labels=250, photographs=True)
