"""Does SGD with a large learning rate end in flat and simple minima where gradient descent stays in sharp ones?

The error is that of the coefficients, or of the test outputs of the network. A linear model of 60 coefficients as
products of two weights, 30 samples of random signs, 3 true coefficients of 1; the weights start at 0.5 and at half a
standard normal. SGD draws its samples with replacement, one at a time unless stated otherwise. Runs end at a loss of
1e-7 or after 100,000 steps. The two-layer network has 30 hidden units and 120 images. At the largest rate, 0.1, two of
ten runs of SGD with single samples diverge: the rate was left as it had been fixed, so nothing is shown there. That the
trace at a stable minimum is at most 2 over the rate, and the critical rates themselves, are tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from trimtab.studies.engine.study import Budget, Claim, Experiment, Metric, Study
from trimtab.studies.optim.dynamical_stability.minima import descend, digits, leave, sparse

METRICS = {
    "error": Metric("squared error", best="min"),
    "trace": Metric("trace of the Hessian", best="min"),
    "norm": Metric("l1 norm of the coefficients, or path norm", best="min"),
    "trace_times_lr": Metric("trace times learning rate", best=None),
    "top_times_lr": Metric("top eigenvalue times learning rate", best=None),
    "train_loss": Metric("training loss", best="min"),
}
SEEDS: Mapping[Budget, int] = {"smoke": 1, "laptop": 10, "paper": 10}

regression = Experiment(
    name="sparse regression",
    arms={
        "SGD 0.001": partial(descend, sparse, 0.001, 1),
        "SGD 0.1": partial(descend, sparse, 0.1, 1),
        "SGD 0.1, batches of 10": partial(descend, sparse, 0.1, 10),
        "GD 0.001": partial(descend, sparse, 0.001, None),
        "GD 0.1": partial(descend, sparse, 0.1, None),
        "GD 0.3": partial(descend, sparse, 0.3, None),
    },
    metrics=METRICS,
    seeds=SEEDS,
    log="y",
    cost=1.5,
)
departure = Experiment(
    name="leaving a minimum",
    arms={
        "SGD, 0.7 critical": partial(leave, 0.7, 1),
        "SGD, 1.3 critical": partial(leave, 1.3, 1),
        "GD, 1.3 critical for SGD": partial(leave, 1.3, None),
    },
    metrics={"departure": Metric("relative distance from the minimum", best=None), **METRICS},
    seeds=SEEDS,
    log="y",
    cost=3.0,
)
network = Experiment(
    name="ReLU network",
    arms={
        "SGD 0.02": partial(descend, digits, 0.02, 1),
        "SGD 0.1": partial(descend, digits, 0.1, 1),
        "GD 0.1": partial(descend, digits, 0.1, None),
    },
    metrics=METRICS,
    reads=("digits",),
    log="y",
    cost=6.0,
)

study = Study(
    paper="dynamical_stability",
    experiments=[regression, departure, network],
    headline=Claim("SGD 0.1", below="GD 0.1", on="error", times=10.0, at=regression),
    claims=[
        Claim("SGD 0.1", below="SGD 0.001", on="error", times=10.0, at=regression),
        Claim("SGD 0.1", below="GD 0.3", on="error", times=10.0, at=regression),
        Claim("SGD 0.1", below="GD 0.1", on="trace", times=1.5, at=regression),
        Claim("SGD, 0.7 critical", at_most=0.05, on="departure", at=departure),
        Claim("SGD, 1.3 critical", at_least=0.1, on="departure", at=departure),
        Claim("SGD 0.1", below="GD 0.1", on="trace", at=network),
        Claim("SGD 0.1", below="GD 0.1", on="error", at=network),
    ],
)
