"""Segmentation of unlabelled canvases of digits, learnt on labelled canvases that look otherwise."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.data import load
from trimtab.nets.unet import UNet
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Metric, Result, Task, Trial
from trimtab.studies.tools.descent import descend
from trimtab.studies.tools.scene_adapting import (
    Lesson,
    SceneAdaptation,
    batch_statistics,
    class_balanced,
    class_weights,
    entropy_minimisation,
    fixed_threshold,
    source_only,
    take_statistics,
    told_the_labels,
)
from trimtab.studies.tools.scenes import NUM_CLASSES, RARE, Scenes, class_overlaps, compose, weathered


@dataclass(frozen=True)
class CrossDomainSegmentation(Task[SceneAdaptation]):
    """Adapt a small U-Net from digits on black ground to paler ones before clouds and noise, without labels there.

    On canvases of 22 x 22 pixels with two to four of the digits from 0 to 5, those from 3 on are drawn less often, in
    both domains and in the test. All start from one network a seed, trained on 800 labelled canvases, whose statistics
    of batch normalisation were taken anew on the target's 400 and then stay; all may take 90 steps, of Adam at a rate
    of 0.001, on 8 canvases of either domain. The source's cross-entropy is weighted by the inverse root of the
    classes' frequency. Nobody chooses settings, for the target has no labels to choose by. Intersection over union is
    taken over all pixels of 400 unseen target canvases, and the mean is over classes.

    Attributes:
        dataset: "mnist" (at a third of the resolution) or "digits"; at the smoke budget always digits.
        rarity: how much more often a digit of 0 to 2 is drawn than one of 3 to 5.
    """

    dataset: str = "mnist"
    rarity: float = 4.0

    name: ClassVar[str] = "cross-domain-segmentation"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "miou": Metric("mean intersection over union (%)", percent=True),
        "rare": Metric("intersection over union of rare classes (%)", percent=True),
        "frequent": Metric("intersection over union of frequent classes (%)", percent=True),
        "seconds": Metric("time to adapt (s)", best="min"),
    }
    accepts: ClassVar[type[SceneAdaptation]] = SceneAdaptation
    tries: ClassVar[int] = 1
    cost: ClassVar[float] = 5.0

    @classmethod
    def variants(cls) -> Mapping[str, Task[Any]]:
        return {"rare digits": rare_digits}

    @classmethod
    def references(cls) -> Mapping[str, SceneAdaptation]:
        return {
            "source only": SceneAdaptation(adapt=source_only),
            "batch statistics": SceneAdaptation(adapt=batch_statistics),
            "entropy minimisation": SceneAdaptation(adapt=entropy_minimisation),
            "fixed threshold": SceneAdaptation(adapt=fixed_threshold),
            "class-balanced self-training": SceneAdaptation(adapt=class_balanced),
            "labels of the target": SceneAdaptation(adapt=told_the_labels),
        }

    def run(self, trial: Trial, entrant: SceneAdaptation) -> Result:
        source, target, test = self.scenes(trial)
        lesson = self.lesson(trial, source, target)
        started = time.process_time()
        network = trial.seeded(lambda: entrant.adapt(lesson), stream=6)
        seconds = time.process_time() - started
        found = labelled(network, test.x)
        overlap = class_overlaps(found, test.y)
        rare = torch.tensor([c in RARE for c in range(NUM_CLASSES)])
        frequent = ~rare
        frequent[0] = False  # the ground
        return Result(
            {
                "miou": float(overlap.mean()),
                "rare": float(overlap[rare].mean()),
                "frequent": float(overlap[frequent].mean()),
                "seconds": seconds,
            },
            pictures={
                "canvas, truth and prediction": Picture.grid(
                    torch.cat([test.x[:5, 0], test.y[:5] / 10, found[:5] / 10]), columns=5
                )
            },
        )

    def scenes(self, trial: Trial) -> tuple[Scenes, Scenes, Scenes]:
        """Labelled canvases of the source, canvases of the target to adapt to, and others to test on."""
        data = load(self.datasets(trial.budget)[0])
        count, other, tested = trial.pick(smoke=(30, 20, 20), laptop=(800, 400, 400), paper=(4000, 4000, 2000))
        draws = trial.generator()
        size = min(trial.pick(smoke=1000, laptop=20_000, paper=60_000), len(data.x_train))
        train, unseen = (F.avg_pool2d(x, max(1, x.shape[-1] // 9)) for x in (data.x_train[:size], data.x_test))
        half = size // 2  # no digit stands in both domains
        source = compose(train[:half], data.y_train[:half], count, self.rarity, draws)
        rest = compose(train[half:], data.y_train[half:size], other, self.rarity, draws)
        target = weathered(rest, draws)
        test = weathered(compose(unseen, data.y_test, tested, self.rarity, draws), draws)
        return source, target, test

    def lesson(self, trial: Trial, source: Scenes, target: Scenes) -> Lesson:
        """What a contestant is given."""

        def build() -> dict[str, Tensor]:
            return trained(source, trial)

        network = trial.seeded(lambda: UNet(1, NUM_CLASSES, depth=2))
        network.load_state_dict(trial.cached(build, key=f"source canvases {self.dataset} {self.rarity} {trial.seed}"))
        unadapted = copy.deepcopy(network.eval())
        take_statistics(network, target.x)
        steps = trial.pick(smoke=6, laptop=90, paper=6000)
        return Lesson(network, unadapted, source, target, steps, trial)


def trained(source: Scenes, trial: Trial) -> dict[str, Tensor]:
    """A U-Net's weights after training on labelled canvases."""
    network = trial.seeded(lambda: UNet(1, NUM_CLASSES, depth=2)).train()
    weights = class_weights(source)
    steps, order = trial.pick(smoke=6, laptop=300, paper=6000), trial.generator(1)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    batches = (torch.randint(len(source.x), (16,), generator=order) for _ in range(steps))
    loss = lambda index: F.cross_entropy(network(source.x[index]), source.y[index], weight=weights)
    descend(optimizer, loss, batches, anneal=steps)
    return network.state_dict()


@torch.no_grad()
def labelled(network: nn.Module, x: Tensor) -> Tensor:
    """The class of every pixel."""
    return torch.cat([network.eval()(part).argmax(1) for part in x.split(100)])


rare_digits = CrossDomainSegmentation()
