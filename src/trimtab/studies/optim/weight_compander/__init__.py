"""Do companded weights raise accuracy, and do they have the shape the paper says they have?

Rate and weight decay are searched alike for companded and plain weights. Learned curves have a tenth of the learning
rate. The curve's slope of 1.5 makes steps near zero 2.25 times as long, which the arm 'longer steps' gives to a plain
network too. The curve is the library's reconstruction from the paper's abstract; the paper's formula may differ from
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations

from trimtab import optim
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.optim.weight_compander import shape
from trimtab.studies.tasks.image_classification import few_images, ten_thousand
from trimtab.studies.tools.training import Plan, Training


def fixed(network: nn.Module, plan: Plan) -> Sequence[dict[str, Any]]:
    """Companded weights with the library's defaults; weight decay on all but the curves."""
    optim.apply_weight_compander(network)
    return optim.compander_param_groups(network, weight_decay=plan.weight_decay, lr=plan.lr / 10)


def learned(network: nn.Module, plan: Plan) -> Sequence[dict[str, Any]]:
    """Companded weights whose curves are trained, at a tenth of the rate."""
    optim.apply_weight_compander(network, learnable=True)
    return optim.compander_param_groups(network, weight_decay=plan.weight_decay, lr=plan.lr / 10)


def weight_norm(network: nn.Module, plan: Plan) -> None:
    """Direction and length of each unit's weights apart, as torch does it."""
    for layer in list(network.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrizations.weight_norm(layer)


weights = Experiment(
    "shape of the weights after training on few images",
    arms={
        "SGD": partial(shape.train, Training(), 1.0),
        "WC": partial(shape.train, Training(prepare=fixed), 1.0),
        "WC, learned": partial(shape.train, Training(prepare=learned), 1.0),
        # Near zero the curve multiplies a step by the square of its slope: this is what that does alone.
        "SGD, longer steps": partial(shape.train, Training(), 1.5**2),
    },
    metrics=shape.METRICS,
    reads=("fashion_mnist",),
    cost=4,
)

study = Study(
    paper="weight_compander",
    entrants={"WC": Training(prepare=fixed), "WC, learned": Training(prepare=learned)},
    controls={"weight norm": Training(prepare=weight_norm)},
    on=[few_images, ten_thousand],
    experiments=[weights],
    headline=Claim("WC", beats="SGD", on="test_accuracy", at=few_images),
    claims=[
        Claim("WC", beats="SGD", on="test_accuracy", at=ten_thousand),
        Claim("WC, learned", beats="SGD", on="test_accuracy", at=few_images),
        Claim("WC", beats="SGD, longer steps", on="test_accuracy", at=weights),
        Claim("WC", below="SGD", on="kurtosis", at=weights),
        Claim("WC", below="SGD", on="near_zero", at=weights),
        Claim("WC", beats="SGD", on="pruned_accuracy", at=weights),
    ],
)
