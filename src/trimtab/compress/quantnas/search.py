"""The search itself: weights and mixtures learn in turns, under an entropy that rises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from trimtab.compress.quantnas.blocks import mixed_ops, weight_parameters
from trimtab.compress.quantnas.noise import QuantNoiseConv2d
from trimtab.ops.arguments import integer, non_negative, positive
from trimtab.ops.states import fits

# The step of the mixture leaves running statistics alone by the same piece as a second pass does.
from trimtab.optim.two_pass import frozen_norm_stats

Pair = tuple[Tensor, Tensor]


def architecture_entropy(alphas: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, ""]:
    """Sum over the blocks of the entropy of their mixtures.

    Args:
        alphas: weights of each block, which sum to one.

    Example:
        >>> round(architecture_entropy([torch.full((2, 2), 0.25)]).item(), 4)  # ln 4
        1.3863
    """
    if not alphas:
        raise ValueError("alphas must hold at least one block, got none")
    return torch.stack([torch.special.entr(a).sum() for a in alphas]).sum()


def entropy_weight(epoch: int, epochs: int) -> float:
    """How much the entropy counts: nothing in the first quarter, then more and more, 1 in the last epoch.

    Args:
        epoch: from 0.
        epochs: of the search, at least 2.

    Example:
        >>> [round(entropy_weight(epoch, 8), 3) for epoch in (0, 1, 2, 4, 7)]
        [0.0, 0.0, 0.102, 0.407, 1.0]
    """
    integer("epochs", epochs, 2), integer("epoch", epoch, 0, epochs - 1)
    quarter = epochs // 4
    if epoch < quarter:
        return 0.0
    return epoch / (epochs - 1) * math.log(epoch - quarter + 2) / math.log(epochs - quarter + 1)


class QuantNAS:
    """Searches: weights learn on one batch, the mixtures on another, in turns.

    Call `set_epoch(epoch)` before each epoch.

    Args:
        model: with `MixedOp`s.
        weight_optimizer: of all parameters but the mixtures' logits; see `weight_parameters`.
        alpha_optimizer: of the logits.
        epochs: of the search, at least 2.
        loss: of outputs and targets.
        entropy: weight of the entropy at the end.
        cost: weight of the bit operations, of which 0 is the least and 1 the most that could be chosen.
        clip: largest norm of the weights' gradient.
        generator: for the noise.

    Raises:
        ValueError: the model has no `MixedOp`, or a number is out of range.

    Example:
        >>> from trimtab.compress import MixedOp
        >>> model = nn.Sequential(MixedOp({"3 x 3": QuantNoiseConv2d(1, 1, 3), "1 x 1": QuantNoiseConv2d(1, 1, 1)}))
        >>> weights, logits = weight_parameters(model), [op.logits for op in mixed_ops(model)]
        >>> search = QuantNAS(model, torch.optim.Adam(weights), torch.optim.Adam(logits), epochs=4)
        >>> search.set_epoch(0)
        >>> pair = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
        >>> sorted(search.step(pair, pair)), len(search.genotype())
        (['cost', 'entropy', 'held_loss', 'loss'], 1)
    """

    def __init__(
        self,
        model: nn.Module,
        weight_optimizer: torch.optim.Optimizer,
        alpha_optimizer: torch.optim.Optimizer,
        epochs: int,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = F.l1_loss,
        entropy: float = 1e-3,
        cost: float = 0.0,
        clip: float = 5.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self.blocks = mixed_ops(model)
        if not self.blocks:
            raise ValueError("model must have a MixedOp, got none")
        self.epochs = integer("epochs", epochs, 2)
        self.entropy, self.cost = non_negative("entropy", entropy), non_negative("cost", cost)
        self.clip, self.loss, self.model = positive("clip", clip), loss, model
        self.weight_optimizer, self.alpha_optimizer = weight_optimizer, alpha_optimizer
        self.generator = torch.Generator() if generator is None else generator
        self.epoch = 0
        for conv in model.modules():
            if isinstance(conv, QuantNoiseConv2d):
                conv.generator = self.generator

    def set_epoch(self, epoch: int) -> None:
        """Sets the weight of the entropy for this epoch, from 0.

        Raises:
            ValueError: `epoch` is not in [0, epochs).
        """
        self.epoch = integer("epoch", epoch, 0, self.epochs - 1)

    def step(self, train: Pair, held: Pair) -> dict[str, Tensor]:
        """One step of the weights, then one of the mixtures.

        Args:
            train: inputs and targets for the weights.
            held: others for the mixtures.

        Returns:
            Both losses, the entropy, and the cost between 0 and 1, detached.

        Raises:
            ValueError: inputs and targets are not of one number, or there are none.
        """
        for name, (x, y) in (("train", train), ("held", held)):
            if len(x) != len(y) or not len(x):
                raise ValueError(f"{name} must be of one target a sample, at least one, got {len(x)} and {len(y)}")
        self.model.train()
        weights = weight_parameters(self.model)
        loss = self.loss(self.model(train[0]), train[1])
        self.weight_optimizer.zero_grad()
        (loss + self._entropy_term()[0]).backward()
        nn.utils.clip_grad_norm_(weights, self.clip)
        self.weight_optimizer.step()

        with frozen_norm_stats(self.model):
            held_loss = self.loss(self.model(held[0]), held[1])
        term, entropy = self._entropy_term()
        cost = self.relative_cost()
        self.alpha_optimizer.zero_grad()
        (held_loss + term + self.cost * cost).backward()
        self.alpha_optimizer.step()
        found = {"loss": loss, "held_loss": held_loss, "entropy": entropy, "cost": cost}
        return {name: value.detach() for name, value in found.items()}

    def _entropy_term(self) -> tuple[Tensor, Tensor]:
        entropy = architecture_entropy([block.alphas for block in self.blocks])
        return self.entropy * entropy_weight(self.epoch, self.epochs) * entropy, entropy

    def relative_cost(self) -> Float[Tensor, ""]:
        """Expected bit operations, from 0 for the cheapest choice to 1 for the dearest; after a forward pass."""
        tables = [block.costs() for block in self.blocks]
        spent = torch.stack([(b.alphas * table).sum() for b, table in zip(self.blocks, tables, strict=True)]).sum()
        least = torch.stack([table.min() for table in tables]).sum()
        most = torch.stack([table.max() for table in tables]).sum()
        return (spent - least) / (most - least).clamp(min=1.0)

    def genotype(self) -> list[tuple[str, int]]:
        """The operation and the number of bits that each block has chosen."""
        return [block.choice() for block in self.blocks]

    def state_dict(self) -> dict[str, Any]:
        """Weights and mixtures, both optimizers' states, the generator's and the epoch."""
        return {
            "model": self.model.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; one that does not fit changes nothing.

        Raises:
            ValueError: it is not the state of such a search.
        """
        own = self.state_dict()
        known = isinstance(state, Mapping) and state.keys() == own.keys()
        if not known or not all(fits(state[name], own[name]) for name in ("model", "generator")):
            raise ValueError("state must be one of QuantNAS with a model of these shapes, got another")
        epoch = integer("epoch", state["epoch"], 0, self.epochs - 1)
        before = own["weight_optimizer"]
        self.weight_optimizer.load_state_dict(state["weight_optimizer"])  # refuses before it changes anything
        try:
            self.alpha_optimizer.load_state_dict(state["alpha_optimizer"])
        except (ValueError, KeyError):
            self.weight_optimizer.load_state_dict(before)
            raise
        self.model.load_state_dict(state["model"])
        self.generator.set_state(state["generator"])
        self.epoch = epoch
