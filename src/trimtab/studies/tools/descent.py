"""The one loop of all training that is not supervised by a `Workbench`: a loss of batches, and an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Batch = TypeVar("Batch")


def descent_step(optimizer: torch.optim.Optimizer, loss: Float[Tensor, ""], *, clip: float | None = None) -> Tensor:
    """One step downhill, from a gradient of at most the norm `clip`; the loss, detached."""
    optimizer.zero_grad()
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    optimizer.step()
    return loss.detach()


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Batch], Float[Tensor, ""]],
    batches: Iterable[Batch],
    *,
    anneal: int | torch.optim.lr_scheduler.LRScheduler | None = None,
    clip: float | None = None,
    after: Callable[[Batch], object] | None = None,
) -> None:
    """A step downhill for every batch.

    Args:
        optimizer: of what is trained, in place.
        loss: of a batch.
        batches: whatever the loss takes; `range(steps)` where it draws by itself.
        anneal: the number of steps over which the rate falls to 0 along a cosine, or another schedule of the optimizer;
            None leaves it as it is.
        clip: largest norm of a gradient.
        after: called with each batch when its step is done.
    """
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, anneal) if isinstance(anneal, int) else anneal
    for batch in batches:
        descent_step(optimizer, loss(batch), clip=clip)
        if schedule is not None:
            schedule.step()
        if after is not None:
            after(batch)


def reported(steps: int, report: Callable[[float], None]) -> Iterator[int]:
    """The numbers of the steps from 0 on; after each, the share of them that is done is reported."""
    for step in range(steps):
        yield step
        report((step + 1) / steps)


def shuffled(count: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Int[Tensor, " batch"]]:
    """The positions of samples in batches, in a new order every epoch; the last batch of one may be smaller."""
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator).split(batch_size)
