"""Is a mixture of bag-level and instance-level loss better than either, and when do bags pay for privacy?

Bags are filled at random. The instance-level loss has one of eleven weights (of five for the networks), chosen by
five-fold cross-validation over bags, or on 100 validation bags, so that no single response is used; 'either level'
chooses between the two ends in the same way. By formula means with the noise known, on the asymptotic risk that the
library derives for Gaussian features. With bags of 10 there are as many bags as features, and the bag level has no
expected risk: that cell is left out of the risk at high signal-to-noise ratio. Ridge regression on bag means, its
penalty chosen by leaving out single bags, is what a user would take today. Private responses are clipped at two
standard deviations times sqrt(log n / 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from trimtab import losses
from trimtab.studies.engine.study import Budget, Claim, Experiment, Result, Study
from trimtab.studies.losses.aggregate_responses import bags
from trimtab.studies.losses.aggregate_responses.bags import (
    WEIGHTS,
    Estimator,
    Regressor,
    RidgeOnBagMeans,
    Setting,
    best_weight,
)


def ridge(setting: Setting) -> Regressor:
    """What a user has today."""
    return RidgeOnBagMeans()


def mixed(rho: float | Sequence[float]) -> Estimator:
    """The weight of the instance-level loss; of several, the best by cross-validation over bags."""
    return lambda setting: losses.AggregateRidge(rho, fit_intercept=False)


def by_formula(setting: Setting) -> Regressor:
    """The weight of least asymptotic risk, with the noise known."""
    return losses.AggregateRidge(best_weight(setting), fit_intercept=False)


def through_all(setting: Setting) -> Regressor:
    """The weight that the setting names."""
    return losses.AggregateRidge(setting.rho, fit_intercept=False)


def of_patients(rho: float | Sequence[float]) -> Estimator:
    """The same with a constant."""
    return lambda setting: losses.AggregateRidge(rho)


def bce(rho: float) -> nn.Module:
    """The loss of bags of binary labels."""
    return losses.AggregateLoss(rho, "bce")


SEEDS: Mapping[Budget, int] = {"smoke": 1, "laptop": 10, "paper": 10}


def images(*weights: float) -> partial[Result]:
    """A network whose loss has the best of these weights."""
    return partial(bags.images, loss=bce, weights=weights)


gaussian = Experiment(
    "linear regression",
    arms={
        "ridge on bag means": partial(bags.gaussian, estimator=ridge),
        "bag level": partial(bags.gaussian, estimator=mixed(0.0)),
        "instance level": partial(bags.gaussian, estimator=mixed(1.0)),
        "either level, by held-out bags": partial(bags.gaussian, estimator=mixed((0.0, 1.0))),
        "interpolated": partial(bags.gaussian, estimator=mixed(WEIGHTS)),
        "interpolated, weight by formula": partial(bags.gaussian, estimator=by_formula),
    },
    metrics=bags.GAUSSIAN,
    seeds=SEEDS,
    cost=2.0,
)
weights = Experiment(
    "weights of the instance level",
    arms={"interpolated": partial(bags.weights, estimator=through_all)},
    metrics=bags.WEIGHTED,
    seeds=SEEDS,
    cost=1.5,
    log="y",
)
private = Experiment(
    "private bag means",
    arms={
        "ridge on bag means": partial(bags.private, estimator=ridge),
        "bag level": partial(bags.private, estimator=mixed(0.0)),
        "instance level": partial(bags.private, estimator=mixed(1.0)),
        "interpolated, weight by formula": partial(bags.private, estimator=by_formula),
    },
    metrics=bags.PRIVATE,
    seeds=SEEDS,
    cost=0.7,
    log="xy",
)
diabetes = Experiment(
    "diabetes",
    arms={
        "ridge on bag means": partial(bags.diabetes, estimator=lambda setting: RidgeOnBagMeans(fit_intercept=True)),
        "bag level": partial(bags.diabetes, estimator=of_patients(0.0)),
        "instance level": partial(bags.diabetes, estimator=of_patients(1.0)),
        "interpolated": partial(bags.diabetes, estimator=of_patients(WEIGHTS)),
    },
    metrics=bags.DIABETES,
    seeds=SEEDS,
    cost=0.1,
)
clothes = Experiment(
    "clothes",
    arms={
        "bag level": images(0.0),
        "instance level": images(1.0),
        "interpolated": images(0.0, 0.25, 0.5, 0.75, 1.0),
    },
    metrics=bags.IMAGES,
    seeds=SEEDS,
    cost=2.0,
    reads=("fashion_mnist",),
)

study = Study(
    paper="aggregate_responses",
    experiments=[gaussian, weights, private, diabetes, clothes],
    headline=Claim("interpolated", below="either level, by held-out bags", on="risk", times=1.05, at=gaussian),
    claims=[
        Claim("interpolated", below="ridge on bag means", on="risk", at=gaussian),
        Claim("interpolated", at_most=0.05, on="regret", at=gaussian),
        Claim("instance level", below="bag level", on="low_snr", at=gaussian),
        Claim("bag level", below="instance level", on="high_snr", at=gaussian),
        Claim("interpolated", at_least=0.5, on="interior", at=weights),
        Claim("interpolated, weight by formula", at_most=0.9, on="bagging_0.5", at=private),
        Claim("interpolated, weight by formula", below="ridge on bag means", on="private_risk_0.5", at=private),
        Claim("interpolated", below="ridge on bag means", on="unexplained", at=diabetes),
        Claim("interpolated", below="bag level", on="unexplained", by=-0.01, at=diabetes),
        *(
            Claim("interpolated", beats=f"{end} level", on="test_accuracy", by=-0.005, at=clothes)
            for end in ("bag", "instance")
        ),
    ],
)
