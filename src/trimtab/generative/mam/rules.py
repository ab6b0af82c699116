"""The three ways to train them: on data, on an energy by the reverse KL divergence, on an energy by matching."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from trimtab.generative.mam.marginals import LogProb, Marginals, marginal_consistency_loss, reverse_kl_surrogate
from trimtab.ops.arguments import integer, positive, same_shape
from trimtab.ops.ordering import (
    MaskedModel,
    any_order_loss,
    any_order_sample,
    checked_tokens,
    hide,
    random_ranks,
)


class _Rule:
    """What the three rules share: the network, its optimizer, a generator, and sequences that block Gibbs moves."""

    def __init__(
        self,
        marginals: Marginals,
        optimizer: torch.optim.Optimizer,
        length: int,
        *,
        samples: int,
        gibbs_steps: int,
        generator: torch.Generator | None,
    ) -> None:
        if not isinstance(marginals, Marginals):
            raise TypeError(f"marginals must be a Marginals, got {type(marginals).__name__}")
        self.marginals, self.optimizer, self.generator = marginals, optimizer, generator
        self.length = integer("length", length)
        self.gibbs_steps = integer("gibbs_steps", gibbs_steps, 1, self.length)
        device = next(marginals.parameters()).device
        start = torch.randint(marginals.mask_id, (integer("samples", samples, 2), length), generator=generator)
        self.samples = start.to(device)

    def checked(self, tokens: Tensor) -> Tensor:
        """Whole sequences of the length; others are refused before anything is drawn."""
        checked_tokens(tokens)
        values = self.marginals.mask_id
        if tokens.shape[1] != self.length or bool(((tokens < 0) | (tokens >= values)).any()):
            wanted = f"whole sequences of {self.length} tokens in [0, {values})"
            low, high = (int(end) for end in tokens.aminmax())
            raise ValueError(f"tokens must be {wanted}, got shape {tuple(tokens.shape)} in [{low}, {high}]")
        return tokens

    def gibbs(self) -> Int[Tensor, "samples length"]:
        """Move the samples: the last positions of a random order are erased and drawn anew from the conditionals."""
        nothing = torch.zeros_like(self.samples, dtype=torch.bool)
        known = random_ranks(nothing, generator=self.generator) < self.length - self.gibbs_steps
        mask_id = self.marginals.mask_id
        erased = hide(self.samples, known, mask_id)
        self.samples = any_order_sample(self.marginals.conditional, erased, mask_id, generator=self.generator)
        return self.samples

    def consistency(self, tokens: Tensor, conditional: MaskedModel | None = None) -> Tensor:
        """The length times the mean squared error, and the square of what nothing known has."""
        mask_id = self.marginals.mask_id
        along = marginal_consistency_loss(
            self.marginals.log_marginal,
            conditional or self.marginals.conditional,
            tokens,
            mask_id,
            generator=self.generator,
        )
        return self.length * along.mean() + self.nothing_known(tokens).square()

    def nothing_known(self, tokens: Tensor) -> Tensor:
        """The log-marginal of nothing, which should be 0."""
        return self.marginals.log_marginal(torch.full_like(tokens[:1], self.marginals.mask_id))[0]

    def _descend(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a continued training needs."""
        return {
            "marginals": self.marginals.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "samples": self.samples,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; one that does not fit is refused and changes nothing."""
        before = copy.deepcopy(self.state_dict())
        try:
            self._restore(state)
        except Exception:
            self._restore(before)
            raise

    def _restore(self, state: dict[str, Any]) -> None:
        same_shape("samples", state["samples"], "those held", self.samples)
        self.marginals.load_state_dict(state["marginals"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.samples = state["samples"].clone()
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])


def target_of(target: LogProb, tokens: Tensor) -> Tensor:
    """The target's numbers, without gradient; anything but one a sequence is refused."""
    value = target(tokens).detach()
    if value.shape != tokens.shape[:1]:
        raise ValueError(f"target must give one number a sequence, of shape ({len(tokens)},), got {tuple(value.shape)}")
    return value


class MarginalLikelihood(_Rule):
    """MaM on data, in two stages: the conditionals by maximum likelihood, then the marginals to agree with them.

    Args:
        marginals: both networks.
        optimizer: over the parameters of both.
        length: of the sequences.
        samples: how many of the model's own sequences the second stage is also trained on; as many as a batch has data.
        gibbs_steps: how many positions of these are drawn anew in a step.
        generator: of all draws.

    Example:
        >>> scores = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 2))
        >>> marginal = nn.Sequential(nn.Embedding(3, 8), nn.Flatten(), nn.Linear(32, 1))
        >>> marginals = Marginals(scores, marginal, mask_id=2)
        >>> rule = MarginalLikelihood(marginals, torch.optim.Adam(marginals.parameters()), length=4, samples=8)
        >>> data = torch.randint(2, (8, 4))
        >>> losses = rule.step_conditionals(data), rule.step_marginals(data)
    """

    def __init__(
        self,
        marginals: Marginals,
        optimizer: torch.optim.Optimizer,
        length: int,
        *,
        samples: int = 64,
        gibbs_steps: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(marginals, optimizer, length, samples=samples, gibbs_steps=gibbs_steps, generator=generator)

    def step_conditionals(self, tokens: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
        """A step of the first stage; the loss is in nats a sequence."""
        model, mask_id = self.marginals.conditional, self.marginals.mask_id
        loss = any_order_loss(model, self.checked(tokens), mask_id, generator=self.generator).mean()
        return self._descend({"loss": loss})

    def step_marginals(self, tokens: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
        """A step of the second stage, half on data and half on the model's own samples; the conditionals rest."""

        def frozen(tokens: Tensor) -> Tensor:
            with torch.no_grad():
                scores: Tensor = self.marginals.conditional(tokens)
            return scores

        both = torch.cat([self.checked(tokens), self.gibbs()])
        return self._descend({"loss": self.consistency(both, frozen)})


class MarginalKL(_Rule):
    """MaM on an energy, by the reverse KL divergence: the score-function estimate on samples that block Gibbs moves.

    The marginals get the gradient of the divergence, and the conditionals follow them by consistency.

    Args:
        marginals: both networks.
        optimizer: over the parameters of both.
        length: of the sequences.
        target: the log-probability to be matched, up to a constant.
        alpha: weight of the consistency.
        samples: sequences in the buffer, all used in every step.
        gibbs_steps: how many positions are drawn anew in a step.
        generator: of all draws.

    Example:
        >>> scores = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 2))
        >>> marginal = nn.Sequential(nn.Embedding(3, 8), nn.Flatten(), nn.Linear(32, 1))
        >>> marginals = Marginals(scores, marginal, mask_id=2)
        >>> optimizer = torch.optim.Adam(marginals.parameters())
        >>> rule = MarginalKL(marginals, optimizer, 4, lambda tokens: tokens.sum(1).float())
        >>> sorted(rule.step())
        ['consistency', 'divergence', 'loss']
    """

    def __init__(
        self,
        marginals: Marginals,
        optimizer: torch.optim.Optimizer,
        length: int,
        target: LogProb,
        *,
        alpha: float = 4.0,
        samples: int = 128,
        gibbs_steps: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        self.target, self.alpha = target, positive("alpha", alpha)
        super().__init__(marginals, optimizer, length, samples=samples, gibbs_steps=gibbs_steps, generator=generator)
        target_of(target, self.samples)

    def step(self) -> dict[str, Tensor]:
        """Move the samples and train on them."""
        tokens = self.gibbs()
        divergence = reverse_kl_surrogate(self.marginals.log_marginal(tokens), target_of(self.target, tokens))
        consistency = self.consistency(tokens)
        loss = divergence + self.alpha * consistency
        return self._descend({"loss": loss, "divergence": divergence, "consistency": consistency})


class MarginalFM(_Rule):
    """MaM on an energy, by matching: log-marginals of whole sequences are fitted to the target itself.

    The constant of the target is learned with it, as `log_partition`: log-marginals of whole sequences are matched to
    the target less this, and that of nothing known is held to 0 (in the authors' release to the constant, see the
    module). Consistency is asked for on given sequences and on the model's own, half each where they are as many.

    Args:
        marginals: both networks.
        optimizer: over the parameters of both; `log_partition` is added to it as a group of its own.
        length: of the sequences.
        target: the log-probability to be matched, up to a constant.
        alpha: weight of the consistency.
        samples: the model's own sequences.
        gibbs_steps: how many of their positions are drawn anew in a step.
        partition_lr: learning rate of `log_partition`, which starts at that of a uniform target.
        generator: of all draws.

    Example:
        >>> scores = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 2))
        >>> marginal = nn.Sequential(nn.Embedding(3, 8), nn.Flatten(), nn.Linear(32, 1))
        >>> marginals = Marginals(scores, marginal, mask_id=2)
        >>> optimizer = torch.optim.Adam(marginals.parameters())
        >>> rule = MarginalFM(marginals, optimizer, 4, lambda tokens: tokens.sum(1).float())
        >>> sorted(rule.step(torch.randint(2, (8, 4))))
        ['consistency', 'loss', 'matching']
    """

    def __init__(
        self,
        marginals: Marginals,
        optimizer: torch.optim.Optimizer,
        length: int,
        target: LogProb,
        *,
        alpha: float = 4.0,
        samples: int = 128,
        gibbs_steps: int = 4,
        partition_lr: float = 5e-2,
        generator: torch.Generator | None = None,
    ) -> None:
        self.target, self.alpha = target, positive("alpha", alpha)
        positive("partition_lr", partition_lr)
        super().__init__(marginals, optimizer, length, samples=samples, gibbs_steps=gibbs_steps, generator=generator)
        target_of(target, self.samples)
        start = torch.tensor(length * math.log(marginals.mask_id), device=self.samples.device)
        self.log_partition = nn.Parameter(start)
        optimizer.add_param_group({"params": [self.log_partition], "lr": partition_lr})

    def step(self, tokens: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
        """Train on sequences, such as uniformly random ones, and on the model's own."""
        wanted = target_of(self.target, self.checked(tokens)) - self.log_partition
        consistency = self.consistency(torch.cat([tokens, self.gibbs()]))
        matching = (self.marginals.log_marginal(tokens) - wanted).square().mean()
        loss = 0.5 * matching + self.alpha * consistency
        return self._descend({"loss": loss, "matching": matching, "consistency": consistency})

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "log_partition": self.log_partition.detach()}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        with torch.no_grad():
            self.log_partition.copy_(state["log_partition"])
