"""A diffusion model forgets a style: whether it is gone, stays gone under attack, and what is left of the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from trimtab.data import load
from trimtab.ops.averaging import frozen_copy
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Budget, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tasks.forget_class import (
    BATCH,
    Asked,
    ForgetClass,
    Forgetting,
    Lesson,
    brought_back,
    counted_images,
    relearned,
)
from trimtab.studies.tools.concept_diffusion import (
    SYNONYMS,
    PromptedDenoiser,
    generate,
)
from trimtab.studies.tools.sample_quality import frechet_distance
from trimtab.studies.tools.style_diffusion import StyleWorld, drawn, forgotten, kept_accuracy, prompts, retrained


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
        retrained = Forgetting(forget=trained_without, from_data=True, search={})  # type: ignore[arg-type]
        return {**ForgetClass.references(), "retrained": retrained}

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
        ask: Asked = lambda count, draws: world.prompts_of_style(count, (0, 1), draws)
        gone, content = forgotten(model, world, (0, 1), 2)
        found = {
            "gone": gone,
            "unseen": forgotten(model, world, (2, 3), 1)[0],
            "content": content,
            "returned": brought_back(model, world.model, ask, world.shown, trial),
            "kept": kept_accuracy(model, world, 3),
            "frechet": likeness(model, world),
            "relearning": relearned(model, world.model, ask, world.shown, trial, stream=10),
        }
        if not entrant.from_data:
            found |= {"batches": passed[0] / BATCH, "seconds": seconds}
        shown = world.prompts_of_style(20, (0, 1), trial.generator(4))
        return Result(
            {"balance": (1 - found["returned"] + found["kept"]) / 2, **found},
            pictures={"words told of": Picture.grid(generate(model, shown, trial.generator(5))[:, 0] / 2 + 0.5)},
        )


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


styled_digits = ForgetConcept()
