"""Training small generators of digits: the lesson they are given, one training loop, and the diffusion model beside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.diffusion import EDMPreconditioned, denoising_loss, drop_labels, lognormal_levels
from trimtab.nets import DenoisingMLP
from trimtab.ops.averaging import frozen_copy, move_average
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descent_step

BATCH = 128
Images = Float[Tensor, "batch 1 8 8"]
Labels = Int[Tensor, " batch"]
Loss = Callable[[Images, Labels, torch.Generator], Tensor]
"""Maps a batch and a source of randomness to a scalar."""
M = TypeVar("M", bound=nn.Module)
Pair = Callable[[Images, Images], Images]
"""Maps images and noise to the noise that each of them gets."""


@dataclass(frozen=True)
class Lesson:
    """What a generator may learn from, and at what cost.

    Attributes:
        images: in [-1, 1].
        labels: their classes.
        num_classes: number of classes; the label `num_classes` may stand for none.
        allowance: passes of one example through a network, of the size limit or smaller: 1 forward, 2 more backward.
            Teachers, discriminators and tokenizers pay from it too.
        size_limit: parameters that may be used to make a sample.
        trial: the run, with the setting that the search chose.
    """

    images: Images
    labels: Labels
    num_classes: int
    allowance: int
    size_limit: int
    trial: Trial

    @property
    def lr(self) -> float:
        """The learning rate of the setting."""
        return float(self.trial.setting.get("lr", 1e-3))

    @property
    def spread(self) -> float:
        """The standard deviation of all pixels."""
        return float(self.images.std())

    def steps(self, *, forward: int = 1, backward: int = 1, batch: int = BATCH, share: float = 1.0) -> int:
        """How many steps of so many forward and backward passes of a batch a share of the allowance pays for."""
        return max(1, int(share * self.allowance) // (batch * (forward + 2 * backward)))

    def network(self, **options: object) -> DenoisingMLP:
        """The network that noisy images go through; as large as is allowed. Options are those of `DenoisingMLP`."""
        build = lambda: DenoisingMLP(self.images[0].numel(), self.num_classes, 128, 3, **options)  # type: ignore[arg-type]
        return self.trial.seeded(build)

    def batches(self, steps: int, generator: torch.Generator, batch: int = BATCH) -> Iterator[tuple[Images, Labels]]:
        """Batches drawn at random, each image as often as another."""
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(steps):
            while len(left) < batch:
                left = torch.cat([left, torch.randperm(len(self.images), generator=generator)])
            taken, left = left[:batch], left[batch:]
            yield self.images[taken], self.labels[taken]


def train(
    lesson: Lesson,
    module: M,
    loss: Loss,
    steps: int,
    *,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    after_step: Callable[[int], None] | None = None,
    stream: int = 10,
    batch: int = BATCH,
) -> M:
    """Train a module by its loss on batches, and give back a copy with averaged weights, in eval mode.

    The learning rate rises over the first twentieth and falls as a cosine; weights are averaged over about the last
    tenth of the steps so far, as is usual for diffusion.

    Args:
        lesson: data and learning rate.
        module: in which parameters with `requires_grad` are trained.
        loss: of a batch.
        steps: number of steps; the caller has counted their passes (`lesson.steps`).
        optimizer: makes another than Adam at the lesson's rate.
        after_step: called with the number of the step just made.
        stream: of randomness: two trainings of one run take different ones.
        batch: examples in a step.
    """
    generator = lesson.trial.generator(stream)
    parameters = [p for p in module.parameters() if p.requires_grad]
    stepper = torch.optim.Adam(parameters, lr=lesson.lr) if optimizer is None else optimizer(parameters)
    warm = max(1, steps // 20)
    anneal = torch.optim.lr_scheduler.LambdaLR(
        stepper, lambda k: min((k + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, k - warm) / max(1, steps - warm))))
    )
    averaged = frozen_copy(module)
    module.train()
    with torch.random.fork_rng():
        torch.manual_seed(lesson.trial.seed + 1000 * stream)  # of dropout
        for k, (images, labels) in enumerate(lesson.batches(steps, generator, batch)):
            value = loss(images, labels, generator)
            descent_step(stepper, value)
            anneal.step()
            move_average(averaged, module, 1 - min(1.0, 10 / (k + 1)))
            if after_step is not None:
                after_step(k)
            if k % 50 == 0:
                lesson.trial.report(0.9 * k / steps)
    return averaged


def by_chance(images: Images, noise: Images) -> Images:
    """Noise as it was drawn."""
    return noise


def diffusion_model(
    lesson: Lesson, share: float = 1.0, *, stream: int = 10, pair: Pair = by_chance
) -> EDMPreconditioned:
    """The plain class-conditional diffusion model, of so large a share of the allowance.

    It is trained as EDM is, with a tenth of the labels left out, and once for all who want it in a run. Small images
    lose their content at more noise than large ones, so that noise levels are larger than EDM's.

    Args:
        lesson: data and learning rate.
        share: of the allowance.
        stream: of randomness.
        pair: a named function that pairs the noise of a batch with its images.
    """
    denoiser = EDMPreconditioned(lesson.network(), lesson.spread)

    def loss(images: Images, labels: Labels, generator: torch.Generator) -> Tensor:
        t = lognormal_levels(len(images), -0.4, 1.2, generator=generator)
        noise = pair(images, torch.randn(images.shape, generator=generator))
        labels = drop_labels(labels, lesson.num_classes, generator=generator)
        return denoising_loss(denoiser, images, t, noise, labels, weight=denoiser.weight(t))

    def build() -> dict[str, Tensor]:
        return train(lesson, denoiser, loss, lesson.steps(share=share), stream=stream).state_dict()

    trial = lesson.trial
    part = "validation" if trial.searching else "test"
    setting = f"lr {lesson.lr}, share {share}, stream {stream}, noise {pair.__name__}"
    key = f"digits diffusion, seed {trial.seed}, {setting}, for {part}"
    denoiser.load_state_dict(trial.cached(build, key=key))
    return denoiser.eval().requires_grad_(False)
