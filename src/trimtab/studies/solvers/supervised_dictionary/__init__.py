"""A dictionary learned with the labels against features learned without them, and with them, at equal rank.

Documents are pieces of fifty lines of Python's standard library, and the rare class, one in eleven, is about the
internet (two chapters of the library's reference); whole modules are in the training, the validation or the test part.
The hidden direction is one of 45 dimensions of variance 1 beside five of variance 36 to 100. The rank is 5 for
documents and 2 for the hidden direction; LR and LDA see every column. Every contestant chooses among nine settings by
its AUC on validation data: xi and nu, a penalty on codes and the regression's strength, that strength alone, or a
shrinkage; the threshold of F1 is that data's best. Learned features are brought to unit variance before the regression.
Time is of the chosen setting's fit on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self

import numpy as np

from trimtab.solvers import SupervisedDictionary
from trimtab.studies.engine.study import Budget, Claim, Experiment, Setting, Study
from trimtab.studies.solvers.supervised_dictionary.documents import Documents
from trimtab.studies.solvers.supervised_dictionary.few_features import (
    METRICS,
    PENALISED,
    SHRINKAGES,
    STRENGTHS,
    Build,
    Classifier,
    Contest,
    HiddenDirection,
    dictionary,
    discriminant,
    least_squares,
    nmf,
    pca,
    regression,
)
from trimtab.studies.tasks.tabular_classification import (
    Learner,
    Sample,
    clothes,
    few_clothes,
    incomes,
    tumours,
    wrong_labels,
)

WEIGHTS = [{"xi": xi, "nu": nu} for xi in (0.1, 1.0, 10.0) for nu in (0.01, 0.1, 1.0)]


def supervised(
    contest: Contest,
    xi: float,
    nu: float,
    mode: Literal["filter", "feature"] = "filter",
    solver: Literal["lpgd", "bcd"] = "lpgd",
    nonnegative: bool = False,
) -> Classifier:
    """`SupervisedDictionary`, with `xi` in units in which a sample that is not reconstructed costs one."""
    return SupervisedDictionary(
        contest.rank,
        mode=mode,
        solver=solver,
        nonnegative=nonnegative,
        xi=xi * contest.unit,
        nu=nu,
        max_iter=20 if contest.quick else 100 if solver == "bcd" else 300,
        random_state=contest.seed,
    )


class Blind:
    """A supervised dictionary without sight of the covariates."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.transform, self.inverse_transform = model.transform, model.inverse_transform

    def fit(self, X: Any, y: Any, aux: Any = None) -> Self:
        self.model.fit(X, y)
        return self

    def decision_function(self, X: Any, aux: Any = None) -> np.ndarray:
        return np.asarray(self.model.decision_function(X))


def blind(contest: Contest, xi: float, nu: float) -> Classifier:
    """The same without sight of the covariates."""
    return Blind(supervised(contest, xi, nu))


def of_table(sample: Sample) -> SupervisedDictionary:
    """Five atoms, for the shared task."""
    return SupervisedDictionary(
        5,
        xi=sample.setting["xi"] * len(sample.x) / float((sample.x**2).sum()),
        nu=sample.setting["nu"],
        max_iter=20 if sample.quick else 300,
        random_state=sample.seed,
    )


OURS: dict[str, tuple[Build, Sequence[Setting]]] = {
    "SDL": (supervised, WEIGHTS),
    "SDL feature": (partial(supervised, mode="feature"), WEIGHTS),
}
OTHERS: dict[str, tuple[Build, Sequence[Setting]]] = {
    "PCA + LR": (pca, STRENGTHS),
    "NMF + LR": (nmf, PENALISED),
    "dictionary + LR": (dictionary, PENALISED),
    "PLS + LR": (least_squares, STRENGTHS),
    "LDA": (discriminant, SHRINKAGES),
    "LR": (regression, STRENGTHS),
}


def experiment(
    name: str,
    place: HiddenDirection | Documents,
    methods: dict[str, tuple[Build, Sequence[Setting]]],
    cost: float,
    seeds: int,
) -> Experiment:
    """All of them in one place."""
    arms = {method: partial(place.run, build=build, grid=grid) for method, (build, grid) in methods.items()}
    counts: dict[Budget, int] = {"smoke": 1, "laptop": seeds, "paper": 10}
    # Documents come from the same sources, of which this data set has the top-level modules.
    reads = ("python_sources",) if isinstance(place, Documents) else ()
    return Experiment(name, arms=arms, metrics=METRICS, seeds=counts, reads=reads, cost=cost)


blocks = (partial(supervised, solver="bcd"), WEIGHTS)
nonnegative = (partial(supervised, solver="bcd", nonnegative=True), WEIGHTS)
hidden = experiment("hidden direction", HiddenDirection(), {**OURS, "SDL BCD": blocks, **OTHERS}, 0.3, 10)
covariate = experiment(
    "covariate",
    HiddenDirection(covariate=4.0),
    {"SDL": OURS["SDL"], "SDL, covariate not shown": (blind, WEIGHTS), "LR": OTHERS["LR"]},
    0.1,
    10,
)
documents = experiment("documents", Documents(), {**OURS, "SDL BCD non-negative": nonnegative, **OTHERS}, 4.0, 5)

study = Study(
    paper="supervised_dictionary",
    entrants={"supervised dictionary": Learner(estimator=of_table, search={"xi": (0.1, 1.0, 10.0), "nu": (0.01, 1.0)})},
    on=[clothes, few_clothes, wrong_labels, tumours, incomes],
    experiments=[hidden, covariate, documents],
    headline=Claim("SDL", beats="NMF + LR", on="auc", by=0.02, at=documents),
    claims=[
        Claim("SDL", beats="PCA + LR", on="auc", by=0.02, at=documents),
        Claim("SDL", beats="PLS + LR", on="auc", at=documents),
        Claim("SDL", beats="LDA", on="auc", by=-0.01, at=documents),
        Claim("SDL", beats="LR", on="auc", by=-0.01, at=documents),
        Claim("SDL BCD non-negative", beats="NMF + LR", on="auc", by=0.02, at=documents),
        Claim("SDL", below="NMF + LR", on="seconds", at=documents),
        *(Claim("SDL", beats=other, on="auc", by=0.1, at=hidden) for other in ("PCA + LR", "NMF + LR", "PLS + LR")),
        Claim("SDL", beats="LR", on="auc", by=-0.01, at=hidden),
        Claim("SDL", beats="SDL, covariate not shown", on="auc", by=0.03, at=covariate),
        Claim("supervised dictionary", beats="PLS", on="test_accuracy", by=-0.01, at=clothes),
        Claim("supervised dictionary", beats="logistic regression", on="test_accuracy", by=-0.01, at=tumours),
    ],
)
