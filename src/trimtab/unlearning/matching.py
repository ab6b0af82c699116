"""Fine-tuning of a model to given outputs, on the samples to forget and on some that are retained.

What datamodel matching and oracle matching share, see `trimtab.unlearning.datamodel_matching`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from trimtab.ops.arguments import (
    in_range,
    integer,
    labels,
    non_negative,
    positive,
    tensor,
    tensor_problem,
)

M = TypeVar("M", bound=nn.Module)


def matching_indices(
    forget: Any,
    n: int,
    *,
    retain_multiplier: float = 1.0,
    forget_multiplier: float = 3.0,
    generator: torch.Generator | None = None,
) -> Int64[Tensor, " matched"]:
    """The samples that outputs are matched on: the forget set over and over, then retained samples, each once.

    Args:
        forget: positions of the samples to forget, each once.
        n: training samples.
        retain_multiplier: retained samples for each one to forget; not more than there are are taken.
        forget_multiplier: how often the forget set comes; of a fraction its first samples come once more.
        generator: draws the retained samples.

    Raises:
        TypeError: positions are not integers.
        ValueError: a position is out of range or comes twice, or a number is negative.

    Example:
        >>> matching_indices([7, 2], 8, forget_multiplier=1.5, generator=torch.Generator().manual_seed(0))
        tensor([7, 2, 7, 3, 6])
    """
    integer("n", n)
    non_negative("retain_multiplier", retain_multiplier)
    non_negative("forget_multiplier", forget_multiplier)
    rows = forget_rows(forget, n)
    if not len(rows):
        return rows
    left = torch.ones(n, dtype=torch.bool)
    left[rows] = False
    retained = left.nonzero()[:, 0]
    drawn = torch.randperm(len(retained), generator=generator)[: round(retain_multiplier * len(rows))]
    again = torch.arange(round(forget_multiplier * len(rows))) % len(rows)
    return torch.cat([rows[again], retained[drawn]])


@torch.enable_grad()
def match_outputs(
    model: M,
    inputs: Float[Tensor, "samples ..."],
    targets: Float[Tensor, "samples *output"],
    *,
    epochs: int = 5,
    lr: float = 5e-4,
    decay: float = 0.95,
    batch_size: int = 512,
    proximity: float = 0.0,
    generator: torch.Generator | None = None,
) -> M:
    """A copy of a model, fine-tuned by Adam until its outputs are those given; it is in training mode meanwhile.

    Args:
        model: maps inputs to outputs; it is left as it is.
        inputs: samples.
        targets: the outputs wanted of them.
        epochs: passes through the samples, in random order.
        lr: learning rate of the first epoch.
        decay: factor of the learning rate from epoch to epoch, in (0, 1].
        batch_size: samples in a step; a last batch of a single one is left out, for batch normalisation.
        proximity: weight of the squared distance of the weights to where they start.
        generator: of the order.

    Raises:
        TypeError: `targets` is not floating point.
        ValueError: there are not as many targets as inputs, or a number is out of range.

    Example:
        >>> model, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
        >>> _ = nn.init.zeros_(model.weight)
        >>> f"{match_outputs(model, x, 2 * x, epochs=1, lr=0.1).weight.item():.4f}"  # a step of Adam towards 2
        '0.1000'
    """
    if problem := tensor_problem(inputs=inputs, targets=targets):
        raise TypeError(problem)
    integer("epochs", epochs, 0)
    positive("lr", lr)
    in_range("decay", decay, 0, 1, "right")
    batch_size = integer("batch_size", batch_size)
    non_negative("proximity", proximity)
    targets = tensor("targets", targets, floating=True).detach()
    if targets.shape[:1] != inputs.shape[:1]:
        raise ValueError(f"targets must be {len(inputs)} as inputs, got {len(targets)}")
    matched = copy.deepcopy(model)
    if not len(inputs):
        return matched
    modes = [part.training for part in matched.modules()]
    trained = [p for p in matched.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained] if proximity else []
    optimizer = torch.optim.Adam(trained, lr=lr)
    anneal = torch.optim.lr_scheduler.ExponentialLR(optimizer, decay)
    matched.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=generator).split(batch_size):
            if len(rows) == 1 < min(batch_size, len(inputs)):
                continue  # batch normalisation takes no statistics of one sample
            at = rows.to(inputs.device)
            loss = F.mse_loss(matched(inputs[at]), targets[at])
            for p, origin in zip(trained, start, strict=False):
                loss = loss + proximity * (p - origin).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        anneal.step()
    for part, mode in zip(matched.modules(), modes, strict=True):
        part.training = mode
    return matched


def forget_rows(forget: Any, n: int) -> Int64[Tensor, " forget"]:
    """Positions of samples to forget, each once, as a tensor.

    Raises:
        TypeError: they are not integers.
        ValueError: one is out of range or comes twice.

    Example:
        >>> forget_rows([2, 0], 3)
        tensor([2, 0])
    """
    if isinstance(forget, Sequence):
        forget = torch.tensor(forget, dtype=torch.int64 if not forget else None)
    rows = labels("forget", forget, n)
    if len(rows.unique()) < len(rows):
        raise ValueError("forget must name each sample once, got one twice")
    return rows
