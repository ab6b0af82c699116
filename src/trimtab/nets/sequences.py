"""Small networks for short discrete sequences: one fills in masks in any order, one goes from left to right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.ops.arguments import integer


class MaskedMLP(nn.Module):
    """A residual network over whole sequences with masks, called `net(tokens)`.

    The mask is the value `num_values`. Scores are given at all positions; those at known ones mean nothing.

    Args:
        length: of the sequences.
        num_values: values of a token.
        hidden: width.
        blocks: residual blocks.

    Example:
        >>> net = MaskedMLP(length=6, num_values=3)
        >>> net(torch.full((2, 6), net.mask_id)).shape
        torch.Size([2, 6, 3])
    """

    def __init__(self, length: int, num_values: int, hidden: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.length, self.num_values = integer("length", length), integer("num_values", num_values, 2)
        self.mask_id = self.num_values
        self.enter = nn.Linear(length * num_values, integer("hidden", hidden))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            for _ in range(integer("blocks", blocks))
        )
        self.leave = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, length * num_values))

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length values"]:
        """Scores of the values at every position, from all known ones."""
        state = self.enter(_one_hot(tokens, self.num_values).to(self.enter.weight.dtype))
        for block in self.blocks:
            state = state + block(state)
        scores: Tensor = self.leave(state).unflatten(1, (self.length, self.num_values))
        return scores


class SequenceScore(MaskedMLP):
    """The same network as one number a sequence: the sum of the scores of what is known, 0 where nothing is.

    Example:
        >>> SequenceScore(length=6, num_values=3)(torch.full((2, 6), 3)).tolist()
        [0.0, 0.0]
    """

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
        """The number of each sequence."""
        known = tokens != self.mask_id
        scores = super().forward(tokens).gather(2, tokens.masked_fill(~known, 0).unsqueeze(2)).squeeze(2)
        return scores.masked_fill(~known, 0.0).sum(1)


class MADE(nn.Module):
    """A residual network whose scores at a position depend on the positions before it alone, called `net(tokens)`.

    One evaluation gives the log-likelihood of a sequence; a sample takes one a position. Germain et al., "MADE: Masked
    Autoencoder for Distribution Estimation", ICML 2015.

    Args:
        length: of the sequences, at least 2.
        num_values: values of a token; a further one, `num_values`, stands for what is not yet known.
        hidden: width.
        blocks: residual blocks.

    Example:
        >>> net = MADE(length=6, num_values=3)
        >>> net(torch.zeros(2, 6, dtype=torch.int64)).shape
        torch.Size([2, 6, 3])
    """

    def __init__(self, length: int, num_values: int, hidden: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.length, self.num_values = integer("length", length, 2), integer("num_values", num_values, 2)
        self.mask_id = self.num_values
        # A hidden unit of degree m sees the inputs 0 to m; an output at i the units of a degree below i.
        inputs, units = (torch.arange(count) for count in (length, integer("hidden", hidden)))
        degrees = units % (length - 1)
        inputs = inputs.repeat_interleave(num_values)
        self.enter = MaskedLinear(degrees[:, None] >= inputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.SiLU(),
                MaskedLinear(degrees[:, None] >= degrees),
                nn.SiLU(),
                MaskedLinear(degrees[:, None] >= degrees),
            )
            for _ in range(integer("blocks", blocks))
        )
        self.leave = MaskedLinear(inputs[:, None] > degrees)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length values"]:
        """Scores of the values at every position, from the positions before it."""
        state = self.enter(_one_hot(tokens, self.num_values).to(self.enter.weight.dtype))
        for block in self.blocks:
            state = state + block(state)
        scores: Tensor = self.leave(F.silu(state)).unflatten(1, (self.length, self.num_values))
        return scores


class MaskedLinear(nn.Linear):
    """A linear layer of which only the connections of a mask, of shape (outputs, inputs), are there."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def _one_hot(tokens: Tensor, num_values: int) -> Tensor:
    """Flat one-hot codes, all zero where the token is the mask."""
    return F.one_hot(tokens, num_values + 1)[:, :, :-1].flatten(1)
