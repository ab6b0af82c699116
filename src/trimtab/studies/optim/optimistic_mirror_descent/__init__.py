"""Is the regret of optimistic mirror descent small where losses drift, are noisy, or both?

A run is the mean of eight independent streams of 5,000 rounds in 20 dimensions. All methods know the ball and the
bounds on gradients, smoothness and curvature, and take the step sizes that their theory gives; nothing is searched. In
drift the centres swing once in 20 to 40 rounds; with noise half as strong as the path is wide, losses lie between the
stochastic and the adversarial case, which is what the paper is about. A method that follows the centres has negative
regret there. Optimistic FTRL for strongly convex losses is our reading of the paper's predecessor. That regret stays
within the theorems' bounds is tested.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.optim.optimistic_mirror_descent import learners
from trimtab.studies.optim.optimistic_mirror_descent.learners import MakeLearner
from trimtab.studies.optim.optimistic_mirror_descent.streams import Knowledge, LogisticStream, Quadratics, World


def play(make: MakeLearner, losses: str, world: World, trial: Trial) -> Result:
    """Play against streams of convex losses in a ball, in 20 dimensions.

    A run is the mean over eight independent streams, which estimates the expected regret that theory speaks of.

    Args:
        make: makes the learner from what all are told.
        losses: "quadratic", with centres chosen by the world; or a data set, for logistic losses on its first 20
            principal components, the classes split into a lower and an upper half.
        world: "iid", every loss drawn from one distribution; "drift", slow and without noise; "noisy drift", with
            noise; "switching", signs flipped after one or two rounds.
        trial: the run.
    """
    horizon = trial.pick(smoke=100, laptop=5_000, paper=50_000)
    streams = trial.pick(smoke=2, laptop=8, paper=20)
    stream: Quadratics | LogisticStream
    if losses == "quadratic":
        stream = Quadratics.draw(world, horizon, streams, trial.generator())
    else:
        data = losses if trial.budget != "smoke" else "digits"
        stream = LogisticStream.draw(data, world, horizon, streams, trial.generator())
    known = Knowledge(
        start=torch.zeros(streams, 20, dtype=torch.float64),
        domain=stream.domain,
        diameter=2 * stream.domain.radius,
        horizon=horizon,
        **stream.known,
    )
    learner, total, suffered = make(known), torch.zeros(streams, dtype=torch.float64), []
    for t in range(horizon):
        loss, gradient = stream.loss_and_gradient(t, learner.predict())
        total = total + loss
        suffered.append(total)
        learner.update(gradient)
        if t % 500 == 0:
            trial.report(t / horizon)
    rounds = [int(t) for t in np.unique(np.geomspace(horizon / 50, horizon, 12).astype(int))]
    best = stream.best_losses(rounds, trial.pick(smoke=50, laptop=300, paper=300))
    regret = torch.stack([suffered[t - 1] for t in rounds]) - best
    mean = regret.mean(1)
    metrics = {"regret": float(mean[-1])}
    if isinstance(stream, Quadratics):
        metrics["sea_regret"] = float((regret[-1] / (known.diameter * stream.variation().sqrt())).mean())
        if stream.environment.stochastic_variance == 0:  # the least loss of a round is 0, at its centre
            metrics["dynamic_regret"] = float(total.mean())
    return Result(metrics, {"regret": Curve([float(t) for t in rounds], mean.tolist(), x_label="round")})


METRICS = {
    "regret": Metric("regret", best="min"),
    "sea_regret": Metric("regret over D sqrt(sigma^2 + Sigma^2)", best="min"),
    "dynamic_regret": Metric("regret against the best point of every round", best="min"),
}
CONVEX: dict[str, MakeLearner] = {
    "OGD": learners.online_gradient,
    "AdaGrad": learners.AdaGrad,
    "optimistic FTRL": learners.OptimisticFTRL,
    "OMD": learners.mirror,
    "OMD, exp-concave": learners.exp_concave_mirror,
}
CURVED: dict[str, MakeLearner] = {
    **CONVEX,
    "OGD, strongly convex": learners.strongly_convex_gradient,
    "optimistic FTRL, strongly convex": learners.CurvedOptimisticFTRL,
    "OMD, strongly convex": learners.strongly_convex_mirror,
    "OMD, two layers": learners.two_layers,
}


def game(name: str, world: World, losses: str = "quadratic") -> Experiment:
    """Everybody who can play in a world."""
    return Experiment(
        name=name,
        arms={
            who: partial(play, make, losses, world)
            for who, make in (CURVED if losses == "quadratic" else CONVEX).items()
        },
        metrics=METRICS,
        seeds={"smoke": 1, "laptop": 10, "paper": 10},
        reads=() if losses == "quadratic" else (losses,),
        log="x",
        cost=0.5 if losses == "quadratic" else 1.5,
    )


iid = game("one distribution", "iid")
drift = game("drift", "drift")
noisy_drift = game("drift with noise", "noisy drift")
switching = game("switching signs", "switching")
digits = game("digits, one distribution", "iid", "digits")

study = Study(
    paper="optimistic_mirror_descent",
    experiments=[noisy_drift, drift, iid, switching, digits],
    headline=Claim("OMD, strongly convex", below="optimistic FTRL, strongly convex", on="regret", at=noisy_drift),
    claims=[
        Claim("OMD, strongly convex", below="OGD, strongly convex", on="regret", at=drift),
        Claim("OMD", below="OGD", on="dynamic_regret", times=2, at=drift),
        Claim("OMD, two layers", below="AdaGrad", on="dynamic_regret", at=drift),
        Claim("OMD", below="optimistic FTRL", on="regret", times=0.67, at=iid),
        Claim("OMD", below="OGD", on="regret", times=0.5, at=switching),
        Claim("OMD, exp-concave", below="OMD", on="regret", at=digits),
        Claim("OMD", below="optimistic FTRL", on="regret", times=0.67, at=digits),
    ],
)
