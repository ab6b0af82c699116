"""Three clusters in a line, of which the rare one in the middle lies where mixtures of the outer two fall."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import optim
from trimtab.optim.adamixup import Region, mix, mixup
from trimtab.studies.engine.study import Metric, Result, Trial
from trimtab.studies.optim.adamixup.rules import Mixing, Model, ModelFactory, Parts
from trimtab.studies.tools.training import Training, Workbench, fit, predict

METRICS = {
    "test_accuracy": Metric("test accuracy (%)", percent=True),
    "middle_accuracy": Metric("test accuracy on the middle cluster (%)", percent=True),
    "intruding": Metric("mixtures of outer clusters that fall on the middle one (%)", best="min", percent=True),
}
# At a tenth of the samples, the mixtures of the outer clusters that fall on the middle one outweigh its own samples and
# mixtures by two to one, if weights are uniform.
MIDDLE, SPREAD = 0.1, 0.15


def clusters(
    sizes: tuple[int, int, int], generator: torch.Generator
) -> tuple[Float[Tensor, "samples 2"], Int[Tensor, " samples"]]:
    """Round clusters around (-1, 0), (0, 0) and (1, 0), one after the other, labelled 0, 1, 0."""
    centres = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(torch.tensor(sizes))
    noise = SPREAD * torch.randn(len(centres), 2, generator=generator)
    return torch.stack([centres, torch.zeros_like(centres)], 1) + noise, (centres == 0).long()


@torch.no_grad()
def mixtures(model: Model, parts: Float[Tensor, "2 batch ..."], generator: torch.Generator) -> Tensor:
    """What a contestant would make of these pairs in training."""
    if isinstance(model, optim.AdaMixUp):
        e = torch.rand(parts.shape[1], 1, generator=generator).to(parts)
        region = Region.from_logits(model.policy(parts, generator=generator))
        return mix(parts, region.weights(torch.cat([e, 1 - e], 1)))
    if not model.alpha:
        return parts[0]
    count, labels = parts.shape[1], torch.ones(2 * parts.shape[1], 1)
    partner = torch.arange(2 * count).roll(count)
    mixed, _ = mixup(parts.flatten(0, 1), labels, model.alpha, partner=partner, generator=generator)
    return mixed[:count]


def train(make: ModelFactory, trial: Trial) -> Result:
    """Tell the middle cluster from the outer two with an MLP; in the test all three are of one size."""
    total = trial.pick(smoke=256, laptop=1024, paper=1024)
    middle = round(MIDDLE * total)
    left = (total - middle) // 2
    draws, each = trial.generator(), 1000
    x, y = clusters((left, middle, total - left - middle), draws)
    x_test, y_test = (part.to(trial.device) for part in clusters((each, each, each), draws))

    def trunk(side_by_side: int) -> nn.Module:
        return nn.Sequential(nn.Linear(2 * side_by_side, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())

    data = (x.to(trial.device), y.to(trial.device))
    epochs, adam = trial.pick(smoke=20, laptop=250, paper=400), replace(trial, setting={"lr": 1e-3})
    bench = Workbench(Training(), nn.Identity, data, data, num_classes=2, epochs=epochs, trial=adam)
    rule = Mixing(make, bench, Parts(trunk, 64, 2))
    fit(bench, rule)
    right = (predict(rule, x_test).argmax(1) == y_test).float()
    mixed = mixtures(rule.model, torch.stack([x_test[:each], x_test[-each:]]), trial.generator(3))
    return Result(
        {
            "test_accuracy": right.mean().item(),
            "middle_accuracy": right[each : 2 * each].mean().item(),
            "intruding": (mixed.norm(dim=1) < 2 * SPREAD).float().mean().item(),
        }
    )
