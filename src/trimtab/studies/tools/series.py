"""Series with holes as the imputation task hands them to a contestant, and the loop that trains networks on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from trimtab.generative import Fillings
from trimtab.studies.engine.study import Trial
from trimtab.studies.tools.descent import descend

BATCH = 32
_RATE = 3e-3


@dataclass(frozen=True)
class Holed:
    """Series of which some values are missing.

    Attributes:
        x: values about the observed mean of their feature, 0 where missing.
        mask: which values are observed.
        valid: which steps a series has.
    """

    x: Float[Tensor, "n steps features"]
    mask: Bool[Tensor, "n steps features"]
    valid: Bool[Tensor, "n steps"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor | slice) -> Holed:
        return Holed(self.x[index], self.mask[index], self.valid[index])

    def split(self, size: int) -> list[Holed]:
        """In parts of so many series."""
        return [self[start : start + size] for start in range(0, len(self), size)]


@dataclass(frozen=True)
class Lesson:
    """What a contestant learns from.

    Attributes:
        series: the training series.
        y: their classes.
        num_classes: number of classes.
        steps: how many optimizer steps a network may take.
        trial: source of random draws.
    """

    series: Holed
    y: Int[Tensor, " n"]
    num_classes: int
    steps: int
    trial: Trial

    def train(self, net: nn.Module, loss: Callable[[Tensor], Tensor]) -> None:
        """Adam at an annealed rate on the loss of random batches; `loss(index)` gets the positions of their series."""
        optimizer = torch.optim.Adam(net.parameters(), lr=_RATE)
        generator = self.trial.generator(5)
        net.train()
        batches = (torch.randint(len(self.series), (BATCH,), generator=generator) for _ in range(self.steps))
        descend(optimizer, loss, batches, anneal=self.steps, clip=10.0)
        net.eval()


@dataclass(frozen=True)
class Fitted:
    """What was learnt.

    Attributes:
        fill: fills the holes, in one way or in many.
        probs: class probabilities; None leaves them to the task's classifier.
    """

    fill: Callable[[Holed], Fillings]
    probs: Callable[[Holed], Float[Tensor, "n classes"]] | None = None


def one_way(filled: Float[Tensor, "n steps features"]) -> Fillings:
    """A single filling."""
    return Fillings(filled[None], filled.new_ones(1, len(filled)))
