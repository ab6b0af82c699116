"""A Markov chain, of which all is known: likelihood, moments and the conditionals of masked sequences."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab.ops.ordering import draw


class MarkovChain:
    """A stationary chain over the values 0 to K - 1; K is the mask.

    Args:
        transition: probabilities of the next value, a row for each value; all positive.
        length: of the sequences.

    Example:
        >>> chain = MarkovChain.random(4, length=6)
        >>> chain.log_prob(chain.sample(10)).shape, chain(torch.full((1, 6), chain.mask_id)).shape
        (torch.Size([10]), torch.Size([1, 6, 4]))
    """

    def __init__(self, transition: Float[Tensor, "values values"], length: int) -> None:
        self.transition, self.length = transition.double(), length
        self.mask_id = len(transition)
        powers = [torch.eye(self.mask_id, dtype=torch.float64)]
        for _ in range(length):
            powers.append(powers[-1] @ self.transition)
        self.powers = torch.stack(powers)
        far = self.transition
        for _ in range(40):
            far = far @ far
            far = far / far.sum(1, keepdim=True)
        self.stationary = far[0]

    @classmethod
    def random(cls, values: int, length: int, *, exponent: float = 1.5, seed: int = 0) -> MarkovChain:
        """A chain whose rows fall as a power of the rank, each in an order of its own."""
        generator = torch.Generator().manual_seed(seed)
        row = torch.arange(1, values + 1, dtype=torch.float64) ** -exponent
        order = torch.stack([torch.randperm(values, generator=generator) for _ in range(values)])
        return cls((row / row.sum())[order], length)

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Int[Tensor, "count length"]:
        """Sequences of the chain."""
        tokens = [draw(self.stationary.log().expand(count, -1), generator=generator)]
        for _ in range(self.length - 1):
            tokens.append(draw(self.transition.log()[tokens[-1]], generator=generator))
        return torch.stack(tokens, 1)

    def log_prob(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, " batch"]:
        """The exact log-probability of whole sequences."""
        return self.stationary.log()[tokens[:, 0]] + self.transition.log()[tokens[:, :-1], tokens[:, 1:]].sum(1)

    @cached_property
    def entropy(self) -> float:
        """Of a whole sequence, in nats."""
        first = -(self.stationary * self.stationary.log()).sum()
        step = -(self.stationary[:, None] * self.transition * self.transition.log()).sum()
        return float(first + (self.length - 1) * step)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the indicators of all values but the last, at all positions."""
        values, length = self.mask_id - 1, self.length
        mean = self.stationary[:values].repeat(length)
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        joint = self.stationary[:, None] * self.powers
        blocks = torch.where((distance >= 0)[..., None, None], joint[distance.abs()], joint[distance.abs()].mT)
        second = blocks[:, :, :values, :values].permute(0, 2, 1, 3).reshape(len(mean), len(mean))
        return mean, second - mean[:, None] * mean

    def __call__(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length values"]:
        """The exact conditionals of masked positions, as log-probabilities: a perfect model."""
        known, place = tokens != self.mask_id, torch.arange(self.length)
        # The nearest known positions on either side, -1 and `length` where there is none.
        left = torch.where(known, place, -1).cummax(1).values
        right = torch.where(known, place, self.length).flip(1).cummin(1).values.flip(1)
        values = tokens.masked_fill(~known, 0)
        before = self.powers[place - left.clamp_min(0), values.gather(1, left.clamp_min(0))]
        before = torch.where((left >= 0)[..., None], before, self.stationary)
        end = right.clamp_max(self.length - 1)
        after = self.powers.mT[end - place, values.gather(1, end)]
        after = torch.where((right < self.length)[..., None], after, 1.0)
        return (before * after).log().log_softmax(2)
