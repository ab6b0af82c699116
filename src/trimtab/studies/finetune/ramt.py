"""R-AMT: is switching weights off better than a new head on their features, and does gradient dropout forget less?

The paper masks CLIP's image encoder, and compares with zero-shot CLIP and with what leaves the encoder as it is
(prompts, adapters, a linear probe); here the hidden layers of an MLP pre-trained on upright clothes are masked for
clothes turned by 60 degrees, and the pre-trained network stands for zero-shot CLIP. The head stays as it is, as the
paper's text features do, while the baselines train theirs. The share of each conflicting gradient that may be dropped
is chosen with the learning rate, as the paper tunes it for each data set; the rates are raised for a training of 160
steps.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.finetune import MaskTuner, MaskTuningConfig, apply_adapter, mask_norm
from trimtab.ops.tempered_kl import tempered_kl
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.fine_tuning import far_turned_clothes, hidden_layers
from trimtab.studies.tools import baselines
from trimtab.studies.tools.training import Supervised, Training, Workbench


class Masking(Supervised):
    """Masks on the hidden layers, under a head that stays; the pre-trained network is the reference."""

    def __init__(self, bench: Workbench) -> None:
        network = bench.network()
        self.reference = copy.deepcopy(network).eval()
        apply_adapter(network, MaskTuningConfig(target_modules=hidden_layers(network)))
        super().__init__(bench, network)
        lam = float(bench.plan.setting.get("lam", 0.0))
        self.tuner = MaskTuner(network, self.optimizer, lam, generator=bench.plan.generator(3))

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.network.train()
        logits = self.network(x)
        with torch.no_grad():
            before = self.reference(x)
        loss = F.cross_entropy(logits, y) + 1e-4 * mask_norm(self.network)
        return self.tuner.step(loss, tempered_kl(logits, before).mean())["main"]


class Unchanged(Supervised):
    """The pre-trained network as it is."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        self.network.requires_grad_(False)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return torch.zeros((), device=x.device)


study = Study(
    paper="ramt",
    entrants={
        "R-AMT": Training(
            rule=Masking, optimizer=baselines.adam, search={"lr": (1e-4, 3e-4, 1e-3, 3e-3), "lam": (0.5, 1.0)}
        )
    },
    controls={
        "mask tuning without dropout": Training(
            rule=Masking, optimizer=baselines.adam, search={"lr": (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3)}
        ),
        "pre-trained network": Training(rule=Unchanged, search={}),
    },
    on=[far_turned_clothes],
    headline=Claim("R-AMT", beats="linear probe", on="target_accuracy"),
    claims=[
        Claim("R-AMT", beats="pre-trained network", on="target_accuracy", by=0.05),
        Claim("R-AMT", beats="LoRA", on="target_accuracy"),
        Claim("R-AMT", beats="mask tuning without dropout", on="target_accuracy"),
        Claim("R-AMT", beats="mask tuning without dropout", on="retention"),
        Claim("R-AMT", beats="LoRA", on="retention"),
        Claim("R-AMT", beats="linear probe", on="ood_accuracy"),
    ],
)
