"""SORSA: faster and better than LoRA and PiSSA at equal rank, with singular vectors that hardly move?

The paper fine-tunes Llama 2 7B on mathematics with rank 128; here an MLP goes from upright to turned digits with rank 8
(gamma 4e-4 as in the paper). Speed, drift and retention are those of the setting that is best on held-out images, and
depend on its learning rate. LoRA and PiSSA are peft's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.finetune import SORSAConfig, apply_adapter, orthonormality_penalty
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.fine_tuning import hidden_layers, turned_30, turned_45, undecayed
from trimtab.studies.tools.training import Plan, Training


def sorsa(network: nn.Module, plan: Plan) -> None:
    """Rank 8, as for the baselines, and the head."""
    apply_adapter(network, SORSAConfig(r=8, target_modules=hidden_layers(network)))
    network.get_submodule("head").requires_grad_(True)


class Regulariser:
    """As the authors train: gamma = 4e-4, over the base learning rate."""

    def __init__(self, network: nn.Module, plan: Plan) -> None:
        self.network, self.weight = network, 4e-4 / plan.lr

    def __call__(self, logits: Any, x: Any, index: Any) -> Tensor:
        return self.weight * orthonormality_penalty(self.network)


study = Study(
    paper="sorsa",
    entrants={"SORSA": Training(prepare=sorsa, penalty=Regulariser, optimizer=undecayed)},
    controls={"SORSA without regulariser": Training(prepare=sorsa, optimizer=undecayed)},
    on=[turned_45, turned_30],
    headline=Claim("SORSA", beats="PiSSA", on="target_accuracy", at=turned_45),
    claims=[
        Claim("SORSA", beats="LoRA", on="target_accuracy", at=turned_45),
        Claim("SORSA", beats="full fine-tuning", on="target_accuracy", at=turned_45),
        Claim("SORSA", below="PiSSA", on="steps_to_loss", at=turned_45),
        Claim("SORSA", below="LoRA", on="steps_to_loss", at=turned_45),
        Claim("SORSA", beats="full fine-tuning", on="retention", at=turned_45),
        Claim("SORSA", below="SORSA without regulariser", on="vector_drift", at=turned_45),
        Claim("SORSA", below="LoRA", on="vector_drift", at=turned_45),
    ],
)
