"""What everyone would want to see beside a method of supervised training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.losses.co_teaching import CoTeaching
from trimtab.optim.adamixup import mixup
from trimtab.optim.two_pass import SAM
from trimtab.studies.tools.training import Parameters, Plan, Rule, Supervised, Workbench, sgd


def label_smoothing(plan: Plan) -> nn.Module:
    """Cross-entropy on labels of which a tenth is spread over all classes."""
    return nn.CrossEntropyLoss(label_smoothing=0.1)


def adam(parameters: Parameters, plan: Plan) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(parameters, lr=plan.lr)


def adamw(parameters: Parameters, plan: Plan) -> torch.optim.Optimizer:
    """AdamW; a weight decay of 0.01, torch's own, unless the setting says otherwise."""
    return torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=float(plan.setting.get("weight_decay", 0.01)))


def sam(parameters: Parameters, plan: Plan) -> torch.optim.Optimizer:
    """Sharpness-aware minimisation around SGD, with its authors' radius unless the setting says otherwise."""
    return SAM(sgd(parameters, plan), rho=float(plan.setting.get("rho", 0.05)))


def dropout(network: nn.Module, plan: Plan) -> None:
    """Dropout in front of the head, at the setting's rate."""
    network.features = nn.Sequential(network.features, nn.Dropout(float(plan.setting["rate"])))  # type: ignore[arg-type]


class MixUp(Supervised):
    """Plain training on convex combinations of pairs; their weights are Beta(alpha, alpha), the setting's alpha."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        self.alpha = float(bench.plan.setting.get("alpha", 1.0))
        self.num_classes = bench.plan.num_classes
        self.generator = bench.plan.generator(3)

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        self.network.train()
        mixed, soft = mixup(x, F.one_hot(y, self.num_classes).to(x), self.alpha, generator=self.generator)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            value: Tensor = F.cross_entropy(self.network(mixed), soft)
            value.backward()
            return value.detach()

        value: Tensor = self.optimizer.step(closure)  # type: ignore[assignment, arg-type]
        return value


def mixed_inputs(bench: Workbench) -> Rule:
    """MixUp."""
    return MixUp(bench)


class Taught:
    """Two networks that teach each other, as the training loop asks for."""

    def __init__(self, rule: CoTeaching) -> None:
        self.rule = rule
        self.optimizers = rule.optimizers
        self.set_epoch, self.predict = rule.set_epoch, rule.predict

    def step(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return self.rule.step(x, y)["loss_0"]


def co_teaching(bench: Workbench) -> Rule:
    """Co-teaching of two new networks, at the setting's forget rate, which rises over a sixth of the training."""
    networks = [bench.network(which) for which in range(2)]
    made = [bench.make_optimizer(network.parameters()) for network in networks]
    rate = float(bench.plan.setting["forget_rate"])
    return Taught(CoTeaching(networks, made, forget_rate=rate, rampup_epochs=max(1, bench.plan.epochs // 6)))
