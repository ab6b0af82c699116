"""CoLiDE against DAGMA where noise differs between variables, and as it grows with one sparsity weight for all.

Graphs of 20 nodes and about 80 edges, far denser than the paper's graphs of 200 nodes with as many edges per node, and
1,000 samples. On the shared task CoLiDE and DAGMA choose their sparsity weights among the same five for each kind of
noise, and compete once more with their authors' weights, 0.05 and 0.03. In a first result CoLiDE had 0.05 everywhere
while DAGMA's weight was searched, and CoLiDE-NV was 6 edges behind. As the noise grows, from one graph and one draw,
DAGMA has CoLiDE's 0.05, or its own default. All have the same path, learning rate and limits of iterations, those of
CoLiDE's authors, and stop by the same rule. Weights below 0.3 are no edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from trimtab.solvers import CoLiDE
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.dag_recovery import (
    LAMBDAS,
    DagRecovery,
    GraphLearner,
    Matrix,
    Noise,
    Observations,
    dagma,
    equal,
    unequal,
)

LEVELS = (0.5, 2.0, 10.0)


def colide(noise: Noise, seen: Observations) -> Matrix:
    """CoLiDE-EV or CoLiDE-NV, with its authors' penalty if none was chosen, and the task's number of iterations."""
    lambda1 = seen.setting.get("lambda1", 0.05)
    model = CoLiDE(noise, lambda1=lambda1, warm_iter=seen.warm_iter, max_iter=seen.max_iter).fit(seen.X)
    weights: Matrix = model.raw_weights_
    return weights


def over_levels(learn: Callable[[Observations], Matrix], trial: Trial) -> Result:
    """The distance on one graph, from one draw of the noise, at every level."""
    found = []
    for level in LEVELS:
        found.append(DagRecovery(level=level).run(trial, GraphLearner(learn=learn)).metrics)
        trial.report(len(found) / len(LEVELS))
    shd = [metrics["shd"] for metrics in found]
    seconds = sum(metrics["seconds"] for metrics in found)
    return Result(
        {"rise": shd[-1] - shd[0], "shd": sum(shd) / len(shd), "seconds": seconds},
        {"structural Hamming distance": Curve(LEVELS, shd, "variance of the noise")},
    )


def weighted(lambda1: float, seen: Observations) -> Matrix:
    """DAGMA with a penalty of that weight."""
    return dagma(replace(seen, setting={"lambda1": lambda1}))


levels = Experiment(
    "equal noise of variance 0.5 to 10",
    arms={
        "CoLiDE-EV": partial(over_levels, partial(colide, "equal")),
        "DAGMA": partial(over_levels, partial(weighted, 0.05)),
        "DAGMA, default penalty": partial(over_levels, partial(weighted, 0.03)),
    },
    requires={"DAGMA": ("dagma",), "DAGMA, default penalty": ("dagma",)},
    metrics={
        "rise": Metric("rise of the structural Hamming distance from the least noise to the largest", best="min"),
        "shd": Metric("structural Hamming distance, mean over the levels", best="min"),
        "seconds": Metric("time of the fits (s)", best="min"),
    },
    log="x",
    cost=6.0,
)

study = Study(
    paper="colide",
    entrants={
        "CoLiDE-NV": GraphLearner(learn=partial(colide, "unequal"), search=LAMBDAS),
        "CoLiDE-EV": GraphLearner(learn=partial(colide, "equal"), search=LAMBDAS),
        "CoLiDE-NV, default penalty": GraphLearner(learn=partial(colide, "unequal")),
        "CoLiDE-EV, default penalty": GraphLearner(learn=partial(colide, "equal")),
    },
    on=[equal, unequal],
    experiments=[levels],
    headline=Claim("CoLiDE-NV", below="DAGMA", on="shd", at=unequal),
    claims=[
        Claim("CoLiDE-NV, default penalty", below="DAGMA, default penalty", on="shd", at=unequal),
        Claim("CoLiDE-EV, default penalty", below="DAGMA, default penalty", on="shd", at=equal),
        Claim("CoLiDE-NV", below="CoLiDE-EV", on="shd", at=unequal),
        Claim("CoLiDE-NV", below="regressions by variance", on="shd", at=unequal),
        Claim("CoLiDE-EV", below="DAGMA", on="shd", at=equal),
        Claim("CoLiDE-EV", at_most=4, on="rise", at=levels),
        Claim("CoLiDE-EV", below="DAGMA", on="rise", by=2, at=levels),
        Claim("CoLiDE-EV", below="DAGMA", on="seconds", at=equal),
    ],
)
