"""Attacks on a classifier that answers queries only: how many victims fall, and after how many queries."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.data import load
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Curve, Entrant, Metric, Result, Task, Trial
from trimtab.studies.tools import query_attacks
from trimtab.studies.tools.images import worth_halving
from trimtab.studies.tools.oracle import Oracle, Scene
from trimtab.studies.tools.surrogates import TRANSFORMERS, TokenTransformer, attackers_cnn, trained, transformer, victim
from trimtab.studies.tools.training import predict


@dataclass(frozen=True, kw_only=True)
class Attack(Entrant):
    """What an attacker brings.

    Attributes:
        craft: from a scene to the attacked images, in the order of its victims. A victim falls if the image returned
            for it, or one that the oracle was asked about, lies in its ball and is classified as the attack wants.
            Scene and oracle say what may be used: victims, goals and example images, the attacker's own data and
            networks, and `scene.budget` queries for each victim by `scene.oracle(images, rows)`.
    """

    craft: Callable[[Scene], Tensor]


@dataclass(frozen=True)
class Halves:
    """Images and labels: what the black box is trained on, what the attacker has, and what neither has seen.

    Attributes:
        box, own, test: images and labels.
        num_classes: number of classes.
        key: names what they depend on.
    """

    box: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    key: str

    def train(
        self,
        trial: Trial,
        make: Callable[[tuple[int, ...], int], nn.Module],
        images: tuple[Tensor, Tensor],
        *,
        stream: int,
        lr: float = 2e-3,
    ) -> nn.Module:
        """A network for images of this shape, trained on one of the halves; streams tell networks apart."""
        return trained(
            trial,
            partial(make, tuple(images[0].shape[1:]), self.num_classes),
            *images,
            self.num_classes,
            epochs=trial.pick(smoke=3, laptop=6, paper=20),
            lr=lr,
            stream=stream,
            key=self.key,
        )


@dataclass(frozen=True)
class BlackBox(Task[Attack]):
    """Fool a small CNN that shows its logits and nothing else, by images within a ball of the largest norm.

    The black box is trained on one half of some images at half of their resolution, the attacker has the other half: it
    has trained a CNN and three vision transformers on it, of other designs. Victims are test images that the black box
    classifies rightly. An attack that never asks has the success of its images at no cost; one that asks has what it
    reaches within the budget, 1,000 queries for each victim. Contestants choose among up to five settings by their
    success on images of the attacker's half.

    Attributes:
        dataset: "mnist", "fashion_mnist", "digits", or a file `.npz` with `x_train`, `y_train`, `x_test` and `y_test`;
            at the smoke budget digits.
        eps: the largest change of a pixel, of a range from 0 to 1.
        targeted: whether a victim must be taken for one given class; else any wrong one will do.
    """

    dataset: str = "mnist"
    eps: float = 0.12
    targeted: bool = False

    name: ClassVar[str] = "black-box"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "success": Metric("victims that fall (%)", percent=True),
        "success_at_100": Metric("victims that fall within 100 queries (%)", percent=True),
        "queries": Metric("queries for a victim (the whole budget where it stands)", best="min"),
        "seconds": Metric("attack time (s)", best="min"),
    }
    accepts: ClassVar[type[Attack]] = Attack
    needs_images: ClassVar[bool] = True
    tries: ClassVar[int] = 5
    search: ClassVar[Mapping[str, Sequence[Any]]] = {}
    cost: ClassVar[float] = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 1:
            raise ValueError(f"eps must be in (0, 1], got {self.eps}")

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"any wrong class": any_class, "a given class": given_class}

    @classmethod
    def references(cls) -> Mapping[str, Attack]:
        transfer = query_attacks.momentum_transfer
        steps = {"steps": (2, 5, 10, 20, 40)}
        return {
            "random signs": Attack(craft=query_attacks.random_signs),
            "example image": Attack(craft=query_attacks.blended),
            "Square attack": Attack(craft=query_attacks.square_attack, search={"share": (0.05, 0.1, 0.3, 0.8)}),
            "NES": Attack(craft=query_attacks.natural_evolution, search={"pairs": (10, 25), "step": (0.1, 0.25)}),
            "PGD, own CNN": Attack(craft=partial(transfer, momentum=0.0), search=steps),
            "MI-FGSM, own CNN": Attack(craft=transfer, search=steps),
            "MI-FGSM, transformers": Attack(craft=partial(transfer, transformers=True), search=steps),
        }

    def halves(self, trial: Trial) -> Halves:
        """The images as the seed divides them, at half of their resolution."""
        name = self.datasets(trial.budget)[0]
        size = trial.pick(smoke=400, laptop=8_000, paper=40_000)
        data = load(name).subset(size, generator=trial.generator())
        halve = worth_halving(data, trial)
        x, x_test = (
            (F.avg_pool2d(part, 2) if halve else part).to(trial.device) for part in (data.x_train, data.x_test)
        )
        y, y_test = data.y_train.to(trial.device), data.y_test.to(trial.device)
        half = len(x) // 2
        return Halves(
            *((x[:half], y[:half]), (x[half:], y[half:]), (x_test, y_test)),
            num_classes=data.num_classes,
            key=f"{name}, {size} images, seed {trial.seed}",
        )

    def scene(self, trial: Trial) -> Scene:
        """Networks, victims and goals, as the seed decides them; victims of a search are the attacker's own images."""
        data = self.halves(trial)
        box = data.train(trial, victim, data.box, stream=0)
        cnn = data.train(trial, attackers_cnn, data.own, stream=1)
        transformers = [
            data.train(trial, partial(transformer, design=design), data.own, stream=2 + number, lr=4e-3)
            for number, design in enumerate(TRANSFORMERS)
        ]
        pool_x, pool_y = data.own if trial.searching else data.test
        rows = self._victims(trial, predict(box, pool_x[:2000]).argmax(1) == pool_y[:2000])
        x, y, draw = pool_x[rows], pool_y[rows], trial.generator(2)
        goals = (y + torch.randint(1, data.num_classes, y.shape, generator=draw).to(y.device)) % data.num_classes
        budget = trial.pick(smoke=60, laptop=1_000, paper=5_000)
        return Scene(
            x=x,
            y=y,
            goals=goals,
            examples=_examples(goals, *data.own, draw),
            eps=self.eps,
            budget=budget,
            targeted=self.targeted,
            oracle=Oracle(box, x, y, goals, self.eps, budget, targeted=self.targeted),
            own_x=data.own[0],
            own_y=data.own[1],
            cnn=cnn,
            transformers=cast(Sequence[TokenTransformer], transformers),
            generator=trial.generator(3),
            setting=trial.setting,
        )

    def _victims(self, trial: Trial, right: Tensor) -> Int[Tensor, " victims"]:
        count = trial.pick(smoke=20, laptop=150, paper=1_000)
        rows = right.nonzero()[:, 0]
        return rows[torch.randperm(len(rows), generator=trial.generator(1))[:count]]

    def run(self, trial: Trial, entrant: Attack) -> Result:
        scene = self.scene(trial)
        started = time.process_time()
        crafted = entrant.craft(scene).detach()
        seconds = time.process_time() - started
        fallen, after = scene.oracle.outcome(crafted)
        success = float(fallen.float().mean())
        spent = float(torch.where(fallen, after, scene.budget).float().mean())
        if trial.searching:
            # Of settings with as many victims, the one that asks less.
            return Result(score=success - 1e-3 * spent / scene.budget)
        points = [at for at in (0, 1, 3, 10, 30, 100, 300, 1_000, 5_000) if at <= scene.budget]
        reached = [float((fallen & (after <= at)).float().mean()) for at in points]
        return Result(
            {
                "success": success,
                "success_at_100": float((fallen & (after <= 100)).float().mean()),
                "queries": spent,
                "seconds": seconds,
            },
            {"success": Curve([float(at) for at in points], reached, "queries")},
            pictures={
                "victims, and what was made of them": Picture.grid(torch.cat([scene.x[:10, 0], crafted[:10, 0]]))
            },
        )


any_class = BlackBox()
given_class = BlackBox(eps=0.2, targeted=True)


def _examples(goals: Tensor, x: Tensor, y: Tensor, generator: torch.Generator) -> Float[Tensor, "n ..."]:
    """For each goal one of the images of that class, by chance."""
    chance = torch.rand(len(goals), len(y), generator=generator).to(x.device)
    return x[torch.where(goals[:, None] == y, chance, -1.0).argmax(1)]
