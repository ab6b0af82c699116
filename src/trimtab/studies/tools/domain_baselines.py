"""What everyone would want to see beside a method of domain generalisation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.domain.environments import DomainBatch
from trimtab.domain.styles import instance_statistics, restyle
from trimtab.nets import Classifier
from trimtab.optim.two_pass import SAM
from trimtab.studies.tools.domain_training import (
    DomainBench,
    DomainPlan,
    Penalty,
    Risk,
    RiskMinimization,
    Seen,
    adamw,
)


def irm(network: Classifier, plan: DomainPlan) -> Penalty:
    """IRMv1: the squared gradient in a scale of the logits, from two halves of each domain's batch, so that it is
    unbiased (arXiv 1907.02893)."""

    def penalty(seen: Seen) -> Tensor:
        terms = []
        for logits, targets in zip(seen.logits, seen.targets, strict=True):
            scale = torch.ones((), device=logits.device, requires_grad=True)
            halves = [F.cross_entropy(logits[part::2] * scale, targets[part::2]) for part in (0, 1)]
            slopes = [torch.autograd.grad(half, scale, create_graph=True)[0] for half in halves]
            terms.append(slopes[0] * slopes[1])
        return torch.stack(terms).mean()

    return penalty


def v_rex(network: Classifier, plan: DomainPlan) -> Penalty:
    """V-REx: the variance of the domains' losses (arXiv 2003.00688)."""

    def penalty(seen: Seen) -> Tensor:
        return torch.stack(seen.losses).var(correction=0)

    return penalty


def coral(network: Classifier, plan: DomainPlan) -> Penalty:
    """Deep CORAL over all pairs of domains: distances of the features' means and covariances (arXiv 1607.01719)."""

    def penalty(seen: Seen) -> Tensor:
        means = torch.stack([z.mean(0) for z in seen.features])
        spreads = torch.stack([z.T.cov() for z in seen.features])
        first, second = torch.triu_indices(len(means), len(means), offset=1)
        apart = (means[first] - means[second]).square().mean() + (spreads[first] - spreads[second]).square().mean()
        return apart if len(first) else 0 * means.sum()

    return penalty


def group_dro(plan: DomainPlan) -> Risk:
    """GroupDRO: domains weigh more the more is lost in them, by exponentiated gradient ascent (arXiv 1911.08731)."""
    log_weights = torch.zeros(plan.num_domains)
    rate = float(plan.setting["eta"])

    def risk(losses: Tensor) -> Tensor:
        nonlocal log_weights
        log_weights = (log_weights.to(losses) + rate * losses.detach()).log_softmax(0)
        return (log_weights.exp() * losses).sum()

    return risk


def sam(parameters: Any, plan: DomainPlan) -> torch.optim.Optimizer:
    """Sharpness-aware minimisation around AdamW, at the setting's radius."""
    return SAM(adamw(parameters, plan), rho=float(plan.setting["rho"]))


class MixedDomains(RiskMinimization):
    """Mixup between domains: each with another one, sample by sample (arXiv 2001.00677)."""

    def __init__(self, bench: DomainBench) -> None:
        super().__init__(bench)
        self.alpha, self.draws = float(bench.plan.setting["alpha"]), bench.plan.generator(3)

    def objective(self, batch: DomainBatch) -> Tensor:
        count = min(len(y) for _, y in batch)
        if len(batch) > 1:
            shift = int(torch.randint(1, len(batch), (), generator=self.draws))
            partners = [batch[(i + shift) % len(batch)] for i in range(len(batch))]
        else:
            order = torch.randperm(count, generator=self.draws)
            partners = [(x[order], y[order]) for x, y in batch]
        shares = _beta((len(batch),), self.alpha, self.draws).tolist()
        mixed = [
            a * x[:count] + (1 - a) * x2[:count] for a, (x, _), (x2, _) in zip(shares, batch, partners, strict=True)
        ]
        said = self.network(torch.cat(mixed)).split(count)
        losses = [
            a * F.cross_entropy(logits, y[:count]) + (1 - a) * F.cross_entropy(logits, y2[:count])
            for a, logits, (_, y), (_, y2) in zip(shares, said, batch, partners, strict=True)
        ]
        return torch.stack(losses).mean()


class MixStyle(nn.Module):
    """In every other batch, statistics of each feature map are mixed with another's (arXiv 2104.02008)."""

    def __init__(self, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.alpha, self.generator = alpha, generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or torch.rand((), generator=self.generator) > 0.5:
            return x
        mean, std = (held.detach() for held in instance_statistics(x))
        order = torch.randperm(len(x), generator=self.generator)
        share = _beta((len(x), 1, 1, 1), self.alpha, self.generator).to(x)
        mixed = (share * held + (1 - share) * held[order] for held in (mean, std))
        return restyle((x - mean) / std, *mixed)


def _beta(shape: tuple[int, ...], alpha: float, generator: torch.Generator) -> Tensor:
    """Draws of Beta(alpha, alpha), as shares of two Gamma variables."""
    gammas = torch._standard_gamma(torch.full((2, *shape), alpha, dtype=torch.float64), generator=generator)
    return gammas[0] / gammas.sum(0)


BLOCKS = ("2", "5")
"""Where the small CNN's two blocks of convolution, normalisation and rectification end."""


def mix_style(network: Classifier, plan: DomainPlan) -> None:
    """MixStyle after both blocks of the small CNN, or on the images where there are none, at the setting's alpha."""
    alpha = float(plan.setting["alpha"])
    assert isinstance(network.features, nn.Sequential)
    if not any(isinstance(layer, nn.Conv2d) for layer in network.features):
        network.features = nn.Sequential(MixStyle(alpha, plan.generator(4)), network.features)
        return
    for number, name in enumerate(BLOCKS):
        block = network.features.get_submodule(name)
        network.features.set_submodule(name, nn.Sequential(block, MixStyle(alpha, plan.generator(4 + number))))
