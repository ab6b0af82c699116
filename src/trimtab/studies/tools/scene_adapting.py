"""Adapting a segmentation network to unlabelled canvases of another domain, and what everyone does there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.domain.hiast import class_quantiles
from trimtab.nets.unet import UNet
from trimtab.studies.engine.study import Entrant, Trial
from trimtab.studies.tools.descent import descent_step
from trimtab.studies.tools.scenes import NUM_CLASSES, Scenes

BATCH = 8
ROUNDS = 3
"""How often self-training labels the target anew."""
IGNORED = 255

Canvases = Float[Tensor, "n 1 side side"]
Labels = Int[Tensor, "n side side"]


@dataclass(frozen=True)
class Lesson:
    """What a contestant is given.

    Attributes:
        network: trained on the source, with statistics of batch normalisation of the target; in eval mode, in which
            all train it, so that the statistics stay. A copy of the contestant's own.
        unadapted: the same with the statistics of the source.
        source: labelled canvases.
        target: canvases of the target domain; their labels are for the reference alone that is told them.
        steps: of the optimizer, each on 8 canvases of either domain.
        trial: source of random draws.
    """

    network: UNet
    unadapted: UNet
    source: Scenes
    target: Scenes
    steps: int
    trial: Trial

    def source_loss(self, x: Canvases, y: Labels) -> Tensor:
        """Cross-entropy of labelled canvases, weighted as it was when the network was trained."""
        return F.cross_entropy(self.network(x), y, weight=class_weights(self.source))

    def train(
        self,
        objective: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        *,
        part: int = 0,
        parts: int = 1,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Steps of Adam on what an objective says of (source canvases, their labels, target canvases, their places).

        Args:
            objective: a number to minimise.
            part, parts: which part of the steps this is, of how many.
            after: called after each step.
        """
        optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        steps = self.steps // parts
        ours = _order(len(self.source.x), steps, self.trial.generator(20 + part))
        theirs = _order(len(self.target.x), steps, self.trial.generator(40 + part))
        for of_source, of_target in zip(ours, theirs, strict=True):
            loss = objective(self.source.x[of_source], self.source.y[of_source], self.target.x[of_target], of_target)
            descent_step(optimizer, loss)
            if after is not None:
                after()

    @torch.no_grad()
    def probabilities(self) -> Float[Tensor, "n classes side side"]:
        """What the network makes of all target canvases now."""
        return torch.cat([self.network(part).softmax(1) for part in self.target.x.split(100)])


def _order(count: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    size = min(BATCH, count)
    waiting = torch.zeros(0, dtype=torch.int64)
    for _ in range(steps):
        if len(waiting) < size:
            waiting = torch.randperm(count, generator=generator)
        yield waiting[:size]
        waiting = waiting[size:]


@dataclass(frozen=True, kw_only=True)
class SceneAdaptation(Entrant):
    """What a contestant brings.

    Attributes:
        adapt: trains `lesson.network`, or another one, and returns what predicts: canvases to logits, in eval mode.
    """

    adapt: Callable[[Lesson], nn.Module] = field(default=lambda lesson: source_only(lesson))


Select = Callable[[Float[Tensor, "n classes side side"]], Labels]
Term = Callable[[Tensor, Tensor, Tensor], Tensor]


def self_train(
    lesson: Lesson,
    select: Select,
    *,
    term: Callable[[Labels], Term] | None = None,
    after: Callable[[], None] | None = None,
) -> nn.Module:
    """Rounds of labelling the target and training on both domains.

    Args:
        lesson: what there is to adapt with.
        select: makes pseudo-labels of the probabilities of all target canvases, `IGNORED` where it keeps none.
        term: makes, of these, what is minimised beside the source's cross-entropy, a function of target canvases, their
            pseudo-labels and their places; cross-entropy on the pixels kept.
        after: called after each step.
    """
    for number in range(ROUNDS):
        labels = select(lesson.probabilities())
        of_target = term(labels) if term else _kept_only(lesson.network)
        lesson.train(_both(lesson, labels, of_target), part=number, parts=ROUNDS, after=after)
    return lesson.network


def _both(lesson: Lesson, labels: Labels, of_target: Term) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def objective(x: Tensor, y: Tensor, target: Tensor, places: Tensor) -> Tensor:
        return lesson.source_loss(x, y) + of_target(target, labels[places], places)

    return objective


def _kept_only(network: nn.Module) -> Term:
    def value(x: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        entropy: Tensor = F.cross_entropy(network(x), labels, ignore_index=IGNORED, reduction="sum")
        return entropy / (labels != IGNORED).sum().clamp(min=1)

    return value


def source_only(lesson: Lesson) -> nn.Module:
    """No adaptation."""
    return lesson.unadapted


def batch_statistics(lesson: Lesson) -> nn.Module:
    """What all start from."""
    return lesson.network


def entropy_minimisation(lesson: Lesson) -> nn.Module:
    """The source's labels, and sure predictions on the target: MinEnt of ADVENT (Vu et al., arXiv 1811.12833)."""

    def objective(x: Tensor, y: Tensor, target: Tensor, places: Tensor) -> Tensor:
        entropy: Tensor = torch.special.entr(lesson.network(target).softmax(1)).sum(1).mean()
        return lesson.source_loss(x, y) + 0.01 * entropy

    lesson.train(objective)
    return lesson.network


def fixed_threshold(lesson: Lesson) -> nn.Module:
    """Self-training on the pixels of which the network is sure by 0.9."""

    def select(probs: Tensor) -> Tensor:
        sure, labels = probs.max(1)
        return torch.where(sure >= 0.9, labels, IGNORED)

    return self_train(lesson, select)


def class_balanced(lesson: Lesson, share: float = 0.5) -> nn.Module:
    """Self-training on the surest share of each predicted class (CBST, Zou et al., arXiv 1810.07911)."""

    def select(probs: Tensor) -> Tensor:
        sure, labels = probs.max(1)
        wanted = torch.full((NUM_CLASSES,), 1 - share, dtype=torch.float64)
        least = class_quantiles(sure.flatten(), labels.flatten(), wanted, torch.ones(NUM_CLASSES))
        return torch.where(sure >= least[labels], labels, IGNORED)

    return self_train(lesson, select)


def told_the_labels(lesson: Lesson) -> nn.Module:
    """Trained on the labels of the target, which nobody else sees."""

    def objective(x: Tensor, y: Tensor, target: Tensor, places: Tensor) -> Tensor:
        told = F.cross_entropy(lesson.network(target), lesson.target.y[places])
        return lesson.source_loss(x, y) + told

    lesson.train(objective)
    return lesson.network


def class_weights(source: Scenes) -> Float[Tensor, " classes"]:
    """Inverse roots of the classes' shares of the pixels, with a mean of 1, or rare classes would not be learnt."""
    weights = source.y.flatten().bincount(minlength=NUM_CLASSES).clamp(min=1).float().rsqrt()
    return weights / weights.mean()


@torch.no_grad()
def take_statistics(network: nn.Module, x: Canvases) -> None:
    """Takes the statistics of batch normalisation anew, the mean over batches, and leaves the network in eval mode."""
    layers: list[Any] = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    network.train()
    for part in x.split(50):
        network(part)
    network.eval()
