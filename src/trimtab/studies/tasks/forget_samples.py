"""Networks are to forget some of their training samples: how near they come to networks that never saw them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data import load
from trimtab.nets import mlp
from trimtab.ops.averaging import frozen_copy
from trimtab.ops.tempered_kl import tempered_kl
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Setting, Task, Trial
from trimtab.studies.tools import descent
from trimtab.studies.tools.network_stack import BATCH, NetworkStack, stacked_cross_entropy, train_on_subsets
from trimtab.unlearning import klom, margins, membership_auc, relearning_steps

Which = Literal["random", "cluster"]
Answer = Callable[[Tensor], Tensor]
"""Maps samples (batch, features) to the logits of all networks, (batch, models, classes)."""


@dataclass(frozen=True)
class Samples:
    """Training samples and unseen ones, flat, the same in all runs.

    Attributes:
        x, y: training samples.
        held, held_y: unseen ones that settings are chosen by.
        test, test_y: unseen ones that results are of.
        classes: number of classes.
    """

    x: Tensor
    y: Tensor
    held: Tensor
    held_y: Tensor
    test: Tensor
    test_y: Tensor
    classes: int

    @property
    def inputs(self) -> Tensor:
        """All samples, those trained on first."""
        return torch.cat([self.x, self.held, self.test])

    def build(self) -> torch.nn.Module:
        """A network of one hidden layer."""
        return mlp(self.x.shape[1], (32,), self.classes)


@dataclass(frozen=True)
class Lesson:
    """What a way of forgetting has at hand.

    Attributes:
        samples: all of them; labels of unseen ones are nobody's to look at.
        forget: positions of the training samples to forget.
        trained: networks that were trained on all training samples, one of each for every network to be judged.
        steps_of_training: how many they took, of 32 samples each.
        allowance: samples that may go through a network, each, with or without gradients.
        setting: what the search chose, the learning rate `lr` among it.
        trial: the run.
        draws: of everything.
        prepared: what the entrant has prepared.
    """

    samples: Samples
    forget: Tensor
    trained: NetworkStack
    steps_of_training: int
    allowance: int
    setting: Setting
    trial: Trial
    draws: torch.Generator = field(compare=False)
    prepared: Any = None

    @property
    def retained(self) -> Tensor:
        """Positions of the training samples that stay."""
        left = torch.ones(len(self.samples.x), dtype=torch.bool)
        left[self.forget] = False
        return left.nonzero()[:, 0]

    def student(self) -> NetworkStack:
        """A copy of the trained networks, to be trained."""
        return copy.deepcopy(self.trained).requires_grad_(True)

    def fresh(self, models: int, generator: torch.Generator) -> NetworkStack:
        """Networks that were not trained."""
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            return NetworkStack(self.samples.build, models)

    def train(self, stack: NetworkStack, masks: Tensor, generator: torch.Generator) -> NetworkStack:
        """The training of the original networks, on the samples in the masks."""
        x, y, steps = self.samples.x, self.samples.y, self.steps_of_training
        return train_on_subsets(stack, masks, x, y, steps=steps, lr=TRAINING_RATE, generator=generator)

    def steps(self, samples: int) -> int:
        """How many steps the allowance pays for, where each puts so many samples through a network."""
        return max(1, self.allowance // samples)

    def some_retained(self) -> Tensor:
        """A batch of positions of samples that stay."""
        return self.retained[torch.randint(len(self.retained), (BATCH,), generator=self.draws)]


TRAINING_RATE = 0.01
Forget = Callable[[Lesson], Answer]


@dataclass(frozen=True, kw_only=True)
class SampleForgetting(Entrant):
    """What a way of forgetting brings.

    Attributes:
        forget: makes networks that have forgotten, or what answers in their place, within the lesson's allowance.
        prepare: makes what can be made before it is known what is to be forgotten, such as a datamodel, from the
            samples alone; it costs no part of the allowance and is not timed.
    """

    forget: Forget
    prepare: Callable[[Lesson], Any] | None = None


def descend(lesson: Lesson, loss: Callable[[NetworkStack, Tensor, int], Tensor], steps: int) -> NetworkStack:
    """Adam on a loss of networks, positions of retained samples and the step, from the trained networks."""
    stack = lesson.student()
    optimizer = torch.optim.Adam(stack.parameters(), lr=float(lesson.setting["lr"]))
    descent.descend(optimizer, lambda step: loss(stack, lesson.some_retained(), step), range(steps))
    return stack


def error(lesson: Lesson, stack: NetworkStack, rows: Tensor) -> Tensor:
    """The loss that networks are trained with."""
    return stacked_cross_entropy(stack(lesson.samples.x[rows]), lesson.samples.y[rows])


def nothing(lesson: Lesson) -> NetworkStack:
    """The trained networks."""
    return lesson.trained


def retraining(lesson: Lesson) -> NetworkStack:
    """Networks from other starts, trained without the samples: what two sets that mean the same have between them."""
    draws, models = lesson.trial.generator(40), lesson.trained.models
    return lesson.train(lesson.fresh(models, draws), without(lesson.forget, models, len(lesson.samples.x)), draws)


def without(forget: Tensor, models: int, count: int) -> Tensor:
    """Masks of all samples but those."""
    return torch.ones(models, count, dtype=torch.bool).index_fill(1, forget, False)


def fine_tuning(lesson: Lesson) -> NetworkStack:
    """More training, on retained samples."""
    return descend(lesson, lambda stack, kept, step: error(lesson, stack, kept), lesson.steps(BATCH))


def ascent(lesson: Lesson) -> NetworkStack:
    """Against the gradient of the samples' loss, an eighth of the steps of fine-tuning: more only destroys."""
    steps = max(1, lesson.steps(BATCH) // 8)
    return descend(lesson, lambda stack, kept, step: -error(lesson, stack, lesson.forget), steps)


def ascent_and_descent(lesson: Lesson) -> NetworkStack:
    """The same ascent, each step of which descends the loss of retained samples too, and then descent alone."""
    steps, climbing = lesson.steps(BATCH + len(lesson.forget)), max(1, lesson.steps(BATCH) // 8)

    def loss(stack: NetworkStack, kept: Tensor, step: int) -> Tensor:
        value = error(lesson, stack, kept)
        return value - error(lesson, stack, lesson.forget) if step < climbing else value

    return descend(lesson, loss, steps)


def scrub(lesson: Lesson) -> NetworkStack:
    """Away from the trained networks on the samples, in turn with staying near them on retained ones.

    With its authors' weights for small sets; a step away in every six of the first two thirds.
    """
    teacher, x, y = frozen_copy(lesson.trained), lesson.samples.x, lesson.samples.y
    steps = lesson.steps(2 * BATCH)

    def loss(stack: NetworkStack, kept: Tensor, step: int) -> Tensor:
        away = step % 6 == 0 and step < 2 * steps // 3
        rows = lesson.forget if away else kept
        own, other = stack(x[rows]), teacher(x[rows])
        apart = tempered_kl(own.flatten(0, 1), other.flatten(0, 1), 4.0).sum() / len(rows)
        return -apart if away else 0.99 * stacked_cross_entropy(own, y[rows]) + 0.001 * apart

    return descend(lesson, loss, steps)


@dataclass(frozen=True)
class ForgetSamples(Task[SampleForgetting]):
    """Make small networks forget a fiftieth of their training samples, and compare them with retrained ones.

    400 images at half of their resolution, one hidden layer of 32 units, 80 networks of each kind, from their own
    starts. The samples are the same in all runs; what is to be forgotten, and all networks, change with the seed. To
    forget, every network may put 60 % of the samples through itself that its training took, with or without gradients;
    what a method has prepared before anything was to be forgotten, such as a datamodel, is not counted. Settings are
    chosen by the KL divergence from retrained networks, of another set to forget, with other unseen samples; a rate at
    either end was added for everybody when most had chosen an end of the first four.

    Attributes:
        dataset: "fashion_mnist", "mnist", "digits", or a file `.npz` with `x_train`, `y_train`, `x_test` and `y_test`;
            at the smoke budget digits.
        which: "random" samples, or a "cluster" of one class: those nearest to one of them.
    """

    dataset: str = "fashion_mnist"
    which: Which = "random"

    name: ClassVar[str] = "forget-samples"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "klom": Metric("KL divergence of margins from retrained networks', mean of the three sets (nats)", best="min"),
        "klom_forget": Metric("KL divergence of margins, forget set (nats)", best="min"),
        "klom_retain": Metric("KL divergence of margins, retained samples (nats)", best="min"),
        "klom_validation": Metric("KL divergence of margins, unseen samples (nats)", best="min"),
        "membership": Metric("membership AUC of the forget set, distance to retrained networks'", best="min"),
        "membership_auc": Metric("membership AUC of the forget set", best=None),
        "accuracy_forget": Metric("accuracy on the forget set (%)", best=None, percent=True),
        "accuracy_retain": Metric("accuracy on retained samples (%)", percent=True),
        "accuracy_validation": Metric("accuracy on unseen samples (%)", percent=True),
        "relearning": Metric("steps of training on the forget set until its loss is what it was", best=None),
        "seconds": Metric("time of forgetting, all networks (s)", best="min"),
    }
    accepts: ClassVar[type[SampleForgetting]] = SampleForgetting
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 6
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 10}
    cost: ClassVar[float] = 5.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"random clothes": random_clothes, "a cluster of clothes": cluster_of_clothes}

    @classmethod
    def references(cls) -> Mapping[str, SampleForgetting]:
        return {
            "original": SampleForgetting(forget=nothing, search={}),
            "retrained": SampleForgetting(forget=retraining, search={}),
            "fine-tuning on retained": SampleForgetting(forget=fine_tuning),
            "gradient ascent": SampleForgetting(forget=ascent),
            "ascent and descent": SampleForgetting(forget=ascent_and_descent),
            "SCRUB": SampleForgetting(forget=scrub),
        }

    def samples(self, trial: Trial) -> Samples:
        """The same in every run, so that what was prepared serves all."""
        whole = load(self.datasets(trial.budget)[0])
        seen, held, test = trial.pick(smoke=(60, 30, 30), laptop=(400, 200, 200), paper=(5000, 1000, 1000))
        data = whole.subset(seen + held, test, generator=torch.Generator().manual_seed(0))
        flat = [x if x.shape[-1] < 28 else F.avg_pool2d(x, 2) for x in (data.x_train, data.x_test)]
        x, unseen = (part.flatten(1) for part in flat)
        y = data.y_train
        return Samples(x[:seen], y[:seen], x[seen:], y[seen:], unseen, data.y_test, data.num_classes)

    def lesson(self, trial: Trial) -> Lesson:
        """What is to be forgotten, which the seed says, and the trained networks."""
        samples, draws = self.samples(trial), trial.generator(50)
        count = max(2, len(samples.x) // 50)
        forget = torch.randperm(len(samples.x), generator=draws)[:count]
        if self.which == "cluster":
            members = (samples.y == trial.seed % samples.classes).nonzero()[:, 0]
            centre = samples.x[members[torch.randint(len(members), (1,), generator=draws)]]
            forget = members[torch.cdist(centre, samples.x[members])[0].argsort()[:count]]
        models, steps = trial.pick(smoke=(6, 10), laptop=(80, 300), paper=(200, 3000))
        blank = trial.seeded(lambda: NetworkStack(samples.build, models))
        lesson = Lesson(samples, forget, blank, steps, int(0.6 * steps * BATCH), trial.setting, trial, draws)

        def train() -> dict[str, Tensor]:
            own = trial.generator(10)
            masks = torch.ones(models, len(samples.x), dtype=torch.bool)
            return lesson.train(lesson.fresh(models, own), masks, own).state_dict()

        blank.load_state_dict(trial.cached(train, key=f"networks of {self.dataset} samples, seed {trial.seed}"))
        blank.requires_grad_(False)
        return lesson

    def oracles(self, lesson: Lesson) -> NetworkStack:
        """Networks that were trained without what is to be forgotten, made once in a run for all."""
        trial, models = lesson.trial, lesson.trained.models

        def train() -> dict[str, Tensor]:
            own, masks = trial.generator(20), without(lesson.forget, models, len(lesson.samples.x))
            return lesson.train(lesson.fresh(models, own), masks, own).state_dict()

        stack = copy.deepcopy(lesson.trained)
        key = f"networks of {self.dataset} samples, seed {trial.seed}, {self.which} ones left out"
        stack.load_state_dict(trial.cached(train, key=key))
        return stack

    def run(self, trial: Trial, entrant: SampleForgetting) -> Result:
        lesson = self.lesson(trial)
        oracles = self.oracles(lesson)
        if entrant.prepare is not None:
            lesson = replace(lesson, prepared=entrant.prepare(lesson))
        started = time.perf_counter()
        answer = entrant.forget(lesson)
        seconds = time.perf_counter() - started
        found = judged(lesson, answer, oracles)
        if trial.searching:
            return Result(score=-found["klom"])
        if isinstance(answer, NetworkStack):  # an answer without networks has nothing that could be trained
            found["relearning"] = relearned(lesson, answer)
        return Result({**found, "seconds": seconds})


@torch.no_grad()
def judged(lesson: Lesson, answer: Answer, oracles: NetworkStack) -> dict[str, float]:
    """Divergences of margins from retrained networks', what losses betray, and accuracies.

    Unseen samples are those held out while settings are tried, and those of the test otherwise.
    """
    given, searching = lesson.samples, lesson.trial.searching
    unseen, unseen_y = (given.held, given.held_y) if searching else (given.test, given.test_y)
    points, truth = torch.cat([given.x, unseen]), torch.cat([given.y, unseen_y])
    logits, wanted = answer(points), oracles(points)
    models = truth[:, None].expand(logits.shape[:2])
    apart = klom(margins(logits, models).T, margins(wanted, models).T)
    right = (logits.argmax(-1) == models).double().mean(1)
    last = torch.arange(len(given.x), len(points))
    sets = {"forget": lesson.forget, "retain": lesson.retained, "validation": last}
    found = {f"klom_{name}": float(apart[rows].mean()) for name, rows in sets.items()}
    betrayed = []
    for outputs in (logits, wanted):
        losses = F.cross_entropy(outputs.transpose(1, 2), models, reduction="none").T
        each = [membership_auc(loss[lesson.forget], loss[last]) for loss in losses]
        betrayed.append(sum(each) / len(each))
    return {
        "klom": sum(found.values()) / len(found),
        **found,
        "membership": abs(betrayed[0] - betrayed[1]),
        "membership_auc": betrayed[0],
        **{f"accuracy_{name}": float(right[rows].mean()) for name, rows in sets.items()},
    }


def relearned(lesson: Lesson, stack: NetworkStack) -> int:
    """Steps of training on what was forgotten, until its loss is what it was before."""
    student = copy.deepcopy(stack).requires_grad_(True)
    with torch.no_grad():
        wanted = error(lesson, lesson.trained, lesson.forget)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)

    @torch.no_grad()
    def known_again() -> bool:
        return bool(error(lesson, student, lesson.forget) <= wanted)

    def step() -> None:
        descent.descent_step(optimizer, error(lesson, student, lesson.forget))

    return relearning_steps(step, known_again, limit=lesson.trial.pick(smoke=3, laptop=100, paper=500))


random_clothes = ForgetSamples()
cluster_of_clothes = ForgetSamples(which="cluster")
