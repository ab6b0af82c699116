"""Hard-attention gates: do channel gates, and a pass of their own for them, help where samples are few?

The paper sizes polyps in endoscopic images with a CNN and vision transformers that were pre-trained on ImageNet; here
an MLP goes from upright clothes to 400 turned ones, with gates on the outputs of its hidden layers. They start at a
sigmoid of 0.98, not near a half as the authors' do, so that the pre-trained network is not halved layer by layer. The
authors' rate of 0.01 hardly moves them in 160 steps, so that three larger ones are tried as well, in place of the
weight decays among which full fine-tuning chooses. Routing takes two passes a step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.finetune import GradientRouting, gate_parameters, insert_gates
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.fine_tuning import far_turned_clothes, hidden_layers
from trimtab.studies.tools import baselines
from trimtab.studies.tools.training import Plan, Supervised, Training, Workbench

OPEN = 4.0  # a sigmoid of 0.98: the pre-trained network nearly as it is


def split(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Gates, and all other parameters."""
    gates = gate_parameters(network)
    return list(gates.values()), [p for name, p in network.named_parameters() if name not in gates]


def one_optimizer(network: nn.Module, plan: Plan) -> list[dict[str, Any]]:
    """Gates on the hidden layers, trained with the weights, at a rate of their own and without weight decay."""
    insert_gates(network, hidden_layers(network), init=OPEN)
    gates, weights = split(network)
    return [{"params": weights}, {"params": gates, "lr": float(plan.setting["gate_lr"]), "weight_decay": 0.0}]


class Routed(Supervised):
    """The same gates, in a pass of their own, by Adam."""

    def __init__(self, bench: Workbench) -> None:
        network = bench.network()
        insert_gates(network, hidden_layers(network), init=OPEN)
        super().__init__(bench, network)
        gates, weights = split(network)
        main, gate = bench.make_optimizer(weights), torch.optim.Adam(gates, lr=float(bench.plan.setting["gate_lr"]))
        self.routing = GradientRouting(gate, main, network)
        self.optimizers = [main, gate]

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.network.train()
        return self.routing.step(lambda: F.cross_entropy(self.network(x), y))["main"]


search = {"lr": (1e-3, 3e-3), "gate_lr": (0.01, 0.1, 0.3, 1.0)}

study = Study(
    paper="hard_attention_gates",
    entrants={"gates with routing": Training(rule=Routed, optimizer=baselines.adamw, search=search)},
    controls={"gates, one optimizer": Training(prepare=one_optimizer, optimizer=baselines.adamw, search=search)},
    on=[far_turned_clothes],
    headline=Claim("gates with routing", beats="full fine-tuning", on="target_accuracy", by=0.003),
    claims=[
        Claim("gates with routing", beats="gates, one optimizer", on="target_accuracy"),
        Claim("gates, one optimizer", beats="full fine-tuning", on="target_accuracy"),
        Claim("gates with routing", beats="SAM", on="target_accuracy"),
        Claim("gates with routing", beats="R3F", on="target_accuracy"),
        Claim("gates with routing", beats="full fine-tuning", on="ood_accuracy"),
        Claim("gates with routing", beats="full fine-tuning", on="retention"),
    ],
)
