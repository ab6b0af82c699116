"""SoMA: do the minor components generalise better to other domains than the principal ones, when both are adapted?

The paper tunes DINOv2-L for segmentation and detection on one domain and tests on others; here an MLP goes from upright
clothes to some turned by 60 degrees, and the other domains are other angles. Rank 8 on both hidden layers, as for LoRA
and PiSSA, with the biases of these layers; the weight decay falls from 0.05 to 1e-5. PiSSA has neither; a control
adapts the principal components with both. The network has no blocks to leave frozen: a control adapts its last hidden
layer alone. Averaged weights, which the paper takes for dense tasks, are left out.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from trimtab.finetune import SoMAConfig, WeightDecayAnnealing, adapted_biases, apply_adapter
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.fine_tuning import far_turned_clothes, hidden_layers, lora, undecayed
from trimtab.studies.tools.training import Plan, Prepare, Supervised, Training, Workbench


def minor(network: nn.Module, plan: Plan) -> None:
    """Rank 8, as for the baselines, the biases of these layers, and the head."""
    apply_adapter(network, SoMAConfig(r=8, target_modules=hidden_layers(network)))
    adapted_biases(network, train=True)
    network.get_submodule("head").requires_grad_(True)


def late(network: nn.Module, plan: Plan) -> None:
    """The same, of the last hidden layer alone."""
    apply_adapter(network, SoMAConfig(r=8, target_modules=hidden_layers(network)[-1:]))
    adapted_biases(network, train=True)
    network.get_submodule("head").requires_grad_(True)


def principal(network: nn.Module, plan: Plan) -> None:
    """PiSSA, with the biases of its layers."""
    names = hidden_layers(network)
    lora("pissa", network, plan)
    for name in names:
        network.get_parameter(f"{name}.base_layer.bias").requires_grad_(True)


class Annealed(Supervised):
    """With a weight decay of 0.05 on all but biases, annealed over the training."""

    def __init__(self, bench: Workbench, adapt: Prepare = minor) -> None:
        network = bench.network()
        adapt(network, bench.plan)
        super().__init__(bench, network)
        trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = bench.make_optimizer(
            [
                {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.05},
                {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
            ]
        )
        self.optimizers = [self.optimizer]
        self.decay = WeightDecayAnnealing(self.optimizer, bench.plan.epochs * bench.plan.steps_per_epoch)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        loss = super().step(x, y, index)
        self.decay.step()
        return loss


study = Study(
    paper="soma",
    entrants={"SoMA": Training(rule=Annealed, optimizer=undecayed)},
    controls={
        "principal components, else as SoMA": Training(
            rule=partial(Annealed, adapt=principal), optimizer=undecayed, requires=("peft",)
        ),
        "SoMA without weight decay": Training(prepare=minor, optimizer=undecayed),
        "SoMA on the last hidden layer": Training(prepare=late, optimizer=undecayed),
    },
    on=[far_turned_clothes],
    headline=Claim("SoMA", beats="PiSSA", on="ood_accuracy", by=0.01),
    claims=[
        Claim("SoMA", beats="principal components, else as SoMA", on="ood_accuracy"),
        Claim("SoMA", beats="PiSSA", on="target_accuracy", by=-0.01),
        Claim("SoMA", beats="LoRA", on="ood_accuracy"),
        Claim("SoMA", beats="full fine-tuning", on="ood_accuracy"),
        Claim("SoMA", beats="PiSSA", on="retention"),
        Claim("SoMA", beats="SoMA without weight decay", on="ood_accuracy"),
        Claim("SoMA on the last hidden layer", beats="SoMA without weight decay", on="ood_accuracy"),
    ],
)
