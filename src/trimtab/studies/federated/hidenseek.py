"""Are signs on a pruned random network better than masks on it, and how far are they from trained weights?

20 clients of 250 images and 30 rounds of a perceptron with one hidden layer of 64, of which three tenths of the weights
are kept; the paper trains convolutional networks. The random weights, the scores' start and their gradient are
reconstructed from the abstract, and so are the rivals: masks of zeros and ones are learned here on the same pruned
weights by the same scores, and on all weights. HideNseek sends a bit for each kept weight to the server, and the mean
of the signs as a 32-bit number to the clients; how many bits that saves is arithmetic and not judged. Training time and
the networks of each client's own signs are not judged either. Learning rates were first 3 to 100; in a trial on a
separate seed, signs stayed at chance at 30 and learned at 3 and 10, and the grid of all five moved down by one place,
before any result.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from trimtab.federated import HideNseek
from trimtab.federated.hidenseek import Values
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.fair_federated import by_sex_and_income
from trimtab.studies.tasks.federated_images import (
    BATCH,
    EPOCHS,
    MAX_NORM,
    Federated,
    FederatedPlan,
    mild_skew,
    strong_skew,
)

SEARCH = {"lr": (1.0, 3.0, 10.0, 30.0)}


def supermask(
    plan: FederatedPlan,
    density: float = 0.3,
    values: Values = "sign",
    broadcast: Literal["mean", "sign"] = "mean",
) -> HideNseek:
    """Signs, or masks, on the same random network; its weights are other ones in each run."""
    return HideNseek(
        plan.lr,
        plan.in_shape,
        density,
        EPOCHS,
        BATCH,
        values=values,
        broadcast=broadcast,
        seed=plan.seed,
        max_norm=MAX_NORM,
    )


study = Study(
    paper="hidenseek",
    entrants={"HideNseek": Federated(algorithm=supermask, search=SEARCH)},
    controls={
        name: dict.fromkeys((mild_skew, strong_skew), Federated(algorithm=algorithm, search=SEARCH))
        for name, algorithm in {
            "zero-one masks": partial(supermask, values="binary"),
            "zero-one masks of all weights": partial(supermask, density=1.0, values="binary"),
            "HideNseek, a tenth of the weights": partial(supermask, density=0.1),
            "HideNseek, bits both ways": partial(supermask, broadcast="sign"),
        }.items()
    },
    on=[mild_skew, strong_skew, by_sex_and_income],
    headline=Claim("HideNseek", beats="zero-one masks", on="accuracy", by=0.02, at=mild_skew),
    claims=[
        Claim("HideNseek", beats="zero-one masks", on="accuracy", by=0.02, at=strong_skew),
        Claim("HideNseek", beats="zero-one masks of all weights", on="accuracy", at=mild_skew),
        Claim("HideNseek", beats="HideNseek, a tenth of the weights", on="accuracy", by=0.01, at=mild_skew),
        Claim("HideNseek, bits both ways", beats="HideNseek", on="accuracy", by=-0.02, at=mild_skew),
        Claim("HideNseek", beats="FedAvg", on="accuracy", by=-0.05, at=mild_skew),
        Claim("HideNseek", beats="FedAvg", on="accuracy", by=-0.05, at=strong_skew),
        Claim("HideNseek", beats="FedAvg", on="accuracy", by=-0.02, at=by_sex_and_income),
    ],
)
