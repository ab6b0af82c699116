"""A small diffusion model with prompts, digits that it is to forget, and the ways of forgetting that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.nets import Classifier, mlp
from trimtab.nets.denoising_mlp import TimeEmbedding
from trimtab.ops.averaging import frozen_copy
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descend, descent_step, shuffled
from trimtab.unlearning import ConceptDomainCorrection, PatchDiscriminator

SYNONYMS = 4
"""Words for each digit; the first two are in the set to unlearn."""
STYLES = ("plain", "upturned", "mirrored")
_FIRST_STYLE = 10 * SYNONYMS
_FIRST_FILLER = _FIRST_STYLE + len(STYLES)
VOCABULARY = 60
_WIDTH, _HIDDEN = 32, 128
_LEVELS = 50
ALPHAS_CUMPROD = (1 - torch.linspace(1e-3, 0.2, _LEVELS, dtype=torch.float64)).cumprod(0).float()


class PromptedDenoiser(nn.Module):
    """Residual layers over 64 pixels, each scaled and shifted by what it reads in the tokens of a prompt by attention.

    Inside it predicts the velocity, which says as much of the image where there is much noise as where there is little.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, _WIDTH)
        self.time = TimeEmbedding(_HIDDEN)
        self.inward, self.outward = nn.Linear(64, _HIDDEN), nn.Linear(_HIDDEN, 64)
        self.norms = nn.ModuleList(nn.LayerNorm(_HIDDEN) for _ in range(4))
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(_HIDDEN, _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN)]) for _ in range(3)
        )
        self.attention = nn.ModuleList(
            nn.ModuleList([nn.Linear(_HIDDEN, _WIDTH), nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, 2 * _HIDDEN)])
            for _ in range(3)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """The noise in images (batch, 1, 8, 8), for tokens (batch, length), or embedded ones (batch, length, 32)."""
        prompt = cond if cond.is_floating_point() else self.tokens(cond)
        hidden = self.inward(x.flatten(1)) + self.time(t / _LEVELS)
        *norms, last = self.norms.children()
        for norm, layer, parts in zip(norms, self.layers, self.attention, strict=True):
            (first, second), (query, key, value) = layer.children(), parts.children()
            inner = norm(hidden)
            seen = torch.einsum("bw,blw->bl", query(inner), key(prompt)) / math.sqrt(_WIDTH)
            scale, shift = torch.einsum("bl,blh->bh", seen.softmax(1), value(prompt)).chunk(2, 1)
            hidden = hidden + second(F.silu(first(inner) * (1 + scale) + shift))
        velocity, bar = self.outward(last(hidden)).view_as(x), ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
        noise: Tensor = (1 - bar).sqrt() * x + bar.sqrt() * velocity
        return noise


def prompts(digits: Tensor, synonyms: tuple[int, ...], draws: torch.Generator, style: int | None = None) -> Tensor:
    """A word for each digit, of those named, a style and a filler: (batch, 3)."""
    count = len(digits)
    words = torch.tensor(synonyms)[torch.randint(len(synonyms), (count,), generator=draws)]
    styles = torch.randint(len(STYLES), (count,), generator=draws) if style is None else torch.full((count,), style)
    fillers = torch.randint(_FIRST_FILLER, VOCABULARY, (count,), generator=draws)
    return torch.stack([digits * SYNONYMS + words, _FIRST_STYLE + styles, fillers], 1)


def styled(images: Tensor, prompt: Tensor) -> Tensor:
    """Images in the style of their prompts; doing it twice undoes it."""
    style = prompt[:, 1, None, None, None] - _FIRST_STYLE
    images = torch.where(style == 1, images.flip(2), images)
    return torch.where(style == 2, images.flip(3), images)


@torch.no_grad()
def generate(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], prompt: Tensor, draws: torch.Generator, *, alike: bool = False
) -> Tensor:
    """Images of prompts by DDIM in 25 steps, from noise of their own, or all from the same."""
    x = torch.randn(1 if alike else len(prompt), 1, 8, 8, generator=draws).expand(len(prompt), -1, -1, -1)
    levels = list(range(_LEVELS - 1, -1, -2))
    for level, following in zip(levels, [*levels[1:], -1], strict=True):
        bar = ALPHAS_CUMPROD[level]
        after = ALPHAS_CUMPROD[following] if following >= 0 else torch.ones(())
        noise = model(x, torch.full((len(x),), level), prompt)
        clean = ((x - (1 - bar).sqrt() * noise) / bar.sqrt()).clamp(-1, 1)
        x = after.sqrt() * clean + (1 - after).sqrt() * (x - bar.sqrt() * clean) / (1 - bar).sqrt()
    return x.clamp(-1, 1)


@dataclass(frozen=True)
class World:
    """What a run is about.

    Attributes:
        model: the original diffusion model, frozen.
        classifier: tells digits apart.
        digit: is to be forgotten.
        anchor: the digit that is to be made in its place.
        trial: the run.
    """

    model: PromptedDenoiser
    classifier: Classifier
    digit: int
    anchor: int
    trial: Trial

    @classmethod
    def of(cls, trial: Trial) -> World:
        """The same model in all runs; which digit is forgotten, the seed says."""
        model, classifier = trial.seeded(PromptedDenoiser), trial.seeded(_new_classifier)
        epochs = trial.pick(smoke=1, laptop=20, paper=20)
        model.load_state_dict(trial.cached(partial(_model_weights, _training_steps(trial)), key="prompted digits"))
        classifier.load_state_dict(trial.cached(partial(_classifier_weights, epochs), key="judge of prompted digits"))
        digit = trial.seed % 10
        return cls(frozen_copy(model), frozen_copy(classifier), digit, (digit + 3) % 10, trial)

    def others(self, count: int, draws: torch.Generator) -> Tensor:
        """Digits that are kept."""
        return (self.digit + 1 + torch.randint(9, (count,), generator=draws)) % 10

    def recognised(self, images: Tensor, prompt: Tensor) -> Tensor:
        """Which digit each image shows, its style undone."""
        found: Tensor = self.classifier(styled(images, prompt)).argmax(1)
        return found

    def shown(self, images: Tensor, prompt: Tensor) -> Tensor:
        """Whether images show the digit to forget."""
        return self.recognised(images, prompt) == self.digit


def _training_steps(trial: Trial) -> int:
    return trial.pick(smoke=5, laptop=1500, paper=20_000)


def _new_classifier() -> Classifier:
    return mlp(64, (128, 32), 10)


def _classifier_weights(epochs: int) -> dict[str, Tensor]:
    """A classifier of all digits, in the style of the data."""
    data, draws = load("digits"), torch.Generator().manual_seed(0)
    x, y = torch.cat([data.x_train, data.x_test]) * 2 - 1, torch.cat([data.y_train, data.y_test])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = _new_classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    loss = lambda rows: F.cross_entropy(classifier(x[rows]), y[rows])
    descend(optimizer, loss, shuffled(len(x), 64, epochs, draws))
    return classifier.state_dict()


def _model_weights(steps: int, without: int | None = None) -> dict[str, Tensor]:
    """Training from nothing, on all digits but one: noise is predicted; one prompt in ten lacks the digit's word.

    Errors count as those of the velocity: as those of the noise, they hardly count where the digit is decided.
    """
    data, draws = load("digits"), torch.Generator().manual_seed(0)
    known = (data.y_train != (-1 if without is None else without)).nonzero()[:, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PromptedDenoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = known[torch.randint(len(known), (64,), generator=draws)]
        prompt = prompts(data.y_train[rows], tuple(range(SYNONYMS)), draws)
        prompt = torch.where(torch.rand(64, 1, generator=draws) < 0.1, without_word(prompt), prompt)
        x_t, t, noise = noisy(styled(data.x_train[rows] * 2 - 1, prompt), draws)
        loss = ((model(x_t, t, prompt) - noise).square().flatten(1).mean(1) / ALPHAS_CUMPROD[t]).mean()
        descent_step(optimizer, loss)
        anneal.step()
    return model.state_dict()


def without_word(prompt: Tensor) -> Tensor:
    """Prompts with their filler in the place of the digit's word."""
    return torch.cat([prompt[:, 2:], prompt[:, 1:]], 1)


def noisy(x: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, their steps and their noise."""
    t, noise = torch.randint(_LEVELS, (len(x),), generator=draws), torch.randn(x.shape, generator=draws)
    bar = ALPHAS_CUMPROD[t].view(-1, 1, 1, 1)
    return bar.sqrt() * x + (1 - bar).sqrt() * noise, t, noise


@dataclass(frozen=True)
class Batch:
    """A step's images and prompts: of the anchor, whose places the digit's words take, and of what is kept."""

    anchor_x: Tensor
    anchor: Tensor
    target: Tensor
    target_x: Tensor
    kept_x: Tensor
    kept: Tensor


_BATCH = 32
Loss = Callable[[nn.Module, World, Batch, torch.Generator], Tensor]


def _batches(world: World, draws: torch.Generator) -> Callable[[], Batch]:
    """Of images that the original model makes, before anything is unlearned."""
    count = world.trial.pick(smoke=16, laptop=192, paper=2000)
    target = prompts(torch.full((count,), world.digit), (0, 1), draws)
    anchor = torch.cat([target[:, :1] + (world.anchor - world.digit) * SYNONYMS, target[:, 1:]], 1)
    kept = prompts(world.others(count, draws), tuple(range(SYNONYMS)), draws)
    anchor_x, target_x, kept_x = (generate(world.model, prompt, draws) for prompt in (anchor, target, kept))

    def batch() -> Batch:
        one, other = (torch.randint(count, (_BATCH,), generator=draws) for _ in range(2))
        return Batch(anchor_x[one], anchor[one], target[one], target_x[one], kept_x[other], kept[other])

    return batch


def anchor_matching(model: nn.Module, world: World, batch: Batch, draws: torch.Generator) -> Tensor:
    """Concept ablation: the frozen model's output under the anchor prompt, point by point."""
    x_t, t, _ = noisy(batch.anchor_x, draws)
    return F.mse_loss(model(x_t, t, batch.target), world.model(x_t, t, batch.anchor))


def negative_guidance(model: nn.Module, world: World, batch: Batch, draws: torch.Generator) -> Tensor:
    """ESD: away from the digit as far as the frozen model would go towards it, from what it makes without the word."""
    x_t, t, _ = noisy(batch.target_x, draws)
    free, towards = (world.model(x_t, t, prompt) for prompt in (without_word(batch.target), batch.target))
    return F.mse_loss(model(x_t, t, batch.target), 2 * free - towards)


def _by_loss(loss: Loss, world: World, model: PromptedDenoiser, rate: float, draws: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.attention.parameters(), lr=rate)
    batch = _batches(world, draws)
    for _ in range(world.trial.pick(smoke=2, laptop=160, paper=2000)):
        descent_step(optimizer, loss(model, world, batch(), draws))


def _by_correction(lam: float, world: World, model: PromptedDenoiser, rate: float, draws: torch.Generator) -> None:
    critic = world.trial.seeded(lambda: PatchDiscriminator(1, width=16, depth=2))
    model.requires_grad_(False)
    model.attention.requires_grad_(True)
    optimizers = [
        torch.optim.Adam(model.attention.parameters(), lr=rate),
        torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.5, 0.999)),
    ]
    steps, warmup = world.trial.pick(smoke=(2, 1), laptop=(160, 80), paper=(2000, 500))
    options: dict[str, Any] = {"warmup": warmup, "lam": lam, "clamp": 2.0, "generator": draws}
    rule = ConceptDomainCorrection(model, critic, optimizers, ALPHAS_CUMPROD, **options)
    batch = _batches(world, draws)
    for _ in range(warmup + steps):
        b = batch()
        rule.step(b.anchor_x, b.target, b.anchor, b.kept_x, b.kept)


Method = Callable[[World, PromptedDenoiser, float, torch.Generator], None]
METHODS: dict[str, Method] = {
    "DoCo": partial(_by_correction, 1.0),
    "DoCo without projection": partial(_by_correction, 0.0),
    "anchor matching": partial(_by_loss, anchor_matching),
    "negative guidance": partial(_by_loss, negative_guidance),
}
_RATES = (1e-4, 2e-4, 4e-4)


def unlearned(world: World, method: str) -> PromptedDenoiser:
    """The model that has forgotten the digit by a method; made once in a run for all who want it.

    The learning rate is the one of three by which the digit is made least of words in the set to unlearn, and other
    digits best: the sum of both shares.
    """
    trial = world.trial
    model = trial.seeded(PromptedDenoiser)
    forget: Method = METHODS[method]

    def build() -> dict[str, Tensor]:
        found: dict[float, tuple[float, dict[str, Tensor]]] = {}
        for rate in trial.pick(smoke=_RATES[:1], laptop=_RATES, paper=_RATES):
            model.load_state_dict(world.model.state_dict())
            forget(world, model, rate, trial.generator(20))
            gone, kept = forgotten(model, world, (0, 1), trial.generator(21)), kept_accuracy(model, world, 22)
            found[rate] = (gone + kept, {name: part.clone() for name, part in model.state_dict().items()})
        return max(found.values(), key=lambda pair: pair[0])[1]

    model.load_state_dict(trial.cached(build, key=f"prompted digits, seed {trial.seed}, unlearned by {method}"))
    return frozen_copy(model)


def retrained(world: World) -> PromptedDenoiser:
    """What unlearning is to come near: a model from nothing, in the same steps, that never saw the digit or its words.

    Made once in a run for all who want it.
    """
    trial = world.trial
    model = trial.seeded(PromptedDenoiser)
    build = partial(_model_weights, _training_steps(trial), world.digit)
    model.load_state_dict(trial.cached(build, key=f"prompted digits without {world.digit}"))
    return frozen_copy(model)


def forgetful(world: World, method: str) -> PromptedDenoiser:
    """The model as a method leaves it, as it was trained, or retrained."""
    known = {"as trained": lambda: world.model, "retrained": lambda: retrained(world)}
    return known.get(method, lambda: unlearned(world, method))()


def relearning(model: PromptedDenoiser, world: World, stream: int) -> int:
    """Steps of fine-tuning on images of the digit, by words told of, until half of what is made shows it again."""
    trial, draws = world.trial, world.trial.generator(stream)
    every, limit = trial.pick(smoke=(1, 2), laptop=(4, 80), paper=(20, 2000))
    asked = prompts(torch.full((trial.pick(smoke=16, laptop=100, paper=500),), world.digit), (0, 1), draws)
    images = generate(world.model, asked, draws)
    model = frozen_copy(model)
    model.attention.requires_grad_(True)
    optimizer = torch.optim.Adam(model.attention.parameters(), lr=1e-3)
    for step in range(limit):
        if step % every == 0:
            made = generate(model, asked, trial.generator(stream + 1))
            if (world.recognised(made, asked) == world.digit).double().mean() >= 0.5:
                return step
        rows = torch.randint(len(asked), (_BATCH,), generator=draws)
        x_t, t, noise = noisy(images[rows], draws)
        descent_step(optimizer, F.mse_loss(model(x_t, t, asked[rows]), noise))
    return limit


def forgotten(model: PromptedDenoiser, world: World, synonyms: tuple[int, ...], draws: torch.Generator) -> float:
    """Share of images of the digit's words that do not show it."""
    count = world.trial.pick(smoke=20, laptop=200, paper=2000)
    prompt = prompts(torch.full((count,), world.digit), synonyms, draws)
    return float((world.recognised(generate(model, prompt, draws), prompt) != world.digit).double().mean())


def kept_accuracy(model: PromptedDenoiser, world: World, stream: int) -> float:
    """Share of images of other digits' words that show them."""
    draws, count = world.trial.generator(stream), world.trial.pick(smoke=20, laptop=300, paper=3000)
    digits = world.others(count, draws)
    prompt = prompts(digits, tuple(range(SYNONYMS)), draws)
    return float((world.recognised(generate(model, prompt, draws), prompt) == digits).double().mean())
