"""Is a mixture of bag-level and instance-level loss never worse than either, and when do bags pay for privacy?"""

from __future__ import annotations

from trimtab import losses
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.bags import WEIGHTS, Bags, RidgeOnBagMeans, best_weight

gaussian, weights, private = Bags(), Bags("weights"), Bags("private")
diabetes, images = Bags("diabetes"), Bags("images")

study = Study(
    paper="aggregate_responses",
    arms={
        "ridge on bag means": gaussian.solve(lambda setting: RidgeOnBagMeans()),
        "bag level": gaussian.solve(lambda setting: losses.AggregateRidge(0.0, fit_intercept=False)),
        "instance level": gaussian.solve(lambda setting: losses.AggregateRidge(1.0, fit_intercept=False)),
        "interpolated, weight by formula": gaussian.solve(
            lambda setting: losses.AggregateRidge(best_weight(setting), fit_intercept=False)
        ),
        "interpolated, weight by held-out bags": gaussian.solve(
            lambda setting: losses.AggregateRidge(WEIGHTS, fit_intercept=False)
        ),
        "interpolated, all weights": weights.solve(
            lambda setting: losses.AggregateRidge(setting.rho, fit_intercept=False)
        ),
        "bag level, private": private.solve(lambda setting: losses.AggregateRidge(0.0, fit_intercept=False)),
        "instance level, private": private.solve(lambda setting: losses.AggregateRidge(1.0, fit_intercept=False)),
        "interpolated, private": private.solve(
            lambda setting: losses.AggregateRidge(best_weight(setting), fit_intercept=False)
        ),
        "ridge on bag means, diabetes": diabetes.solve(lambda setting: RidgeOnBagMeans(fit_intercept=True)),
        "bag level, diabetes": diabetes.solve(lambda setting: losses.AggregateRidge(0.0)),
        "instance level, diabetes": diabetes.solve(lambda setting: losses.AggregateRidge(1.0)),
        "interpolated, diabetes": diabetes.solve(lambda setting: losses.AggregateRidge(WEIGHTS)),
        "bag level, images": images.learn(lambda rho: losses.AggregateLoss(rho, "bce"), [0.0]),
        "instance level, images": images.learn(lambda rho: losses.AggregateLoss(rho, "bce"), [1.0]),
        "interpolated, images": images.learn(lambda rho: losses.AggregateLoss(rho, "bce"), [0.0, 0.25, 0.5, 0.75, 1.0]),
    },
    claims=[
        Claim("interpolated, weight by formula", at_most=0.0, on="regret"),
        Claim("interpolated, weight by held-out bags", at_most=0.05, on="regret"),
        Claim("interpolated, all weights", at_least=0.5, on="interior"),
        Claim("interpolated, all weights", at_most=0.05, on="formula_error"),
        Claim("instance level", below="bag level", on="low_snr"),
        Claim("bag level", below="instance level", on="high_snr"),
        # Bags cost nothing but risk at the bag level, and pay once predictions may shrink.
        *(Claim("bag level, private", at_least=1.0, on=f"bagging_{epsilon}") for epsilon in ("0.5", "1", "2")),
        Claim("interpolated, private", at_most=0.9, on="bagging_0.5"),
        Claim("interpolated, private", below="bag level, private", on="private_risk_0.5"),
        *(
            Claim("interpolated, diabetes", below=f"{end} level, diabetes", on="unexplained", by=-0.01)
            for end in ("bag", "instance")
        ),
        *(
            Claim("interpolated, images", beats=f"{end} level, images", on="test_accuracy", by=-0.005)
            for end in ("bag", "instance")
        ),
    ],
    seeds={"laptop": 5, "paper": 10},
    leaderboard=[
        "ridge on bag means",
        "bag level",
        "instance level",
        "interpolated, weight by formula",
        "interpolated, weight by held-out bags",
    ],
    notes=(
        "Bags are filled at random. The instance-level loss has one of eleven weights (of five for the networks), "
        "chosen by five-fold cross-validation over bags, or on 100 validation bags, so without any single response; by "
        "formula means with the noise known, on the asymptotic risk that the library derives for Gaussian features. "
        "With bags of 10 there are as many bags as features, and the bag level has no expected risk: that cell is left "
        "out of the risk at high signal-to-noise ratio. Ridge regression on bag means, its penalty chosen by leaving "
        "out single bags, is the peer a user has today; no claim is made about it. Private responses are clipped at "
        "two standard deviations times sqrt(log n / 2)."
    ),
)
