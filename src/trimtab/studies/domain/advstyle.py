"""Does style noise of learned strength help where one style is all that training shows?

The paper trains ResNets on one domain of PACS; here a small CNN trains on digits over one photo region, or turned by
one angle, and is tested on all others. The layer stands after both blocks, as does DSU, which is the same layer with
the batch's own spread in all perturbed batches, two of three; MixStyle, a reference of the task, stands there too.
Strengths have no weight decay. Their reversed gradient has the authors' weight of 10, whose size counts little here:
AdamW divides gradients by their size, while the authors' SGD does not. A first result let AdvStyle choose this weight,
for nothing, from 1 and 10 at a small weight decay, and DSU the weight decay; AdvStyle was 2.5 points behind. Now both
choose from the same rates and decays, as do ERM and the control with a strength held. In that control the weight is 0,
so that strengths stay at the spread of the first batch. A rotation is no style, so that nothing but no harm is expected
there. The four settings stood on a grid at first; they are drawn at random now, as DomainBed does, and all that was
judged by the grid ran anew.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import domain
from trimtab.domain.styles import instance_statistics
from trimtab.nets import Classifier
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.domain_generalisation import (
    DomainPlan,
    DomainTraining,
    needs_pictures,
    one_photo,
    one_rotation,
)
from trimtab.studies.tools.domain_baselines import BLOCKS
from trimtab.studies.tools.domain_training import RiskMinimization, fit_domains, mean_accuracy

_CHANNELS = (16, 32)


def inserted(network: Classifier, plan: DomainPlan, *, p_adv: float, adv_weight: float = 10.0) -> None:
    """The layer after both blocks of the small CNN."""
    after = {f"features.{name}": channels for name, channels in zip(BLOCKS, _CHANNELS, strict=True)}
    domain.insert_advstyle(network, after, adv_weight=adv_weight, p_adv=p_adv, generator=plan.generator(12))


def undecayed(parameters: Any, plan: DomainPlan) -> torch.optim.Optimizer:
    """AdamW, without weight decay for strengths, which are four-dimensional with one row."""
    held = list(parameters)
    strengths = [p for p in held if p.ndim == 4 and len(p) == 1]
    others = [p for p in held if not (p.ndim == 4 and len(p) == 1)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": strengths, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.lr, weight_decay=plan.weight_decay)


advstyle = DomainTraining(prepare=partial(inserted, p_adv=1 / 3), optimizer=undecayed)
dsu = DomainTraining(prepare=partial(inserted, p_adv=0.0), optimizer=undecayed)
held = DomainTraining(prepare=partial(inserted, p_adv=1 / 3, adv_weight=0.0), optimizer=undecayed)


def strengths(weight: float, trial: Trial) -> Result:
    """Train on one photo style; the learned strength over the spread of the batch's styles, as training goes on."""
    setting = {"lr": 3e-3, "weight_decay": 1e-3}
    trial = Trial(trial.seed, trial.budget, trial.device, setting, report=trial.report)
    domains = one_photo.domains(trial)
    entrant = replace(advstyle, prepare=partial(inserted, p_adv=1 / 3, adv_weight=weight))
    bench = one_photo.bench(trial, entrant, domains)
    rule = RiskMinimization(bench)
    x = domains.sources[0][0][:200]
    steps: list[int] = []
    ratios: list[float] = []

    def look(step: int) -> None:
        if step % (bench.plan.steps // 10) == 0:
            steps.append(step)
            ratios.append(strength_over_spread(rule.network, x))

    fit_domains(bench, rule, after_step=look)
    return Result(
        {
            "ratio": ratios[-1],
            "accuracy": mean_accuracy(rule, list(domains.targets.values()), stream=False),
        },
        {"ratio": Curve(steps, ratios, "step")},
    )


@torch.no_grad()
def strength_over_spread(network: Classifier, x: Tensor) -> float:
    """The learned strength of the means over the spread that the maps have, the median over all channels."""
    assert isinstance(network.features, nn.Sequential)
    network.eval()
    found: list[Tensor] = []
    for block in network.features:
        x = block(x)
        if isinstance(block, nn.Sequential) and isinstance(layer := block[-1], domain.AdvStyle):
            spread = domain.style_spread(instance_statistics(x)[0])
            found.append((layer.mean_strength.abs() / spread).flatten())
    return float(torch.cat(found).median())


intensity = Experiment(
    "learned strength",
    {
        "reversed gradient": partial(strengths, 10.0),
        "gradient stopped": partial(strengths, 0.0),
    },
    {
        "ratio": Metric("strength over the batch's spread"),
        "accuracy": Metric("accuracy on unseen styles (%)", percent=True),
    },
    reads=("mnist",),
    cost=3.0,
)

study = Study(
    paper="advstyle",
    entrants={"AdvStyle": replace(advstyle, unfit=needs_pictures)},
    controls={"DSU": dsu, "AdvStyle, strength held": held},
    on=[one_photo, one_rotation],
    experiments=[intensity],
    headline=Claim("AdvStyle", beats="DSU", on="target_accuracy", at=one_photo),
    claims=[
        Claim("AdvStyle", beats="ERM", on="target_accuracy", by=0.01, at=one_photo),
        Claim("AdvStyle", beats="MixStyle", on="target_accuracy", at=one_photo),
        Claim("AdvStyle", beats="AdvStyle, strength held", on="target_accuracy", at=one_photo),
        Claim("AdvStyle", beats="ERM", on="worst_accuracy", at=one_photo),
        Claim("AdvStyle", beats="ERM", on="target_accuracy", by=-0.02, at=one_rotation),
        Claim("reversed gradient", at_least=1.0, on="ratio", at=intensity),
        Claim("reversed gradient", beats="gradient stopped", on="ratio", at=intensity),
    ],
)
