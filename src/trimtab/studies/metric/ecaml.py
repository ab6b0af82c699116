"""Does a small pull between the seen classes help on unseen ones, and is it the classes that matter?

The paper trains a pre-trained GoogLeNet on CUB, Cars, SOP and In-Shop. Here a small CNN learns 20 identities, digits of
MNIST in rotation, and is tested on ten others. With and without the confusion a loss chooses among eight settings:
learning rates (and for triplets margins) without it, two of the rates with four weights with it (triplets: two margins,
two weights). The confusion is that of the authors' release, the logarithm of the mean squared distance, trained into
the embedding layer alone; 'all layers' is the paper's formula, on normalised embeddings as the base loss normalises
too. The pull of all images has the confusion's form and ignores labels, as a control. Triplet and N-pair losses are
those of pytorch-metric-learning, binomial deviance has the values of the authors' release.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.metric import EnergyConfusion
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.open_set_retrieval import (
    TWO_RATES,
    Embedding,
    MetricLoss,
    binomial,
    clean,
    n_pair,
    triplet,
    wrong_identities,
)
from trimtab.studies.tools.training import Plan


class Weighted(nn.Module):
    """A term times the setting's weight."""

    def __init__(self, term: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.term, self.weight = term, float(plan.setting["weight"])

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = self.weight * self.term(embeddings, labels)
        return value


class PullOfAll(EnergyConfusion):
    """The same pull between all images, whatever their labels."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(embeddings, torch.arange(len(labels), device=labels.device))


WEIGHTS = {"weight": (0.02, 0.1, 0.5, 2.0), "lr": TWO_RATES}
MARGINS = {"weight": (0.1, 0.5), "margin": (0.1, 0.2), "lr": TWO_RATES}


def confused(
    loss: MetricLoss,
    search: Mapping[str, Sequence[Any]] = WEIGHTS,
    term: Callable[[], nn.Module] = lambda: EnergyConfusion(log=True),
    peer: bool = True,
) -> Embedding:
    """A base loss with the authors' confusion: the logarithm, trained into the embedding layer alone."""
    needs = ("pytorch_metric_learning",) if peer else ()
    return Embedding(
        loss=loss, penalty=lambda plan: Weighted(term(), plan), layer_alone=True, search=search, requires=needs
    )


of_all_layers = Embedding(
    loss=binomial, penalty=lambda plan: Weighted(EnergyConfusion(normalize=True), plan), search=WEIGHTS
)

study = Study(
    paper="ecaml",
    entrants={
        "binomial + ECAML": confused(binomial, peer=False),
        "triplet + ECAML": confused(triplet, MARGINS),
        "N-pair + ECAML": {clean: confused(n_pair)},
        "binomial + ECAML, all layers": {clean: of_all_layers},
        "binomial + pull of all images": {
            clean: confused(binomial, term=lambda: PullOfAll(log=True), peer=False),
        },
    },
    on=[clean, wrong_identities],
    headline=Claim("binomial + ECAML", beats="binomial deviance", on="recall_at_1", by=0.005, at=clean),
    claims=[
        Claim("triplet + ECAML", beats="triplet", on="recall_at_1", by=0.005, at=clean),
        Claim("N-pair + ECAML", beats="N-pair", on="recall_at_1", by=0.005, at=clean),
        Claim("binomial + ECAML, all layers", beats="binomial deviance", on="recall_at_1", by=0.005, at=clean),
        Claim("binomial + ECAML", beats="binomial + pull of all images", on="recall_at_1", at=clean),
        Claim("binomial + ECAML", beats="binomial deviance", on="nmi", at=clean),
        Claim("binomial + ECAML", beats="multi-similarity", on="recall_at_1", at=clean),
    ],
)
