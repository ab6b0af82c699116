"""GLAD: do LoRA adapters generalise better when the sharpness-aware gradient steers their steps?

Built from the abstract: the rule by which the gradient is steered is reconstructed, and rank and radius are not the
authors'. The paper tunes CLIP on base classes and tests on novel ones and on other domains; here an MLP goes from
upright clothes to some turned by 60 degrees, and other angles are the other domains. The baseline LoRA is peft's, and
chooses among eight learning rates; here four rates and two radii are tried. All have rank 8. Steps along a steered
gradient take two passes each, those of LoRA one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from trimtab.finetune import GradientSteering, LoRAConfig, apply_adapter
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.fine_tuning import far_turned_clothes, hidden_layers, sam, undecayed
from trimtab.studies.tools.training import Parameters, Plan, Training


def lora(network: nn.Module, plan: Plan) -> None:
    """Rank 8, as for the baselines, and the head."""
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        apply_adapter(network, LoRAConfig(r=8, target_modules=hidden_layers(network)))
    network.get_submodule("head").requires_grad_(True)


def steered(mode: str, parameters: Parameters, plan: Plan) -> torch.optim.Optimizer:
    """Steering around AdamW; the setting has its radius."""
    return GradientSteering(undecayed(parameters, plan), rho=float(plan.setting["rho"]), mode=mode)  # type: ignore[arg-type]


def entrant(optimizer: Callable[[Parameters, Plan], torch.optim.Optimizer]) -> Training:
    """Those that look uphill choose among four learning rates and two radii."""
    return Training(prepare=lora, optimizer=optimizer, search={"lr": (3e-3, 1e-2, 3e-2, 0.1), "rho": (0.01, 0.05)})


study = Study(
    paper="glad",
    entrants={"GLAD": entrant(partial(steered, "steer"))},
    controls={
        "LoRA with SAM": entrant(sam),
        "GLAD, projection alone": entrant(partial(steered, "project")),
    },
    on=[far_turned_clothes],
    headline=Claim("GLAD", beats="LoRA", on="ood_accuracy", by=0.005),
    claims=[
        Claim("GLAD", beats="LoRA", on="target_accuracy"),
        Claim("GLAD", beats="LoRA", on="retention"),
        Claim("GLAD", beats="LoRA with SAM", on="ood_accuracy"),
        Claim("GLAD", beats="GLAD, projection alone", on="ood_accuracy"),
        Claim("GLAD", beats="full fine-tuning", on="ood_accuracy"),
    ],
)
