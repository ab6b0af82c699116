"""Learning from samples without labels: what a contestant is given, what it brings, and the one loop for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import nets
from trimtab.studies.engine.study import Curve, Entrant, Setting, Trial
from trimtab.studies.tools.descent import descent_step

DIM = 64
"""Width of the features of the task's own encoder."""


class Learner(Protocol):
    """What learns: a module. `update(share)`, with the share of training done, is called after each step if there."""

    def loss(self, x: Float[Tensor, "batch ..."], index: Int[Tensor, " batch"], generator: torch.Generator) -> Tensor:
        """What a batch of samples costs; `index` are their places in `Lesson.x`, `generator` decides all draws."""

    def encode(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n dim"]:
        """Features of samples, of any width; called in eval mode."""


@dataclass(frozen=True)
class Lesson:
    """What a contestant is given.

    Attributes:
        x: what is learnt from: images (n, channels, height, width) in [0, 1], or a table (n, columns), in which numbers
            have mean 0 and deviation 1 and categories are codes.
        cardinalities: of a table, for each column the number of categories, 0 where it holds numbers; empty for images.
        steps: of the optimizer.
        batch_size: samples of a step.
        setting: the values that the search chose, or tries.
        seed: of the run.
    """

    x: Float[Tensor, "n ..."]
    cardinalities: tuple[int, ...]
    steps: int
    batch_size: int
    setting: Setting
    seed: int

    @property
    def is_table(self) -> bool:
        return bool(self.cardinalities)

    def option(self, name: str, otherwise: float) -> float:
        """A number of the setting, or this one where the search has none of the name."""
        return float(self.setting.get(name, otherwise))

    def encoder(self) -> nn.Module:
        """The encoder that all use, to (batch, 64); torch's global state, which the loop fixes, decides its weights.

        A small convolutional network, or for tables `Indicators` and two layers, which stand at [0] and [1:].
        """
        if not self.is_table:
            return nets.small_cnn(tuple(self.x.shape[1:]), width=DIM // 8).features
        expand = Indicators(self.cardinalities)
        return nn.Sequential(
            expand, nn.Linear(expand.width, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, DIM), nn.ReLU()
        )

    def projector(self, inputs: int = DIM, hidden: int = 128, outputs: int = 64) -> nn.Module:
        """The two layers on top of an encoder that most methods train through, and leave out afterwards."""
        return nn.Sequential(
            nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )

    def view(self, x: Float[Tensor, "batch ..."], generator: torch.Generator) -> Float[Tensor, "batch ..."]:
        """Another view of samples that is worth recognising: a crop of an image, or a table's row partly redrawn."""
        return redrawn(x, self.x, generator) if self.is_table else crop(x, generator)


@dataclass(frozen=True, kw_only=True)
class PreTraining(Entrant):
    """What a contestant brings.

    Attributes:
        learner: makes what learns, a module that is a `Learner`; torch's global state is fixed by the seed.
        optimizer: makes its optimizer; AdamW at the setting's `lr`, with a decay of 1e-4.
    """

    learner: Callable[[Lesson], Any]
    optimizer: Callable[[Any, Lesson], torch.optim.Optimizer] | None = None


def adamw(parameters: Any, lesson: Lesson) -> torch.optim.Optimizer:
    """What trains where nothing else is brought."""
    return torch.optim.AdamW(parameters, lr=lesson.option("lr", 2e-3), weight_decay=1e-4)


@dataclass(frozen=True)
class PreTrained:
    """What training leaves behind.

    Attributes:
        learner: in eval mode.
        seconds: of processor time in the steps.
        losses: their course.
    """

    learner: Any
    seconds: float
    losses: Curve

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "n ..."], batch_size: int = 2048) -> Float[Tensor, "n dim"]:
        """Features of samples, in eval mode."""
        self.learner.eval()
        return torch.cat([self.learner.encode(part).flatten(1) for part in x.split(batch_size)])


def pretrain(entrant: PreTraining, lesson: Lesson, trial: Trial) -> PreTrained:
    """Train a contestant's learner on batches that are the same for all, at an annealed rate."""
    return trial.seeded(lambda: _pretrain(entrant, lesson, trial), stream=5)


def _pretrain(entrant: PreTraining, lesson: Lesson, trial: Trial) -> PreTrained:
    learner = entrant.learner(lesson).to(trial.device)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    if not parameters:
        settle(learner, lesson.x)
        return PreTrained(learner, 0.0, Curve([], [], x_label="step"))
    optimizer = (entrant.optimizer or adamw)(parameters, lesson)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, lesson.steps)
    order, draws = trial.generator(1), trial.generator(2)
    every, at, values = max(1, lesson.steps // 10), [], []
    held, waiting = torch.zeros((), device=trial.device), torch.zeros(0, dtype=torch.int64)
    clock = time.process_time if torch.device(trial.device).type == "cpu" else time.perf_counter
    started = clock()
    learner.train()
    for step in range(lesson.steps):
        if len(waiting) < lesson.batch_size:
            waiting = torch.randperm(len(lesson.x), generator=order)
        index, waiting = waiting[: lesson.batch_size], waiting[lesson.batch_size :]
        index = index.to(lesson.x.device)
        loss = learner.loss(lesson.x[index], index, draws)
        held += descent_step(optimizer, loss)
        schedule.step()
        if callable(update := getattr(learner, "update", None)):
            update((step + 1) / lesson.steps)
        if (step + 1) % every == 0:
            at.append(float(step + 1))
            values.append(held.item() / every)
            held.zero_()
            trial.report((step + 1) / lesson.steps)
    seconds = clock() - started
    settle(learner, lesson.x)
    return PreTrained(learner, seconds, Curve(at, values, x_label="step"))


@torch.no_grad()
def settle(learner: Any, x: Float[Tensor, "n ..."], batch_size: int = 1000) -> None:
    """Takes the statistics of batch normalisation anew, from whole samples, and leaves the learner in eval mode.

    In training it saw crops, or images of which a part was hidden, whose means are others.
    """
    learner.train()
    layers = [part for part in learner.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
    for part in x.split(batch_size):
        learner.encode(part)
    learner.eval()


class Indicators(nn.Module):
    """Rows of numbers and codes as numbers alone: an indicator for every category.

    Attributes:
        width: of the rows that come out.
        column: for each of their entries, the column it belongs to.
    """

    column: Tensor

    def __init__(self, cardinalities: tuple[int, ...]) -> None:
        super().__init__()
        self.cardinalities = cardinalities
        sizes = torch.tensor([max(1, count) for count in cardinalities])
        self.width = int(sizes.sum())
        self.register_buffer("column", torch.arange(len(cardinalities)).repeat_interleave(sizes))

    def forward(self, x: Float[Tensor, "batch columns"]) -> Float[Tensor, "batch width"]:
        parts = [
            F.one_hot(column.long(), count).float() if count else column[:, None]
            for column, count in zip(x.unbind(1), self.cardinalities, strict=True)
        ]
        return torch.cat(parts, 1)


def crop(
    x: Float[Tensor, "batch channels height width"], generator: torch.Generator, smallest: float = 0.4
) -> Float[Tensor, "batch channels height width"]:
    """A random part of each image, scaled up, brighter or darker, with more or less contrast.

    Args:
        x: images.
        generator: decides the draws.
        smallest: share of the area that is kept at least.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    side = uniform(smallest, 1.0).sqrt()
    right, down = (1 - side) * uniform(-1.0, 1.0), (1 - side) * uniform(-1.0, 1.0)
    none = torch.zeros_like(side)
    matrix = torch.stack([side, none, right, none, side, down], 1).view(-1, 2, 3).to(x)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    part = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    contrast, brightness = (drawn.to(x).view(-1, 1, 1, 1) for drawn in (uniform(0.6, 1.4), uniform(-0.2, 0.2)))
    mean = part.mean((1, 2, 3), keepdim=True)
    return mean + contrast * (part - mean) + brightness


def redrawn(
    x: Float[Tensor, "batch columns"],
    known: Float[Tensor, "n columns"],
    generator: torch.Generator,
    share: float = 0.3,
) -> Float[Tensor, "batch columns"]:
    """Rows of which some entries are those of other rows, as SCARF corrupts them (Bahri et al., arXiv 2106.15147)."""
    other = torch.randint(len(known), x.shape, generator=generator).to(x.device)
    changed = (torch.rand(x.shape, generator=generator) < share).to(x.device)
    return torch.where(changed, known.gather(0, other), x)
