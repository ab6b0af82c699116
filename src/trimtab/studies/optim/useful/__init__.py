"""Does repeating slowly learned examples make training generalise better, and learn features more evenly?

Every arm makes the same number of steps. Examples are chosen by a first training with SGD at a constant rate, also for
SAM. The patches are the data of the paper's theory: every example has a hard feature of strength 0.7, four in five an
easy one of strength 1; the paper's figure has 0.2 and 0.9.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from trimtab import optim
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.optim.useful import patches
from trimtab.studies.optim.useful.resampled import Resampled, high_losses, random_examples, slowly_learned
from trimtab.studies.tasks.image_classification import few_images, ten_thousand
from trimtab.studies.tools import baselines
from trimtab.studies.tools.training import Training


def sam_descent(params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """SAM with its authors' radius, on gradient descent."""
    return optim.SAM(torch.optim.SGD(params, lr=lr), rho=0.05)


toy = Experiment(
    "patches with an easy and a hard feature",
    arms={
        "gradient descent": partial(patches.learn, None, patches.gradient_descent),
        "SAM": partial(patches.learn, None, sam_descent),
        "USEFUL": partial(patches.learn, slowly_learned, patches.gradient_descent),
        "random examples": partial(patches.learn, random_examples, patches.gradient_descent),
    },
    metrics=patches.METRICS,
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    cost=2,
)
with_sam = {"lr": (0.01, 0.03, 0.1, 0.3), "weight_decay": (5e-4,), "rho": (0.05, 0.2)}

study = Study(
    paper="useful",
    entrants={
        "USEFUL": Training(rule=partial(Resampled, slowly_learned)),
        "SAM + USEFUL": Training(rule=partial(Resampled, slowly_learned), optimizer=baselines.sam, search=with_sam),
    },
    controls={
        "random examples": Training(rule=partial(Resampled, random_examples)),
        "high losses": Training(rule=partial(Resampled, high_losses)),
    },
    on=[ten_thousand, few_images],
    experiments=[toy],
    headline=Claim("USEFUL", beats="SGD", on="test_accuracy", at=ten_thousand),
    claims=[
        Claim("USEFUL", beats="random examples", on="test_accuracy", at=ten_thousand),
        Claim("USEFUL", beats="high losses", on="test_accuracy", at=ten_thousand),
        Claim("SAM + USEFUL", beats="SAM", on="test_accuracy", at=ten_thousand),
        Claim("SAM", below="gradient descent", on="early_ratio", at=toy),
        Claim("USEFUL", below="random examples", on="ratio_at_loss", at=toy),
        Claim("USEFUL", at_least=0.9, on="found", at=toy),
    ],
)
