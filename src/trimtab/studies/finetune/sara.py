"""SaRA: does training the smallest weights alone forget less than LoRA does with as many trained numbers?

The paper fine-tunes Stable Diffusion and judges by FID and CLIP scores; here an MLP goes from upright to turned
clothes, and what it still knows of the upright ones stands for the kept prior. It trains as many entries of the hidden
layers as a LoRA of rank 8 has numbers, chosen by a quantile in place of the paper's threshold, and the head, as the
baselines do; there is no weight decay, as for LoRA. The penalty is computed on every fourth step with four times its
weight, because its decomposition is expensive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from trimtab.finetune import AdapterConfig, SaRAConfig, SparseScatter, apply_adapter, nuclear_norm_penalty, reselect
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.fine_tuning import far_turned_clothes, hidden_layers, undecayed
from trimtab.studies.tools.training import Plan, Supervised, Training, Workbench


def share(network: nn.Module, r: int = 8) -> float:
    """Which share of the hidden layers' weights a LoRA of rank r has numbers."""
    shapes = [cast(nn.Linear, network.get_submodule(name)).weight.shape for name in hidden_layers(network)]
    return min(1.0, sum(r * (out + inp) for out, inp in shapes) / sum(out * inp for out, inp in shapes))


@dataclass(frozen=True, kw_only=True)
class RandomEntries(AdapterConfig):
    """As many entries, at random places."""

    quantile: float
    seed: int

    def build(self, weight: Tensor) -> SparseScatter:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        return SparseScatter(weight, order[: round(self.quantile * weight.numel())], float("inf"))


def smallest(network: nn.Module, plan: Plan) -> None:
    """The smallest entries of the hidden layers, as many as LoRA has numbers, and the head."""
    apply_adapter(network, SaRAConfig(quantile=share(network), target_modules=hidden_layers(network)))
    network.get_submodule("head").requires_grad_(True)


def random_entries(network: nn.Module, plan: Plan) -> None:
    """As many, at random places, and the head."""
    config = RandomEntries(quantile=share(network), seed=plan.seed, target_modules=hidden_layers(network))
    apply_adapter(network, config)
    network.get_submodule("head").requires_grad_(True)


class Sparse(Supervised):
    """The whole of SaRA: the penalty on every fourth step, four times as large, and the reselection half-way."""

    every = 4

    def __init__(self, bench: Workbench) -> None:
        network = bench.network()
        smallest(network, bench.plan)
        super().__init__(bench, network)
        self.penalty = self._low_rank
        self.generator = bench.plan.generator(3)
        self.half, self.steps = bench.plan.epochs * bench.plan.steps_per_epoch // 2, 0

    def _low_rank(self, logits: Any, x: Any, index: Any) -> Tensor:
        if self.steps % self.every:
            return torch.zeros((), device=logits.device)
        return self.every * 5e-4 * nuclear_norm_penalty(self.network, generator=self.generator)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        if self.steps == self.half:
            reselect(self.network, self.optimizer)
        loss = super().step(x, y, index)
        self.steps += 1
        return loss


study = Study(
    paper="sara",
    entrants={"SaRA": Training(rule=Sparse, optimizer=undecayed)},
    controls={
        "SaRA without rank and reselection": Training(prepare=smallest, optimizer=undecayed),
        "random entries": Training(prepare=random_entries, optimizer=undecayed),
    },
    on=[far_turned_clothes],
    headline=Claim("SaRA", beats="LoRA", on="retention"),
    claims=[
        Claim("SaRA", beats="LoRA", on="target_accuracy", by=-0.01),
        Claim("SaRA", beats="full fine-tuning", on="retention"),
        Claim("SaRA without rank and reselection", beats="random entries", on="retention"),
        Claim("SaRA without rank and reselection", beats="random entries", on="target_accuracy", by=-0.01),
        Claim("SaRA", beats="SaRA without rank and reselection", on="retention"),
        Claim("SaRA", below="LoRA", on="vector_drift"),
    ],
)
