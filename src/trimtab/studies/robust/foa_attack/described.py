"""Pictures moved towards others, and whether unseen models of pictures and language describe them as those."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trimtab.data import load
from trimtab.robust import FOAAttack
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Metric, Result, Trial
from trimtab.studies.robust.foa_attack.captioned import Scenes, by_digit
from trimtab.studies.robust.foa_attack.image_text import Describer, Pair
from trimtab.studies.tools.trained_once import trained_once

EPS = 0.25
STEPS = 100
SURROGATES: tuple[Mapping[str, Any], ...] = (
    {"channels": (16, 32, 32), "strides": (2, 1, 2), "depth": 0},
    {"channels": (16, 32, 32), "strides": (2, 1, 2), "depth": 1},
    {"channels": (24, 48), "strides": (2, 3), "depth": 2},
)
"""The attacker's image towers: convolutions alone, one block over 36 regions, and two over 16."""
UNSEEN: tuple[Mapping[str, Any], ...] = (
    {"channels": (16, 32, 48), "strides": (2, 2, 2), "depth": 0},
    {"channels": (20, 40), "strides": (2, 2), "depth": 1},
)
"""Those that are attacked: convolutions alone, and a transformer."""

METRICS = {
    "success": Metric("pictures described as the target in at least half of the words (%)", percent=True),
    "words": Metric("words of content in common with the target's description (%)", percent=True),
    "every_word": Metric("pictures described exactly as the target (%)", percent=True),
    "digit": Metric("pictures said to show the target's digit (%)", percent=True),
    "preferred": Metric("pictures that the target's sentence fits better than their own (%)", percent=True),
    "cosine": Metric("cosine of the picture's and the target's embeddings on the unseen models"),
}


@dataclass(frozen=True)
class Stage:
    """What an attack has, and what it is judged by.

    Attributes:
        x: pictures to be attacked, in [0, 1].
        targets: for each the picture whose description is wanted; no word of content is common to both.
        scenes, target_scenes: what is on them.
        surrogates: the attacker's models.
        unseen: the models that are attacked.
        generator: of the attack's draws.
    """

    x: Float[Tensor, "n 3 24 24"]
    targets: Float[Tensor, "n 3 24 24"]
    scenes: Scenes
    target_scenes: Scenes
    surrogates: Sequence[Pair]
    unseen: Sequence[Pair]
    generator: torch.Generator


Craft = Callable[[Stage], Tensor]


def stage(trial: Trial) -> Stage:
    """Models, the same for all seeds, and the seed's pictures, of digits that no model has seen."""
    data = load("digits" if trial.budget == "smoke" else "mnist")
    kept = trial.pick(smoke=400, laptop=10_000, paper=len(data.x_train))
    own, other = kept // 2, kept
    halves = [by_digit(data.x_train[a:b], data.y_train[a:b]) for a, b in ((0, own), (own, other))]
    surrogates, unseen = (
        [_trained(trial, design, images, whose, number) for number, design in enumerate(designs)]
        for whose, designs, images in (("surrogate", SURROGATES, halves[0]), ("unseen", UNSEEN, halves[1]))
    )
    draw, fresh = trial.generator(20), by_digit(data.x_test, data.y_test)
    scenes = Scenes.drawn(trial.pick(smoke=6, laptop=100, paper=500), draw)
    wanted = scenes.unlike(draw)
    x, targets = (each.pictures(fresh, draw).to(trial.device) for each in (scenes, wanted))
    return Stage(x, targets, scenes, wanted, surrogates, unseen, trial.generator(21))


def _trained(trial: Trial, design: Mapping[str, Any], images: Sequence[Tensor], whose: str, number: int) -> Pair:
    # Trained once, for all seeds.
    once = Trial(0, trial.budget, trial.device, artifacts=trial.artifacts)
    stream = 10 * (whose == "unseen") + number
    pair = once.seeded(lambda: Pair(design), stream).to(trial.device)
    steps, batch_size = trial.pick(smoke=2, laptop=800, paper=5_000), trial.pick(smoke=16, laptop=128, paper=512)
    key = f"pictures and sentences, {whose} {number}, {sorted(design.items())}, {steps} steps of {batch_size}"
    trained_once(once, pair, lambda: pair.train_on(images, steps, once.generator(stream), batch_size), key=key)
    return pair.eval().requires_grad_(False)


def untouched(stage: Stage) -> Tensor:
    """The pictures as they are."""
    return stage.x


def align(stage: Stage, **options: Any) -> Tensor:
    """By the attack of the paper or, with other options, by parts of it."""
    looks = [pair.image.look for pair in stage.surrogates]
    # Five clusters are the default of the authors' class; their ten are of 256 tokens, where here there are 16 or 36.
    attack = FOAAttack(looks, **{"eps": EPS, "step_size": EPS / 8, "steps": STEPS, "num_clusters": 5, **options})
    return attack(stage.x, stage.targets, generator=stage.generator)


def momentum_ascent(stage: Stage) -> Tensor:
    """As many signed steps up the mean cosine of whole pictures' features, with momentum and without crops."""
    scores = FOAAttack([pair.image.look for pair in stage.surrogates], local_weight=0.0).scores
    moved, velocity = stage.x.clone(), torch.zeros_like(stage.x)
    for _ in range(STEPS):
        moved.requires_grad_()
        (slope,) = torch.autograd.grad(scores(moved, stage.targets).sum(), moved)
        velocity = velocity + slope / slope.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-30)
        moved = (moved.detach() + EPS / 8 * velocity.sign()).clamp(stage.x - EPS, stage.x + EPS).clamp(0, 1)
    return moved


def attack_language(craft: Craft, trial: Trial) -> Result:
    """How the unseen models describe attacked pictures, beside how they describe the targets; a mean over both."""
    scene = stage(trial)
    moved = craft(scene)
    held: dict[str, list[Tensor]] = {name: [] for name in METRICS}
    for pair in scene.unseen:
        describe = Describer(pair)
        said, wanted = describe(moved), describe(scene.targets)
        agreement = said.agreement(wanted)
        held["success"].append(agreement >= 0.5)
        held["words"].append(agreement)
        held["every_word"].append(agreement == 1)
        held["digit"].append(said.digit == wanted.digit)
        held["preferred"].append(describe.cosines(moved, scene.target_scenes) > describe.cosines(moved, scene.scenes))
        with torch.no_grad():
            held["cosine"].append(F.cosine_similarity(pair.image(moved), pair.image(scene.targets), dim=1))
    shown = torch.cat([images[:8].mean(1) for images in (scene.x, scene.targets, moved)])
    return Result(
        {name: float(torch.cat(values).float().mean()) for name, values in held.items()},
        pictures={"pictures, their targets, and what was made of them": Picture.grid(shown, columns=len(shown) // 3)},
    )
