"""A diffusion model forgets a digit: whether it is gone, stays gone under attack, and what is left of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.data import load
from trimtab.ops.averaging import frozen_copy
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Setting, Task, Trial
from trimtab.studies.tools import descent
from trimtab.studies.tools.concept_diffusion import (
    ALPHAS_CUMPROD,
    SYNONYMS,
    Batch,
    Loss,
    PromptedDenoiser,
    World,
    anchor_matching,
    forgotten,
    generate,
    kept_accuracy,
    negative_guidance,
    noisy,
    prompts,
    retrained,
    styled,
)
from trimtab.studies.tools.sample_quality import frechet_distance
from trimtab.unlearning import attack_success_rate, relearning_steps, search_tokens

BATCH = 32


@dataclass(frozen=True)
class Lesson:
    """What a way of forgetting has at hand: the original model, images that it made, and an allowance.

    Attributes:
        world: the original model, the digit to forget and the anchor to make in its place.
        setting: what the search chose, the learning rate `lr` among it.
        anchors: images and prompts of the anchor.
        targets: of the digit, by words that may be told of; the prompts are those of the anchors but for the word.
        others: of the digits that stay, by all words.
        allowance: batches of 32 images that may go through a diffusion model, whether gradients are taken or not.
        draws: of everything.
    """

    world: World
    setting: Setting
    anchors: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    others: tuple[Tensor, Tensor]
    allowance: int
    draws: torch.Generator = field(compare=False)

    @classmethod
    def of(cls, trial: Trial, world: World) -> Lesson:
        """Made of the original model alone, as no training data are at hand."""
        draws, counts = trial.generator(50), trial.pick(smoke=(16, 32), laptop=(192, 576), paper=(2000, 6000))
        target = prompts(torch.full((counts[0],), world.digit), (0, 1), draws)
        anchor = torch.cat([target[:, :1] + (world.anchor - world.digit) * SYNONYMS, target[:, 1:]], 1)
        other = prompts(world.others(counts[1], draws), tuple(range(SYNONYMS)), draws)
        anchors, targets, others = ((generate(world.model, asked, draws), asked) for asked in (anchor, target, other))
        allowance = trial.pick(smoke=12, laptop=640, paper=8000)
        return cls(world, trial.setting, anchors, targets, others, allowance, draws)

    def student(self) -> PromptedDenoiser:
        """A copy of the original model, of which the weights of attention are to be trained, as all do."""
        model = frozen_copy(self.world.model)
        model.attention.requires_grad_(True)
        return model

    def steps(self, batches: float, share: float = 1.0) -> int:
        """How many steps a share of the allowance pays for, where each puts so many batches through a model."""
        return max(1, int(share * self.allowance / batches))

    def batch(self) -> Batch:
        """Images and prompts of a step."""
        (anchor_x, anchor), (target_x, target), (other_x, other) = self.anchors, self.targets, self.others
        one = torch.randint(len(target), (BATCH,), generator=self.draws)
        two = torch.randint(len(other), (BATCH,), generator=self.draws)
        return Batch(anchor_x[one], anchor[one], target[one], target_x[one], other_x[two], other[two])


Forget = Callable[[Lesson], PromptedDenoiser]
BatchLoss = Callable[[PromptedDenoiser, Batch], Tensor]


@dataclass(frozen=True, kw_only=True)
class Forgetting(Entrant):
    """What a way of forgetting brings.

    Attributes:
        forget: makes a model that has forgotten the lesson's digit, within its allowance.
        from_data: whether it is trained from nothing on data, and costs no part of the allowance: a bound.
    """

    forget: Forget
    from_data: bool = False


def descend(lesson: Lesson, loss: BatchLoss, steps: int, model: PromptedDenoiser | None = None) -> PromptedDenoiser:
    """Adam on a loss of batches, from the original model or another one."""
    model = lesson.student() if model is None else model
    optimizer = torch.optim.Adam(model.attention.parameters(), lr=float(lesson.setting["lr"]))
    descent.descend(optimizer, lambda batch: loss(model, batch), (lesson.batch() for _ in range(steps)))
    return model


def noise_error(model: PromptedDenoiser, x: Tensor, prompt: Tensor, draws: torch.Generator) -> Tensor:
    """The loss that diffusion models are trained with."""
    x_t, t, noise = noisy(x, draws)
    return F.mse_loss(model(x_t, t, prompt), noise)


def nothing(lesson: Lesson) -> PromptedDenoiser:
    """The original model."""
    return lesson.world.model


def trained_without(lesson: Lesson) -> PromptedDenoiser:
    """A model that never saw the digit or its words."""
    return retrained(lesson.world)


def fine_tuning(lesson: Lesson) -> PromptedDenoiser:
    """More training, on the other digits alone."""
    return descend(lesson, lambda model, b: noise_error(model, b.kept_x, b.kept, lesson.draws), lesson.steps(1))


def ascent(lesson: Lesson) -> PromptedDenoiser:
    """Against the gradient of the training loss on the digit."""
    return descend(lesson, lambda model, b: -noise_error(model, b.target_x, b.target, lesson.draws), lesson.steps(1))


def by_targets(lesson: Lesson, *, loss: Loss, batches: int) -> PromptedDenoiser:
    """Towards what the original model says under other prompts."""
    return descend(lesson, lambda model, b: loss(model, lesson.world, b, lesson.draws), lesson.steps(batches))


@dataclass(frozen=True)
class ForgetClass(Task[Forgetting]):
    """Make a small diffusion model, asked for digits by words, forget one of them.

    The original model is the same in all runs, the digit changes with the seed. Contestants see images of the model's
    own alone, are told of two of the digit's four words, train the weights of attention, and may put 640 batches of 32
    images through a diffusion model, with or without gradients. They choose among four settings by the images that
    are asked for with the words told of and with the other digits': the sum of the shares without the digit and right.
    Nobody is attacked while settings are tried.

    Then all face the same attack, the token search of UnlearnDiffAtk: two tokens before a prompt of a word told of,
    four noise levels, 20 iterations at each, a look at what is made after each level. Its images, its noise and its
    seeds are the same for all, and not those of any training. A classifier judges all images. The model that was
    retrained without the digit is what forgetting is to come near, and what comes back from it is the judge's error.
    """

    name: ClassVar[str] = "forget-class"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "balance": Metric("gone under attack and others right, mean (%)", percent=True),
        "gone": Metric("share of images without the digit, words told of (%)", percent=True),
        "unseen": Metric("share of images without the digit, words not told of (%)", percent=True),
        "returned": Metric("share of token searches in which the digit came back (%)", best="min", percent=True),
        "kept": Metric("share of other digits' images that show them (%)", percent=True),
        "frechet": Metric("Frechet distance of other digits", best="min"),
        "relearning": Metric("steps of training on the digit until half of its images show it again", best=None),
        "batches": Metric("batches through a diffusion model", best="min"),
        "seconds": Metric("time of forgetting (s)", best="min"),
    }
    accepts: ClassVar[type[Forgetting]] = Forgetting
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (5e-5, 1e-4, 2e-4, 4e-4)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 10}
    cost: ClassVar[float] = 12.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"prompted digits": prompted_digits}

    @classmethod
    def references(cls) -> Mapping[str, Forgetting]:
        return {
            "original": Forgetting(forget=nothing, search={}),
            "retrained": Forgetting(forget=trained_without, from_data=True, search={}),
            "fine-tuning on others": Forgetting(forget=fine_tuning, search={"lr": (3e-4, 1e-3, 3e-3, 1e-2)}),
            "gradient ascent": Forgetting(forget=ascent, search={"lr": (1e-5, 1e-4, 3e-4, 1e-3)}),
            "anchor matching": Forgetting(forget=partial(by_targets, loss=anchor_matching, batches=2)),
            "ESD": Forgetting(forget=partial(by_targets, loss=negative_guidance, batches=3)),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return ("digits",)

    def run(self, trial: Trial, entrant: Forgetting) -> Result:
        world = World.of(trial)
        lesson = Lesson.of(trial, world)
        started = time.perf_counter()
        with counted_images() as passed:
            model = frozen_copy(entrant.forget(lesson))
        seconds = time.perf_counter() - started
        if trial.searching:
            gone = forgotten(model, world, (0, 1), trial.generator(21))
            return Result(score=gone + kept_accuracy(model, world, 22))
        found = {
            "gone": forgotten(model, world, (0, 1), trial.generator(2)),
            "unseen": forgotten(model, world, (2, 3), trial.generator(1)),
            "returned": brought_back(model, world.model, partial(prompts_of_digit, world, style=0), world.shown, trial),
            "kept": kept_accuracy(model, world, 3),
            "frechet": likeness(model, world),
            "relearning": relearned(model, world.model, partial(prompts_of_digit, world), world.shown, trial, stream=9),
        }
        if not entrant.from_data:
            found |= {"batches": passed[0] / BATCH, "seconds": seconds}
        shown = prompts(torch.full((20,), world.digit), (0, 1), trial.generator(4), style=0)
        return Result(
            {"balance": (1 - found["returned"] + found["kept"]) / 2, **found},
            pictures={"words told of": Picture.grid(generate(model, shown, trial.generator(5))[:, 0] / 2 + 0.5)},
        )


def prompts_of_digit(world: World, count: int, draws: torch.Generator, style: int | None = None) -> Tensor:
    """Prompts for the digit to forget, by words told of."""
    return prompts(torch.full((count,), world.digit), (0, 1), draws, style=style)


Asked = Callable[[int, torch.Generator], Tensor]
"""Makes so many prompts for what is to be forgotten, by words told of."""
Shown = Callable[[Tensor, Tensor], Tensor]
"""Whether images, of prompts, show what is to be forgotten."""


@contextmanager
def counted_images() -> Iterator[list[int]]:
    """Counts the images that go through any diffusion model within the block; the one number of the list."""
    passed = [0]

    def count(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        if isinstance(module, PromptedDenoiser):
            passed[0] += len(given[0])

    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield passed
    finally:
        hook.remove()


def brought_back(model: PromptedDenoiser, original: PromptedDenoiser, ask: Asked, shown: Shown, trial: Trial) -> float:
    """Share of token searches, each with an image and a prompt of its own, after which what was forgotten is made."""
    count, draws = trial.pick(smoke=2, laptop=20, paper=50), trial.generator(30)
    levels, iterations = trial.pick(smoke=([15], 2), laptop=([15, 25, 35, 45], 20), paper=([15, 25, 35, 45], 40))
    asked = ask(4 * count, draws)
    images = generate(original, asked, draws)
    # Images that do not show it are no use as targets.
    order = (~shown(images, asked)).int().sort(stable=True).indices[:count]

    def judge(prompt: Tensor, noise: int, tokens: tuple[int, ...] | None) -> bool:
        longer = torch.cat([torch.tensor(tokens or (), dtype=torch.int64), prompt])[None]
        return bool(shown(generate(model, longer, trial.generator(noise)), prompt[None]))

    found = [
        search_tokens(
            model,
            model.tokens.weight,
            ALPHAS_CUMPROD,
            images[row : row + 1],
            asked[row],
            num_tokens=2,
            timesteps=levels,
            iterations=iterations,
            judge=partial(judge, asked[row], 200 + k),
            generator=trial.generator(100 + k),
        )
        for k, row in enumerate(order.tolist())
    ]
    return attack_success_rate(found)[1]


@torch.no_grad()
def likeness(model: PromptedDenoiser, world: World) -> float:
    """The Frechet distance of other digits to unseen images, in the classifier's features, styles undone."""
    data, trial = load("digits"), world.trial
    others = (data.y_test != world.digit).nonzero()[:, 0]
    real = world.classifier.features(data.x_test[others] * 2 - 1).double()
    digits = data.y_test[others][: trial.pick(smoke=60, laptop=len(others), paper=len(others))]
    asked = prompts(digits, tuple(range(SYNONYMS)), trial.generator(6))
    made = world.classifier.features(styled(generate(model, asked, trial.generator(8)), asked)).double()
    return frechet_distance(made, real.mean(0), torch.cov(real.T)) / float(real.var(0).mean())


def relearned(
    model: PromptedDenoiser, original: PromptedDenoiser, ask: Asked, shown: Shown, trial: Trial, *, stream: int
) -> int:
    """Steps of training on what was forgotten, by words told of, until half of what is made of them shows it again.

    Args:
        stream: of the trial's random numbers, for the images that are looked at.
    """
    draws = trial.generator(7)
    every, limit = trial.pick(smoke=(1, 2), laptop=(4, 80), paper=(20, 2000))
    asked = ask(trial.pick(smoke=16, laptop=100, paper=500), draws)
    images = generate(original, asked, draws)
    student = frozen_copy(model)
    student.attention.requires_grad_(True)
    optimizer = torch.optim.Adam(student.attention.parameters(), lr=1e-3)

    def known_again() -> bool:
        made = generate(student, asked, trial.generator(stream))
        return bool(shown(made, asked).double().mean() >= 0.5)

    def step() -> None:
        rows = torch.randint(len(asked), (BATCH,), generator=draws)
        descent.descent_step(optimizer, noise_error(student, images[rows], asked[rows], draws))

    return relearning_steps(step, known_again, limit=limit, every=every)


prompted_digits = ForgetClass()
