"""A trained classifier meets another domain: with its training data, without them, or image by image on a stream."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data import load, usps_unlabelled
from trimtab.nets import Classifier
from trimtab.ops.averaging import Teacher
from trimtab.semisup.views import strong_view, weak_view
from trimtab.studies.engine.study import Budget, Curve, Metric, Result, Task, Trial
from trimtab.studies.tasks.few_labels import Batch, SemiSupervised, Start
from trimtab.studies.tools import adapting, shifts
from trimtab.studies.tools.adapting import Adaptation, Lesson, Predictor, Timed, in_eval
from trimtab.studies.tools.descent import descend, descent_step, shuffled
from trimtab.studies.tools.images import worth_halving
from trimtab.studies.tools.shifted_images import resized

Target = Literal["usps", "digits", "corrupted"]
Terms = Literal["together", "source-free", "stream"]
Shift = Callable[[Tensor, torch.Generator], Tensor]

TESTED: tuple[Shift, ...] = (
    partial(shifts.noise, strength=0.35),
    lambda x, generator: shifts.blur(x, 1.4),
    lambda x, generator: shifts.contrast(x, 0.25),
)
"""What a stream of corrupted images goes through, one after the other."""

TRIED: tuple[Shift, ...] = (
    partial(shifts.speckle, share=0.2),
    lambda x, generator: shifts.pixelate(x, 2),
    lambda x, generator: shifts.brighten(x, 0.3),
)
"""Corruptions of another kind, on which settings are tried."""


def turned(x: Tensor, generator: torch.Generator) -> Tensor:
    """A domain that no contestant is tested on: images turned by 25 degrees and blurred."""
    return shifts.blur(shifts.rotate(x, 25.0), 0.7)


@dataclass(frozen=True)
class Domains:
    """The images of a run.

    Attributes:
        source: training images and labels of the source domain.
        source_test: others of the same domain.
        target: what there is to adapt to; None where it comes as a stream.
        stream: labelled images of the target in order, on a stream, of several parts of equal length; else the test
            images of the target.
        num_classes: number of classes.
        parts: number of parts of a stream.
    """

    source: tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]
    source_test: tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]
    target: Float[Tensor, "m ..."] | None
    stream: tuple[Float[Tensor, "n ..."], Int[Tensor, " n"]]
    num_classes: int
    parts: int = 1


@dataclass(frozen=True)
class DomainAdaptation(Task[Adaptation]):
    """Adapt a small CNN, trained on one domain, to another of which no label is known.

    5,000 images at half of their resolution train the network, the same for every contestant on a seed. The target is
    scikit-learn's digits or USPS for a network trained on MNIST, of which a contestant sees unlabelled images, makes at
    most 200 steps of 64 of them, and is tested on others; or a stream of corrupted garments, 640 with noise, 640
    blurred and 640 of little contrast, that are predicted in batches of 64 as they arrive. Settings are chosen on
    held-out source images under changes that are not those of the test: turned and blurred images, or other
    corruptions; the least rate was added for everybody when most had chosen the least of four. No label of the target
    is seen before the test.

    Attributes:
        dataset: the source: "mnist", "fashion_mnist", or a file `.npz` of grey images; at the smoke budget digits.
        target: "usps", "digits", or "corrupted" images of the source's own test part; the smoke budget has only such.
        terms: "together" gives the source's training images with the target's, "source-free" the target's alone, and
            "stream" the source's, and the target's one batch after the other, to be predicted when they arrive.
        imbalance: how many times more images of the first class than of the last the contestant sees of the target;
            the tested ones are as they are. Not for USPS, whose images to adapt to have no label at all.
    """

    dataset: str = "mnist"
    target: Target = "usps"
    terms: Terms = "together"
    imbalance: float = 1.0

    name: ClassVar[str] = "domain-adaptation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "target_accuracy": Metric("target accuracy (%)", percent=True),
        "balanced_accuracy": Metric("mean accuracy of the target's classes (%)", percent=True),
        "source_accuracy": Metric("source accuracy afterwards (%)", percent=True),
        "seconds": Metric("time to adapt and predict (s)", best="min"),
    }
    accepts: ClassVar[type[Adaptation]] = Adaptation
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 5
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 8, "paper": 5}
    cost: ClassVar[float] = 2.0

    def __post_init__(self) -> None:
        if self.target not in get_args(Target) or self.terms not in get_args(Terms):
            raise ValueError(f"target and terms must be known, got {self.target!r} and {self.terms!r}")
        if (self.terms == "stream") != (self.target == "corrupted"):
            raise ValueError(f"terms must be 'stream' for corrupted images and for no others, got {self.terms!r}")
        if self.imbalance < 1 or (self.imbalance > 1 and self.target == "usps"):
            raise ValueError(f"imbalance must be at least 1, and 1 for 'usps', got {self.imbalance}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"with the source": with_source, "source-free": source_free, "stream": stream}

    @classmethod
    def references(cls) -> Mapping[str, Adaptation]:
        return {
            "source only": Adaptation(search={}),
            "batch statistics": Adaptation(adapt=adapting.batch_statistics, search={}),
            "Tent": Adaptation(adapt=adapting.entropy_minimisation),
            "SHOT-IM": Adaptation(adapt=adapting.information_maximisation),
            "pseudo-labels": Adaptation(adapt=adapting.pseudo_labels),
            "T3A": Adaptation(adapt=adapting.prototypes, search={"keep": (5, 20, 50, 100, 200)}),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        if budget == "smoke" and not self.dataset.endswith(".npz"):
            return ("digits",)
        return (self.dataset,) if self.target == "corrupted" or budget == "smoke" else (self.dataset, self.target)

    def domains(self, trial: Trial) -> Domains:
        """The images, as they are drawn for a run; while settings are tried, the target is another one."""
        whole = load(self.datasets(trial.budget)[0])
        train, held, test, rest = trial.pick(
            smoke=(500, 300, 300, 300), laptop=(5_000, 1_500, 1_000, 1_920), paper=(50_000, 9_000, 5_000, 5_000)
        )
        data = whole.subset(train + held, test + rest, generator=trial.generator())
        halve = worth_halving(data, trial)
        x_all, x_rest = (F.avg_pool2d(x, 2) if halve else x for x in (data.x_train, data.x_test))
        y_all, y_rest = data.y_train, data.y_test
        source = x_all[:train], y_all[:train]
        # A small set has fewer images than are asked for: it is then cut in two.
        test = min(test, len(y_rest) // 2)
        kept, others = (x_rest[:test], y_rest[:test]), (x_rest[test:], y_rest[test:])
        held_out = x_all[train:], y_all[train:]
        made = partial(self._made, trial=trial, source=source, source_test=kept, num_classes=data.num_classes)
        if self.terms == "stream":
            return made(held_out, TRIED) if trial.searching else made(others, TESTED)
        if trial.searching or trial.budget == "smoke":
            pool = held_out if trial.searching else others
            third = len(pool[1]) // 3
            changed = turned(pool[0], trial.generator(11)), pool[1]
            unlabelled, tested = (
                (changed[0][third:], changed[1][third:]),
                (changed[0][:third], changed[1][:third]),
            )
        else:
            unlabelled, tested = self._other_digits(trial, x_all.shape[-1])
        x = self._imbalanced(*unlabelled, data.num_classes, trial.generator(13)).to(trial.device)
        moved = [_moved(pair, trial.device) for pair in (source, kept, tested)]
        return Domains(moved[0], moved[1], x, moved[2], data.num_classes)

    def _made(
        self,
        pool: tuple[Tensor, Tensor],
        changes: Sequence[Shift],
        *,
        trial: Trial,
        source: tuple[Tensor, Tensor],
        source_test: tuple[Tensor, Tensor],
        num_classes: int,
    ) -> Domains:
        """A stream of changed images, as many under each change."""
        length = min(trial.pick(smoke=64, laptop=640, paper=1_600), len(pool[1]) // len(changes))
        draws, x, y = trial.generator(12), *pool
        parts = [change(x[k * length : (k + 1) * length], draws) for k, change in enumerate(changes)]
        ordered = torch.cat(parts), y[: len(changes) * length]
        moved = [_moved(pair, trial.device) for pair in (source, source_test, ordered)]
        return Domains(moved[0], moved[1], None, moved[2], num_classes, len(changes))

    def _other_digits(self, trial: Trial, side: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Images to adapt to, and others to test on, of the size of the source's."""
        data = load(self.target).subset(generator=trial.generator(14))
        if self.target == "digits":
            # Without the margin that MNIST has around its digits.
            inner = round(side * 20 / 28)
            margin = (side - inner) // 2
            pads = (margin, side - inner - margin) * 2
            x_train, x_test = (F.pad(resized(x, inner), pads).clamp(0, 1) for x in (data.x_train, data.x_test))
            return (x_train, data.y_train), (x_test, data.y_test)
        x = usps_unlabelled()
        x = x[torch.randperm(len(x), generator=trial.generator(15))[: trial.pick(smoke=1, laptop=3_000, paper=len(x))]]
        tested = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
        # Which digits they are is not known, and nobody asks.
        return (resized(x, side), torch.zeros(len(x), dtype=torch.int64)), (resized(tested[0], side), tested[1])

    def _imbalanced(self, x: Tensor, y: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
        """The images, thinned out from class to class."""
        if self.imbalance == 1:
            return x
        share = self.imbalance ** -(torch.arange(num_classes) / (num_classes - 1))
        return x[torch.rand(len(y), generator=generator) < share[y]]

    def network(self, trial: Trial, domains: Domains) -> Classifier:
        """The source network of a seed, the same for every contestant."""
        x, y = domains.source
        network = trial.seeded(lambda: source_network(tuple(x.shape[1:]), domains.num_classes))

        def build() -> dict[str, Tensor]:
            fit_source(network.to(trial.device), x, y, trial.pick(smoke=4, laptop=6, paper=20), trial.generator(16))
            return network.cpu().state_dict()

        network.load_state_dict(trial.cached(build, key=f"source {self.dataset} {trial.seed}"))
        return network.to(trial.device).eval()

    def run(self, trial: Trial, entrant: Adaptation) -> Result:
        domains = self.domains(trial)
        network = copy.deepcopy(self.network(trial, domains))
        lesson = Lesson(
            network,
            None if self.terms == "source-free" else domains.source,
            domains.target,
            domains.num_classes,
            trial.pick(smoke=8, laptop=200, paper=3_000),
            trial,
        )
        started = time.process_time()
        timed = Timed(trial.seeded(lambda: entrant.adapt(lesson), stream=7))
        timed.seconds = time.process_time() - started
        x, y = domains.stream
        right = (predicted(timed, x, lesson.streaming) == y).float()
        if trial.searching:
            return Result(score=right.mean().item())
        seconds = timed.seconds
        points = 10 if lesson.streaming and len(y) >= 10 * adapting.BATCH else 1
        curve = [part.mean().item() for part in right.tensor_split(points)]
        last = [float(sum(len(part) for part in right.tensor_split(points)[: k + 1])) for k in range(points)]
        ours, labels = domains.source_test
        return Result(
            {
                "target_accuracy": right.mean().item(),
                "balanced_accuracy": class_mean(right, y, domains.num_classes),
                "source_accuracy": (predicted(timed, ours, lesson.streaming) == labels).float().mean().item(),
                "seconds": seconds,
            },
            {"target_accuracy": Curve(last, curve, "image of the stream")} if points > 1 else {},
        )


def needs_source(task: DomainAdaptation) -> str:
    """Why what learns from the source cannot enter a variant."""
    return "it needs the source's training images" if task.terms == "source-free" else ""


def needs_target(task: DomainAdaptation) -> str:
    """Why what learns from many images of the target, before it is tested, cannot enter a variant."""
    return "it needs the target's images at once" if task.terms == "stream" else ""


def needs_both(task: DomainAdaptation) -> str:
    """Why what learns from both together cannot enter a variant."""
    return needs_source(task) or needs_target(task)


def from_few_labels(lesson: Lesson, *, entrant: SemiSupervised) -> Predictor:
    """A semi-supervised rule with the source's labelled images and views of the target's; the average of its weights
    predicts.

    As on few labels, but for Adam, which everyone has here, at the setting's rate, and 64 labelled images to a batch.
    """
    if lesson.source is None or lesson.target is None:
        raise ValueError("lesson must have source and target, got one without the other")
    (x, y), trial = lesson.source, lesson.trial
    network = lesson.network.requires_grad_(True)
    start = Start(network, y.cpu(), lesson.num_classes, lesson.steps, trial.setting, trial.generator(62))
    rule = entrant.rule(start).to(x.device)
    average = Teacher(rule, decay=0.99, warmup=True)
    optimizer = torch.optim.Adam([p for p in rule.parameters() if p.requires_grad], lr=lesson.lr)
    order, draws, more = (trial.generator(stream) for stream in (63, 64, 65))
    for plain, _ in lesson.target_batches():
        index = torch.randint(len(y), (min(adapting.BATCH, len(y)),), generator=order).to(y.device)
        batch = Batch(
            weak_view(x[index], generator=draws),
            y[index],
            index,
            weak_view(plain, generator=draws),
            strong_view(plain, generator=draws),
            partial(weak_view, plain, generator=more),
        )
        rule.train()
        descent_step(optimizer, entrant.loss(rule, batch)["total"])
        if callable(update := getattr(rule, "update", None)):
            update()
        average.update(rule)
    return in_eval(average.model)


def predicted(predictor: Predictor, x: Float[Tensor, "n ..."], streaming: bool) -> Int[Tensor, " n"]:
    """Classes of images, which on a stream come in batches."""
    parts = x.split(adapting.BATCH) if streaming else (x,)
    return torch.cat([predictor(part).argmax(1) for part in parts])


def class_mean(right: Float[Tensor, " n"], y: Int[Tensor, " n"], num_classes: int) -> float:
    """The mean of the classes' accuracies, of those that are there."""
    count = torch.bincount(y, minlength=num_classes)
    total = torch.zeros(num_classes, device=y.device).index_add(0, y, right)
    return (total / count.clamp_min(1))[count > 0].mean().item()


def source_network(shape: tuple[int, ...], num_classes: int) -> Classifier:
    """Two strided convolutions and a bottleneck of 64 features, all batch-normalised, and a linear head."""
    channels, height, width = shape
    grid = -(-height // 4) * -(-width // 4)
    features = nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * grid, 64, bias=False),
        nn.BatchNorm1d(64),
    )
    return Classifier(features, 64, num_classes)


def fit_source(network: nn.Module, x: Tensor, y: Tensor, epochs: int, generator: torch.Generator) -> None:
    """Adam with a rate that falls to nothing, on cross-entropy with smoothed labels, as source models are trained."""
    steps = epochs * (len(y) // adapting.BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    loss = lambda index: F.cross_entropy(network(x[index]), y[index], label_smoothing=0.1)
    whole = (index for index in shuffled(len(y), adapting.BATCH, epochs, generator) if len(index) == adapting.BATCH)
    network.train()
    descend(optimizer, loss, whole, anneal=steps)


def _moved(pair: tuple[Tensor, Tensor], device: str) -> tuple[Tensor, Tensor]:
    return pair[0].to(device), pair[1].to(device)


with_source = DomainAdaptation()
source_free = DomainAdaptation(target="digits", terms="source-free")
stream = DomainAdaptation(dataset="fashion_mnist", target="corrupted", terms="stream")
