"""Hinge losses between a generator and a discriminator that gives scores, from one head or several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Scores = Tensor | Sequence[Tensor]
"""What a discriminator gives: scores of any shape, of one head or of each."""


def hinge_discriminator_loss(real: Scores, fake: Scores) -> Tensor:
    """The mean over heads of relu(1 - real) + relu(1 + fake).

    Example:
        >>> hinge_discriminator_loss(torch.tensor([2.0, 0.0]), torch.tensor([-3.0]))
        tensor(0.5000)
    """
    pairs = zip(_heads(real), _heads(fake), strict=True)
    return torch.stack([(1 - r).relu().mean() + (1 + f).relu().mean() for r, f in pairs]).mean()


def generator_score(fake: Scores) -> Tensor:
    """The mean over heads of -fake, which is what a generator of hinge GANs minimizes."""
    return -torch.stack([f.mean() for f in _heads(fake)]).mean()


def hinge_generator_loss(fake: Scores) -> Tensor:
    """The mean over heads of relu(1 - fake): as `generator_score`, but no gain beyond a score of 1."""
    return torch.stack([(1 - f).relu().mean() for f in _heads(fake)]).mean()


def _heads(scores: Scores) -> Sequence[Tensor]:
    return [scores] if isinstance(scores, Tensor) else scores
