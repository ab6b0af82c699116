"""Discovery of new classes among unlabelled images, while some classes are known from labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.data import load
from trimtab.semisup.legogcd import LegoGCD, gcd_accuracy
from trimtab.studies.engine.study import Budget, Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.discovery import known_kmeans, pretrained, random_view
from trimtab.studies.tools.images import worth_halving


@dataclass(frozen=True)
class Found:
    """What discovery starts from.

    Attributes:
        x: frozen activations of all images, as they are.
        views: of several views of each.
        targets: classes of labelled images; -1 for the others.
        labelled: which images are labelled.
        features: a layer from activations to features, as it was trained before; a method may train it on.
        feature_dim: width of the features.
        num_known: classes that are labelled; they come first.
        num_classes: all classes, whose number is given.
        epochs: length of the training.
        seed: of the run.
    """

    x: Float[Tensor, "n activations"]
    views: Float[Tensor, "views n activations"]
    targets: Int[Tensor, " n"]
    labelled: Bool[Tensor, " n"]
    features: nn.Module
    feature_dim: int
    num_known: int
    num_classes: int
    epochs: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Discovery(Entrant):
    """What a contestant brings: a rule to train, or a way to assign all images at once.

    Attributes:
        rule: makes a module with `forward(x)`, scores of the classes, and
            `loss(first, second, targets, labelled)` of two views, a dictionary with "total"; `set_epoch(epoch)` is
            called if it exists.
        assign: gives every image a cluster.
    """

    rule: Callable[[Found], nn.Module] | None = None
    assign: Callable[[Found], Tensor] | None = None

    def __post_init__(self) -> None:
        if (self.rule is None) == (self.assign is None):
            raise ValueError("rule must be given, or else assign, got both or neither")


@dataclass(frozen=True)
class CategoryDiscovery(Task[Discovery]):
    """Find ten classes among images, half of whose first five classes are labelled, and name every unlabelled image.

    2,000 images at half of their resolution at the laptop budget. A small CNN is trained first, without regard to the
    contestants, by contrast of views and of labels; its convolutions then stay as they are, and contestants train on
    from its last layer, on eight views of each image, for 20 epochs of Adam; half of a batch is labelled, as with the
    authors of SimGCD. As the field does, the images judged are the unlabelled ones trained on, with one match of
    clusters and classes for all of them, and the number of classes is given. Those that train choose between two rates
    by what is known of known classes: the accuracy on a fifth of the labelled images, whose labels are then hidden.

    Attributes:
        dataset: "mnist", "fashion_mnist", "digits", or a file `.npz` of ten classes; at the smoke budget digits.
        num_known: classes that are labelled.
    """

    dataset: str = "mnist"
    num_known: int = 5

    name: ClassVar[str] = "category-discovery"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "all": Metric("accuracy on all unlabelled images (%)", percent=True),
        "known": Metric("accuracy on known classes (%)", percent=True),
        "novel": Metric("accuracy on novel classes (%)", percent=True),
        "seconds": Metric("training time (s)", best="min"),
    }
    accepts: ClassVar[type[Discovery]] = Discovery
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 2
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-3, 3e-3)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 10}
    cost: ClassVar[float] = 3.0

    def __post_init__(self) -> None:
        if self.num_known < 1:
            raise ValueError(f"num_known must be at least 1, got {self.num_known}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"digits": digits, "clothes": clothes}

    @classmethod
    def references(cls) -> Mapping[str, Discovery]:
        return {
            "SimGCD": Discovery(rule=simgcd),
            "k-means": Discovery(assign=kmeans, search={}),
            "semi-supervised k-means": Discovery(assign=semi_supervised_kmeans, search={}),
        }

    def may_be_labelled(self, truth: Int[Tensor, " n"], trial: Trial) -> Bool[Tensor, " n"]:
        """The half of the known classes' images whose labels a contestant may use, to learn or to choose by."""
        half = torch.rand(len(truth), generator=trial.generator(1)).to(truth.device) < 0.5
        return half & (truth < self.num_known)

    def found(self, trial: Trial) -> tuple[Found, Tensor]:
        """What the trial starts from, and the true classes."""
        count = trial.pick(smoke=300, laptop=2_000, paper=20_000)
        data = load(self.datasets(trial.budget)[0]).subset(count, generator=trial.generator())
        x, truth = data.x_train.to(trial.device), data.y_train.to(trial.device)
        if worth_halving(data, trial):
            x = F.avg_pool2d(x, 2)
        labelled = self.may_be_labelled(truth, trial)
        if trial.searching:
            labelled &= torch.rand(len(truth), generator=trial.generator(5)).to(x.device) >= 0.2
        shown = torch.where(labelled, truth, -1)
        features = pretrained(
            x,
            shown,
            labelled,
            trial,
            width=trial.pick(smoke=4, laptop=8, paper=32),
            steps=trial.pick(smoke=3, laptop=150, paper=20_000),
            key=f"discovery {self.dataset} {self.num_known} of {count}{' searching' if trial.searching else ''}",
        )
        trunk, last = features[:-2], features[-2:]
        draws = trial.generator(2)
        with torch.no_grad():
            views = torch.stack([trunk(random_view(x, draws)) for _ in range(trial.pick(smoke=2, laptop=8, paper=32))])
            plain = trunk(x)
            width = last(plain[:1]).shape[1]
        epochs = trial.pick(smoke=2, laptop=20, paper=200)
        start = Found(plain, views, shown, labelled, last, width, self.num_known, data.num_classes, epochs, trial.seed)
        return start, truth

    def run(self, trial: Trial, entrant: Discovery) -> Result:
        start, truth = self.found(trial)
        judged = ~start.labelled
        shown: list[float] = []
        reached: list[float] = []
        seconds = 0.0
        if entrant.rule is not None:
            make = partial(entrant.rule, start)
            rule = trial.seeded(make, 4).to(trial.device)
            for epoch, spent in enumerate(train(rule, start, trial)):
                seconds += spent
                if (start.epochs - 1 - epoch) % max(1, start.epochs // 6) == 0:
                    with torch.no_grad():
                        guess = rule.eval()(start.x[judged]).argmax(1)
                    shown.append(float(epoch + 1))
                    reached.append(gcd_accuracy(truth[judged], guess, truth[judged] < self.num_known).known)
                trial.report((epoch + 1) / start.epochs)
            with torch.no_grad():
                predicted = rule.eval()(start.x).argmax(1)
        elif entrant.assign is not None:
            began = time.process_time()
            predicted = entrant.assign(start)
            seconds = time.process_time() - began
        if trial.searching:
            hidden = judged & self.may_be_labelled(truth, trial)
            return Result(score=(predicted == truth)[hidden].float().mean().item())
        score = gcd_accuracy(truth[judged], predicted[judged], truth[judged] < self.num_known)
        return Result(
            {"all": score.all, "known": score.known, "novel": score.novel, "seconds": seconds},
            {"known": Curve(shown, reached)} if shown else {},
        )


def train(rule: Any, start: Found, trial: Trial, batch_size: int = 128) -> Iterator[float]:
    """Trains a rule on two random views of each image a step; yields the seconds of each epoch."""
    optimizer = torch.optim.Adam(rule.parameters(), lr=float(trial.setting.get("lr", 3e-3)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, start.epochs)
    draws, count = trial.generator(3), len(start.targets)
    chances = balanced(start.labelled)
    for epoch in range(start.epochs):
        began = time.process_time()
        rule.train()
        if callable(found := getattr(rule, "set_epoch", None)):
            found(epoch)
        order = torch.multinomial(chances, count, replacement=True, generator=draws)
        for index in order[: count // batch_size * batch_size].view(-1, batch_size).to(start.targets.device):
            which = torch.rand(len(start.views), batch_size, generator=draws).topk(2, dim=0).indices
            first, second = (start.views[row.to(index.device), index] for row in which)
            descent_step(optimizer, rule.loss(first, second, start.targets[index], start.labelled[index])["total"])
        schedule.step()
        yield time.process_time() - began


def balanced(labelled: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Chances of the images to be drawn, with which half of those drawn are labelled."""
    labelled = labelled.cpu()
    count = labelled.sum().clamp(1, max(1, len(labelled) - 1))
    return torch.where(labelled, 0.5 / count, 0.5 / (len(labelled) - count))


def classifier(start: Found, **options: Any) -> nn.Module:
    """A classifier of cosines on the pre-trained layer, with sizes that suit it; options are LegoGCD's."""
    warmup = max(1, start.epochs * 30 // 200)
    sizes = {"hidden": 128, "projection": 32, "warmup": warmup}
    return LegoGCD(start.features, start.feature_dim, start.num_known, start.num_classes, **{**sizes, **options})


def simgcd(start: Found) -> nn.Module:
    """SimGCD (Wen et al., ICCV 2023)."""
    return classifier(start, ler=0.0, dkl=0.0)


@torch.no_grad()
def lengths_one(start: Found) -> Tensor:
    """The pre-trained features of all images, of length one."""
    return F.normalize(start.features(start.x), dim=1)


def kmeans(start: Found) -> Tensor:
    """k-means, which knows no labels."""
    from sklearn.cluster import KMeans

    fitted = KMeans(start.num_classes, n_init=10, random_state=start.seed).fit(lengths_one(start).cpu().numpy())
    return torch.from_numpy(fitted.labels_).long().to(start.x.device)


def semi_supervised_kmeans(start: Found) -> Tensor:
    """k-means in which labelled images stay with their class."""
    return known_kmeans(lengths_one(start), start.targets, start.labelled, start.num_classes, start.seed)


digits = CategoryDiscovery()
clothes = replace(digits, dataset="fashion_mnist")
