"""Does the threshold-consistent margin make one threshold suit all unseen classes, at no loss of accuracy?

The paper trains large backbones on iNaturalist, SOP, CUB and Cars, with hundreds to thousands of unseen classes. Here a
small CNN learns 20 identities, digits of MNIST in rotation, and is tested on ten others. Margins (0.9, 0.5) and weights
(1, 1) are the authors'; a base loss chooses among the same eight settings with the term and without, by accuracy alone.
OPIS is lower by 30 % or more where the ratio is 1.43.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from trimtab.metric import ThresholdConsistentMarginLoss
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.open_set_retrieval import OpenSetRetrieval, clean, wrong_identities
from trimtab.studies.tools.training import Plan


def margins(plan: Plan) -> nn.Module:
    """The term with its authors' margins and weights."""
    return ThresholdConsistentMarginLoss()


bases = OpenSetRetrieval.references()
with_term = {name: replace(bases[name], penalty=margins) for name in ("ArcFace", "triplet", "N-pair")}

study = Study(
    paper="tcm",
    entrants={
        "ArcFace + TCM": with_term["ArcFace"],
        "triplet + TCM": with_term["triplet"],
        "N-pair + TCM": {clean: with_term["N-pair"]},
    },
    on=[clean, wrong_identities],
    headline=Claim("ArcFace + TCM", below="ArcFace", on="opis", times=1 / 0.7, at=clean),
    claims=[
        Claim("ArcFace + TCM", beats="ArcFace", on="recall_at_1", by=-0.01, at=clean),
        Claim("triplet + TCM", below="triplet", on="opis", times=1 / 0.7, at=clean),
        Claim("triplet + TCM", beats="triplet", on="recall_at_1", by=-0.01, at=clean),
        Claim("N-pair + TCM", below="N-pair", on="opis", times=1 / 0.7, at=clean),
        Claim("N-pair + TCM", beats="N-pair", on="recall_at_1", by=-0.01, at=clean),
        Claim("ArcFace + TCM", below="normalised softmax", on="opis", at=clean),
        Claim("ArcFace + TCM", below="ArcFace", on="opis", at=wrong_identities),
    ],
)
