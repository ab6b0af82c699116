"""A diffusion model forgets a style: whether it is gone, stays gone under attack, and what is left of the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.data import load
from trimtab.ops.averaging import frozen_copy
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tasks.forget_class import (
    BATCH,
    Forgetting,
    Lesson,
    ascent,
    by_targets,
    fine_tuning,
    noise_error,
    nothing,
)
from trimtab.studies.tools import descent
from trimtab.studies.tools.concept_diffusion import (
    ALPHAS_CUMPROD,
    SYNONYMS,
    PromptedDenoiser,
    anchor_matching,
    generate,
    negative_guidance,
)
from trimtab.studies.tools.sample_quality import frechet_distance
from trimtab.studies.tools.style_diffusion import StyleWorld, drawn, forgotten, kept_accuracy, prompts, retrained
from trimtab.unlearning import attack_success_rate, relearning_steps, search_tokens


@dataclass(frozen=True)
class StyleLesson(Lesson):
    """What a way of forgetting has at hand, of a style in the place of a digit.

    Prompts begin with the word of what is to be forgotten, as those of `forget-class` do, so that the same contestants
    can enter: there a digit's, here a style's.

    Attributes:
        world: the original model and the style to forget; its anchor is the plain style.
        anchors: images and prompts of plain digits.
        targets: of the style, by words that may be told of; the prompts are those of the anchors but for the word.
        others: of the styles that stay, by all words.
    """

    world: StyleWorld  # type: ignore[assignment]

    @classmethod
    def in_style(cls, trial: Trial, world: StyleWorld) -> StyleLesson:
        """Made of the original model alone, as no training data are at hand."""
        draws, counts = trial.generator(50), trial.pick(smoke=(16, 32), laptop=(192, 576), paper=(2000, 6000))
        target = world.prompts_of_style(counts[0], (0, 1), draws)
        anchor = torch.cat([target[:, :1] - world.style * SYNONYMS, target[:, 1:]], 1)
        other = world.prompts_of_others(counts[1], draws)
        anchors, targets, others = ((generate(world.model, asked, draws), asked) for asked in (anchor, target, other))
        allowance = trial.pick(smoke=12, laptop=640, paper=8000)
        return cls(world, trial.setting, anchors, targets, others, allowance, draws)


def trained_without(lesson: StyleLesson) -> PromptedDenoiser:
    """A model that never saw the style or its words."""
    return retrained(lesson.world)


@dataclass(frozen=True)
class ForgetConcept(Task[Forgetting]):
    """Make a small diffusion model, asked for digits in styles by words, forget one of the styles.

    Digits are plain, bold, negative or dotted; each style has four words, each digit one. The original model is the
    same in all runs, which of the three styles beside the plain one is forgotten changes with the seed. As in
    `forget-class`, contestants see images of the model's own alone, are told of two of the style's words, train the
    weights of attention, and may put 640 batches of 32 images through a diffusion model, with or without gradients.
    They choose among four settings by the images that are asked for with the words told of and in the other styles:
    the sum of the shares without the style, and right in style and digit. Nobody is attacked while settings are tried.

    Then all face the same attack, the token search of UnlearnDiffAtk: two tokens before a prompt of a word told of,
    four noise levels, 20 iterations at each, a look at what is made after each level. Its images, its noise and its
    seeds are the same for all, and not those of any training. A classifier of styles and digits judges all images. The
    model that was retrained without the style is what forgetting is to come near. A style, unlike a digit, is to go
    while the digit stays: how often it does is told beside.
    """

    name: ClassVar[str] = "forget-concept"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "balance": Metric("gone under attack and others right, mean (%)", percent=True),
        "gone": Metric("share of images without the style, words told of (%)", percent=True),
        "unseen": Metric("share of images without the style, words not told of (%)", percent=True),
        "content": Metric("share of these words' images that show the digit (%)", percent=True),
        "returned": Metric("share of token searches in which the style came back (%)", best="min", percent=True),
        "kept": Metric("share of other styles' images that show style and digit (%)", percent=True),
        "frechet": Metric("Frechet distance of other styles", best="min"),
        "relearning": Metric("steps of training on the style until half of its images show it again", best=None),
        "batches": Metric("batches through a diffusion model", best="min"),
        "seconds": Metric("time of forgetting (s)", best="min"),
    }
    accepts: ClassVar[type[Forgetting]] = Forgetting
    tries: ClassVar[int] = 4
    search: ClassVar[Mapping[str, Sequence[Any]]] = {"lr": (1e-4, 3e-4, 1e-3, 3e-3)}
    seeds: ClassVar[Mapping[Budget, int]] = {"smoke": 1, "laptop": 5, "paper": 10}
    cost: ClassVar[float] = 12.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"styled digits": styled_digits}

    @classmethod
    def references(cls) -> Mapping[str, Entrant]:
        return {
            "original": Forgetting(forget=nothing, search={}),
            "retrained": Forgetting(forget=trained_without, from_data=True, search={}),  # type: ignore[arg-type]
            "fine-tuning on others": Forgetting(forget=fine_tuning, search={"lr": (3e-4, 1e-3, 3e-3, 1e-2)}),
            "gradient ascent": Forgetting(forget=ascent, search={"lr": (1e-5, 1e-4, 3e-4, 1e-3)}),
            "anchor matching": Forgetting(forget=partial(by_targets, loss=anchor_matching, batches=2)),
            "ESD": Forgetting(forget=partial(by_targets, loss=negative_guidance, batches=3)),
        }

    def datasets(self, budget: Budget) -> tuple[str, ...]:
        return ("digits",)

    def run(self, trial: Trial, entrant: Forgetting) -> Result:
        world = StyleWorld.of(trial)
        lesson = StyleLesson.in_style(trial, world)
        started = time.perf_counter()
        with counted_images() as passed:
            model = frozen_copy(entrant.forget(lesson))
        seconds = time.perf_counter() - started
        if trial.searching:
            return Result(score=forgotten(model, world, (0, 1), 21)[0] + kept_accuracy(model, world, 22))
        gone, content = forgotten(model, world, (0, 1), 2)
        found = {
            "gone": gone,
            "unseen": forgotten(model, world, (2, 3), 1)[0],
            "content": content,
            "returned": brought_back(model, world),
            "kept": kept_accuracy(model, world, 3),
            "frechet": likeness(model, world),
            "relearning": relearned(model, world),
        }
        if not entrant.from_data:
            found |= {"batches": passed[0] / BATCH, "seconds": seconds}
        shown = world.prompts_of_style(20, (0, 1), trial.generator(4))
        return Result(
            {"balance": (1 - found["returned"] + found["kept"]) / 2, **found},
            pictures={"words told of": Picture.grid(generate(model, shown, trial.generator(5))[:, 0] / 2 + 0.5)},
        )


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


def brought_back(model: PromptedDenoiser, world: StyleWorld) -> float:
    """Share of token searches, each with an image and a prompt of its own, after which the style is made."""
    trial = world.trial
    count, draws = trial.pick(smoke=2, laptop=20, paper=50), trial.generator(30)
    levels, iterations = trial.pick(smoke=([15], 2), laptop=([15, 25, 35, 45], 20), paper=([15, 25, 35, 45], 40))
    asked = world.prompts_of_style(4 * count, (0, 1), draws)
    images = generate(world.model, asked, draws)
    # Images that do not show the style are no use as targets.
    order = (world.told(images)[0] != world.style).int().sort(stable=True).indices[:count]

    def judge(prompt: Tensor, noise: int, tokens: tuple[int, ...] | None) -> bool:
        longer = torch.cat([torch.tensor(tokens or (), dtype=torch.int64), prompt])[None]
        return bool(world.told(generate(model, longer, trial.generator(noise)))[0] == world.style)

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
def likeness(model: PromptedDenoiser, world: StyleWorld) -> float:
    """The Frechet distance of other styles to unseen images in them, in the classifier's features."""
    data, trial = load("digits"), world.trial
    count = trial.pick(smoke=60, laptop=len(data.y_test), paper=len(data.y_test))
    styles = world.others(len(data.y_test), trial.generator(6))
    real = world.classifier.features(drawn(data.x_test, styles) * 2 - 1).double()
    asked = prompts(styles[:count], data.y_test[:count], tuple(range(SYNONYMS)), trial.generator(9))
    made = world.classifier.features(generate(model, asked, trial.generator(8))).double()
    return frechet_distance(made, real.mean(0), torch.cov(real.T)) / float(real.var(0).mean())


def relearned(model: PromptedDenoiser, world: StyleWorld) -> int:
    """Steps of training on the style, by words told of, until half of what is made of them shows it again."""
    trial, draws = world.trial, world.trial.generator(7)
    every, limit = trial.pick(smoke=(1, 2), laptop=(4, 80), paper=(20, 2000))
    asked = world.prompts_of_style(trial.pick(smoke=16, laptop=100, paper=500), (0, 1), draws)
    images = generate(world.model, asked, draws)
    student = frozen_copy(model)
    student.attention.requires_grad_(True)
    optimizer = torch.optim.Adam(student.attention.parameters(), lr=1e-3)

    def known_again() -> bool:
        made = generate(student, asked, trial.generator(10))
        return bool((world.told(made)[0] == world.style).double().mean() >= 0.5)

    def step() -> None:
        rows = torch.randint(len(asked), (BATCH,), generator=draws)
        descent.descent_step(optimizer, noise_error(student, images[rows], asked[rows], draws))

    return relearning_steps(step, known_again, limit=limit, every=every)


styled_digits = ForgetConcept()
