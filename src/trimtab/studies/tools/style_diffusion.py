"""A small diffusion model of digits in styles, asked for by words, and the style that it is to forget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.data import load
from trimtab.nets import Classifier, mlp
from trimtab.ops.averaging import frozen_copy
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.concept_diffusion import (
    ALPHAS_CUMPROD,
    SYNONYMS,
    VOCABULARY,
    PromptedDenoiser,
    generate,
    noisy,
    without_word,
)
from trimtab.studies.tools.descent import descend, shuffled

STYLES = ("plain", "bold", "negative", "dotted")
_FIRST_DIGIT = len(STYLES) * SYNONYMS
_FIRST_FILLER = _FIRST_DIGIT + 10


def drawn(images: Float[Tensor, "n 1 8 8"], styles: Int[Tensor, " n"]) -> Float[Tensor, "n 1 8 8"]:
    """Images in [0, 1], each in its style: strokes twice as wide, black on white, or with every second pixel faint."""
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    faint = torch.where((rows + columns) % 2 == 1, 0.3, 1.0)
    wide = F.max_pool2d(F.pad(images, (0, 1, 0, 1)), 2, stride=1)
    looks = torch.stack([images, wide, 1 - images, images * faint])
    return looks[styles, torch.arange(len(images))]


def prompts(styles: Tensor, digits: Tensor, synonyms: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """A word for each style, of those named, the digit's, and a filler: (batch, 3)."""
    words = torch.tensor(synonyms)[torch.randint(len(synonyms), (len(styles),), generator=draws)]
    fillers = torch.randint(_FIRST_FILLER, VOCABULARY, (len(styles),), generator=draws)
    return torch.stack([styles * SYNONYMS + words, _FIRST_DIGIT + digits, fillers], 1)


def asked_for(prompt: Int[Tensor, "n 3"]) -> tuple[Tensor, Tensor]:
    """The styles and the digits of prompts."""
    return prompt[:, 0] // SYNONYMS, prompt[:, 1] - _FIRST_DIGIT


@dataclass(frozen=True)
class StyleWorld:
    """What a run is about.

    Attributes:
        model: the original diffusion model, frozen.
        classifier: tells styles and digits apart, 40 classes.
        style: is to be forgotten; plain digits are to be made in its place.
        trial: the run.
    """

    model: PromptedDenoiser
    classifier: Classifier
    style: int
    trial: Trial

    @classmethod
    def of(cls, trial: Trial) -> StyleWorld:
        """The same model in all runs; which style is forgotten, the seed says."""
        model, classifier = trial.seeded(PromptedDenoiser), trial.seeded(_new_classifier)
        epochs = trial.pick(smoke=1, laptop=20, paper=20)
        model.load_state_dict(trial.cached(partial(_model_weights, _training_steps(trial)), key="styled digits"))
        classifier.load_state_dict(trial.cached(partial(_classifier_weights, epochs), key="judge of styled digits"))
        return cls(frozen_copy(model), frozen_copy(classifier), 1 + trial.seed % (len(STYLES) - 1), trial)

    def others(self, count: int, draws: torch.Generator) -> Tensor:
        """Styles that are kept."""
        return (self.style + 1 + torch.randint(len(STYLES) - 1, (count,), generator=draws)) % len(STYLES)

    def told(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Which style and which digit each image shows."""
        found = self.classifier(images).argmax(1)
        return found // 10, found % 10

    def shown(self, images: Tensor, prompt: Tensor) -> Tensor:
        """Whether images show the style to forget, whatever their prompts."""
        return self.told(images)[0] == self.style

    def prompts_of_style(self, count: int, synonyms: tuple[int, ...], draws: torch.Generator) -> Tensor:
        """For any digits in the style that is to be forgotten."""
        digits = torch.randint(10, (count,), generator=draws)
        return prompts(torch.full((count,), self.style), digits, synonyms, draws)

    def prompts_of_others(self, count: int, draws: torch.Generator) -> Tensor:
        """For any digits in other styles, by all words."""
        digits = torch.randint(10, (count,), generator=draws)
        return prompts(self.others(count, draws), digits, tuple(range(SYNONYMS)), draws)


def _training_steps(trial: Trial) -> int:
    return trial.pick(smoke=5, laptop=2500, paper=30_000)


def _new_classifier() -> Classifier:
    return mlp(64, (128, 32), 10 * len(STYLES))


def _classifier_weights(epochs: int) -> dict[str, Tensor]:
    """A classifier of all digits in all styles."""
    data, draws = load("digits"), torch.Generator().manual_seed(0)
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = _new_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)

    def loss(rows: Tensor) -> Tensor:
        styles = torch.randint(len(STYLES), (len(rows),), generator=draws)
        return F.cross_entropy(classifier(drawn(x[rows], styles) * 2 - 1), 10 * styles + y[rows])

    descend(optimizer, loss, shuffled(len(x), 64, len(STYLES) * epochs, draws))
    return classifier.state_dict()


def _model_weights(steps: int, without: int | None = None) -> dict[str, Tensor]:
    """Training from nothing, on all styles but one: noise is predicted; one prompt in ten lacks the style's word.

    Errors count as those of the velocity, as in `concept_diffusion`.
    """
    data, draws = load("digits"), torch.Generator().manual_seed(0)
    known = torch.tensor([style for style in range(len(STYLES)) if style != without])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PromptedDenoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(data.y_train), (64,), generator=draws)
        styles = known[torch.randint(len(known), (64,), generator=draws)]
        prompt = prompts(styles, data.y_train[rows], tuple(range(SYNONYMS)), draws)
        prompt = torch.where(torch.rand(64, 1, generator=draws) < 0.1, without_word(prompt), prompt)
        x_t, t, noise = noisy(drawn(data.x_train[rows], styles) * 2 - 1, draws)
        error = (model(x_t, t, prompt) - noise).square().flatten(1).mean(1)
        value: Tensor = (error / ALPHAS_CUMPROD[t]).mean()
        return value

    descend(optimizer, loss, range(steps), anneal=steps)
    return model.state_dict()


def retrained(world: StyleWorld) -> PromptedDenoiser:
    """What forgetting is to come near: a model from nothing, in the same steps, that never saw the style or its words.

    Made once in a run for all who want it.
    """
    trial = world.trial
    model = trial.seeded(PromptedDenoiser)
    build = partial(_model_weights, _training_steps(trial), world.style)
    model.load_state_dict(trial.cached(build, key=f"styled digits without {STYLES[world.style]}"))
    return frozen_copy(model)


def forgotten(
    model: PromptedDenoiser, world: StyleWorld, synonyms: tuple[int, ...], stream: int
) -> tuple[float, float]:
    """Shares of images asked for by the style's words that do not show the style, and that show the digit."""
    draws, count = world.trial.generator(stream), world.trial.pick(smoke=20, laptop=200, paper=2000)
    prompt = world.prompts_of_style(count, synonyms, draws)
    styles, digits = world.told(generate(model, prompt, draws))
    return float((styles != world.style).double().mean()), float((digits == asked_for(prompt)[1]).double().mean())


def kept_accuracy(model: PromptedDenoiser, world: StyleWorld, stream: int) -> float:
    """Share of images asked for in other styles that show the style and the digit."""
    draws, count = world.trial.generator(stream), world.trial.pick(smoke=20, laptop=300, paper=3000)
    prompt = world.prompts_of_others(count, draws)
    shown, wanted = world.told(generate(model, prompt, draws)), asked_for(prompt)
    return float(((shown[0] == wanted[0]) & (shown[1] == wanted[1])).double().mean())
