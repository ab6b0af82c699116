"""How an elastic model is trained: guidance from larger to smaller sub-networks, and the shape of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.compress.eqnet.subnets import (
    ElasticConfig,
    draw_form,
    elastic_layers,
    elastic_weights,
    sample_config,
    set_config,
    uniform_config,
)
from trimtab.ops.arguments import class_indices, in_range, integer, non_negative, real_problem, tensor_problem
from trimtab.ops.states import fits
from trimtab.ops.tempered_kl import tempered_kl


def weight_distribution_loss(
    weights: Sequence[Float[Tensor, "..."]],
    *,
    kurtosis: float = 1.8,
    kurtosis_weight: float = 0.015,
    skewness_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """How far the weights of layers are from a flat and symmetric shape; weights that are all alike have no gradient.

    Args:
        weights: of each layer, at least two numbers.
        kurtosis: the target; 1.8 is that of a uniform distribution.
        kurtosis_weight, skewness_weight: of the two terms.

    Raises:
        ValueError: there is no layer, or one of fewer than two weights.

    Example:
        >>> round(weight_distribution_loss([torch.linspace(-1, 1, 10_000)]).item(), 4)
        0.0
    """
    if not weights or min(w.numel() for w in weights) < 2:
        raise ValueError("weights must hold layers of at least two numbers, got fewer")
    if not -float("inf") < kurtosis < float("inf"):
        raise ValueError(f"kurtosis must be finite, got {kurtosis!r}")
    if not 0 <= kurtosis_weight < float("inf"):
        raise ValueError(f"kurtosis_weight must be finite and not negative, got {kurtosis_weight!r}")
    if not 0 <= skewness_weight < float("inf"):
        raise ValueError(f"skewness_weight must be finite and not negative, got {skewness_weight!r}")
    terms = []
    for w in weights:
        z = (w - w.mean()) / w.std().clamp_min(torch.finfo(w.dtype).tiny)  # zero where all weights are alike
        terms.append(kurtosis_weight * (z.pow(4).mean() - kurtosis) ** 2 + skewness_weight * z.pow(3).mean() ** 2)
    return torch.stack(terms).mean()


def guided_loss(
    logits: Float[Tensor, "batch classes"],
    targets: Int[Tensor, " batch"],
    guide: Float[Tensor, "batch classes"] | None = None,
    alpha: float = 0.5,
) -> Float[Tensor, ""]:
    """Cross-entropy, of which the share `alpha` gives way to the divergence from a larger sub-network's prediction.

    Args:
        logits: of the sub-network.
        targets: labels.
        guide: logits of the one before, which get no gradient; None, for the first one, leaves cross-entropy.
        alpha: in [0, 1].

    Example:
        >>> logits, targets = torch.zeros(2, 4), torch.tensor([0, 3])
        >>> [round(guided_loss(logits, targets, guide).item(), 4) for guide in (None, logits)]
        [1.3863, 0.6931]
    """
    if problem := tensor_problem(logits=logits, targets=targets, guide=guide):
        raise TypeError(problem)
    in_range("alpha", alpha, 0, 1)
    loss = F.cross_entropy(logits, targets)
    return loss if guide is None else alpha * tempered_kl(logits, guide).mean() + (1 - alpha) * loss


class EQNet:
    """Trains an elastic model: in each step the largest, a random and the smallest sub-network, in forms at random.

    Args:
        model: of `prepare_elastic`.
        optimizer: of all its parameters.
        alpha: share of the guidance, see `guided_loss`.
        distribution: weight of the weight-distribution loss.
        random_subnets: how many random ones there are between the largest and the smallest.
        largest_only: train the largest alone: what elasticity is compared with.
        clip: largest magnitude of a gradient's entry; None does not clip.
        generator: for bits and forms.

    Raises:
        ValueError: the model has no elastic layer, or a number is out of range.

    Example:
        >>> from trimtab.compress import prepare_elastic
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> elastic = prepare_elastic(model, torch.randn(16, 4))
        >>> rule = EQNet(elastic, torch.optim.Adam(elastic.parameters()), generator=torch.Generator().manual_seed(0))
        >>> sorted(rule.step(torch.randn(8, 4), torch.arange(8) % 2))
        ['distribution', 'largest', 'random', 'smallest', 'total']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        alpha: float = 0.5,
        distribution: float = 1.0,
        random_subnets: int = 1,
        largest_only: bool = False,
        clip: float | None = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if not elastic_layers(model):
            raise ValueError("model must have elastic layers, as prepare_elastic makes them, got none")
        self.alpha, self.distribution = in_range("alpha", alpha, 0, 1), non_negative("distribution", distribution)
        self.random_subnets = integer("random_subnets", random_subnets, 0)
        self.clip = None if clip is None else non_negative("clip", clip)
        self.model, self.optimizer, self.largest_only = model, optimizer, largest_only
        self.generator = torch.Generator() if generator is None else generator

    def configs(self) -> list[tuple[str, ElasticConfig]]:
        """The sub-networks of a step, each with the name of its loss."""
        choices = next(pair[0].choices for pair in elastic_layers(self.model).values())
        extremes = [
            ElasticConfig((bits,) * self._depth, (bits,) * self._depth, *draw_form(self.generator))
            for bits in (max(choices), min(choices))
        ]
        if self.largest_only:
            return [("largest", extremes[0])]
        random = [("random", sample_config(self.model, generator=self.generator)) for _ in range(self.random_subnets)]
        return [("largest", extremes[0]), *random, ("smallest", extremes[1])]

    @property
    def _depth(self) -> int:
        return len(elastic_layers(self.model))

    def step(self, x: Float[Tensor, "batch ..."], targets: Int[Tensor, " batch"]) -> dict[str, Tensor]:
        """One step.

        Args:
            x: inputs.
            targets: labels.

        Returns:
            The losses of the sub-networks, the weight-distribution loss and their `total`, detached.

        Raises:
            TypeError: `targets` is not int64.
            ValueError: there is not one label a sample, or no sample.
        """
        if problem := real_problem(x=x):
            raise TypeError(problem)
        class_indices("targets", targets)
        if targets.shape != x.shape[:1] or not len(targets):
            raise ValueError(f"targets must have shape ({len(x)},) and not be empty, got {tuple(targets.shape)}")
        self.model.train()
        self.optimizer.zero_grad()
        found: dict[str, Tensor] = {}
        guide: Tensor | None = None
        for name, config in self.configs():
            set_config(self.model, config)
            logits = self.model(x)
            loss = guided_loss(logits, targets, guide, self.alpha)
            loss.backward()
            guide = logits.detach()
            found[name] = found.get(name, 0) + loss.detach()
        shape = weight_distribution_loss(elastic_weights(self.model))
        if self.distribution:
            (self.distribution * shape).backward()
        if self.clip is not None:
            nn.utils.clip_grad_value_(self.model.parameters(), self.clip)
        self.optimizer.step()
        total = torch.stack(list(found.values())).sum() + self.distribution * shape.detach()
        return {**found, "distribution": shape.detach(), "total": total}

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch ..."], config: ElasticConfig | None = None) -> Tensor:
        """Logits in eval mode, of the largest sub-network unless another one is named."""
        choices = next(pair[0].choices for pair in elastic_layers(self.model).values())
        set_config(self.model, config or uniform_config(self.model, max(choices)))
        logits: Tensor = self.model.eval()(x)
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Weights and steps, the optimizer's state, and the generator's."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; one that does not fit changes nothing.

        Raises:
            ValueError: it is not the state of such a rule.
        """
        own = self.state_dict()
        known = isinstance(state, Mapping) and state.keys() == own.keys()
        if not known or not all(fits(state[name], own[name]) for name in ("model", "generator")):
            raise ValueError("state must be one of EQNet with a model of these shapes, got another")
        self.optimizer.load_state_dict(state["optimizer"])  # refuses what does not fit before it changes anything
        self.model.load_state_dict(state["model"])
        self.generator.set_state(state["generator"])
