"""Does a small pull between the seen classes help on unseen ones, and too large a pull collapse the embedding?"""

from __future__ import annotations

from trimtab.metric import ECAMLLoss, EnergyConfusion
from trimtab.studies.study import Arm, Claim, Study
from trimtab.studies.tasks.open_set_retrieval import Base, OpenSetRetrieval

BASES: dict[str, Base] = {"triplet": "triplet", "N-pair": "npair", "binomial": "binomial"}
WEIGHTS = (0.005, 0.02, 0.1, 0.5)


def contestants(name: str, base: Base) -> dict[str, Arm]:
    """The base loss, the authors' confusion of the embedding layer, that of all layers, and too much of it."""
    task = OpenSetRetrieval(base=base)
    return {
        name: task.train(),
        f"{name} + ECAML": task.train_weighted(
            lambda loss, weight: ECAMLLoss(loss, weight, EnergyConfusion(log=True)), WEIGHTS, layer_only=True
        ),
        f"{name} + ECAML, all layers": task.train_weighted(
            lambda loss, weight: ECAMLLoss(loss, weight, EnergyConfusion(normalize=True)), WEIGHTS
        ),
        f"{name} + ECAML, all layers, weight 0.5": task.train_weighted(
            lambda loss, weight: ECAMLLoss(loss, weight, EnergyConfusion(normalize=True)), (0.5,)
        ),
    }


study = Study(
    paper="ecaml",
    arms={arm: made for name, base in BASES.items() for arm, made in contestants(name, base).items()},
    claims=[
        claim
        for name in BASES
        for claim in (
            Claim(f"{name} + ECAML", beats=name, on="recall_at_1", by=0.005),
            Claim(f"{name} + ECAML, all layers", beats=name, on="recall_at_1", by=0.005),
            Claim(f"{name} + ECAML, all layers, weight 0.5", below=name, on="recall_at_1", by=0.05),
        )
    ],
    seeds={"laptop": 4},
    plot=["recall_at_1"],
    leaderboard=["triplet", "triplet + ECAML"],
    notes=(
        "The paper trains a pre-trained GoogLeNet on CUB, Cars, SOP and In-Shop. Here a small CNN learns six classes "
        "of Fashion-MNIST and is tested on the other four. Every arm with a search chooses its weight from 0.005, "
        "0.02, 0.1 and 0.5 by recall@1 on three seen classes after half the training on the other three. The first "
        "form of ECAML is the authors' release: the logarithm of the mean squared distance, trained into the embedding "
        "layer alone. The second trains all layers by the mean squared distance of normalised embeddings, as the base "
        "losses normalise too. Triplet and N-pair losses have the settings of pytorch-metric-learning, binomial "
        "deviance has those of the authors' release."
    ),
)
