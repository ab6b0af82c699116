"""Does consensus-based optimization find global minima at equal evaluations, and move like gradient descent?

In the paper gradient descent and annealed Langevin dynamics run from one start for as many steps as CBO has, with a
two-hundredth of its evaluations. Here every method has the same number of evaluations, which gradient methods spend on
20 or 200 starts, and chooses among at most eight settings on other restarts. A gradient counts one evaluation. On
digits a value of one particle on a minibatch counts its share of a pass; CBO's setting there is one of some twenty
tried on one split, and its minibatches have no penalty.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from trimtab import optim
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.logistic_regression import digits
from trimtab.studies.tasks.test_functions import GlobalMinimizer, Problem, plane, space
from trimtab.studies.tools.full_batch import Minimizer, Oracle

PARTICLES = (50, 500, 5000)


def double_valley(x: Tensor) -> Tensor:
    """A W along the first axis in a bowl along the two others."""
    return (x[..., 0].square() - 1).square() + 2 * x[..., 1:].square().sum(-1)


def hopping_alignment(sigma: float, trial: Trial) -> Result:
    """Mean cosine between the steps of consensus hopping on the W and the negative gradient, at points around zero."""
    count, cosines = trial.pick(smoke=50, laptop=1000, paper=10_000), []
    start = torch.randn(count, 3, generator=trial.generator(), dtype=torch.float64)
    gradient = torch.func.grad(lambda x: double_valley(x).sum())(start)
    for n in PARTICLES:
        hopping = optim.ConsensusHopping(start, n_particles=n, alpha=2.0, sigma=sigma, generator=trial.generator(n))
        step = hopping.step(double_valley) - start
        cosines.append(float(nn.functional.cosine_similarity(step, -gradient).mean()))
    return Result({"cosine": cosines[1]}, {"cosine": Curve(PARTICLES, cosines, x_label="particles")})


def consensus(problem: Problem) -> None:
    """Consensus-based optimization with the setting's particles, noise and its strength."""
    particles = problem.cloud(int(problem.setting["particles"]))
    cbo = optim.CBO(
        particles,
        alpha=1e3,
        sigma=float(problem.setting["sigma"]),
        noise=problem.setting["noise"],
        generator=problem.generator,
    )
    with suppress(ValueError):  # particles that ran away have no energy: what was found before counts
        cbo.minimize(problem, steps=(problem.budget - 1) // len(particles) - 1)


def margin_loss(scores: Tensor, signs: Tensor) -> Tensor:
    """The logistic loss of two classes, 1 and -1."""
    return nn.functional.softplus(-signs * scores).mean()


def trained_by_consensus(oracle: Oracle) -> None:
    """Losses of 200 particles on minibatches of 64, in single precision; a point is recorded every ten steps."""
    objective, generator = oracle.objective, oracle.generator
    many = isinstance(objective, optim.SoftmaxObjective)
    x, y = objective.features.float(), objective.labels if many else objective.labels.float()[:, None]
    model = nn.utils.skip_init(nn.Linear, x.shape[1], oracle.shape[0], bias=False)
    nn.init.zeros_(model.weight)
    loss = optim.ParticleLoss(model, nn.functional.cross_entropy if many else margin_loss)
    particles = loss.start(200, spread=0.3, generator=generator)
    cbo = optim.CBO(
        particles, alpha=200.0, sigma=float(oracle.setting["sigma"]), dt=0.02, noise="anisotropic", generator=generator
    )
    oracle.record(oracle.start)
    while True:
        for batch in torch.randint(len(x), (10, 64), generator=generator):
            oracle.spend(0.5 * len(particles) * len(batch) / len(x))
            try:
                point = cbo.step(lambda particles, batch=batch: loss(particles, x[batch], y[batch]))  # type: ignore[misc]
            except ValueError:  # particles that ran away have no energy: what was recorded before counts
                return
        oracle.record(point.double())


hopping = Experiment(
    name="hopping steps",
    arms={f"spread {sigma:g}": partial(hopping_alignment, sigma) for sigma in (0.2, 1.0)},
    metrics={"cosine": Metric("cosine of the step with the negative gradient, 500 particles")},
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    log="x",
    cost=3.0,
)

study = Study(
    paper="cbo",
    entrants={
        "CBO": {
            **dict.fromkeys(
                (plane, space),
                GlobalMinimizer(
                    minimize=consensus,
                    search={"particles": (50, 200), "sigma": (1.6, 5.0), "noise": ("isotropic", "anisotropic")},
                ),
            ),
            digits: Minimizer(minimize=trained_by_consensus, search={"sigma": (0.6, 1.2, 2.4)}),
        }
    },
    on=[space, plane, digits],
    experiments=[hopping],
    headline=Claim("CBO", beats="Langevin", on="success", at=space),
    claims=[
        Claim("CBO", beats="Langevin", on="success", at=plane),
        Claim("CBO", beats="gradient descent", on="success", at=space),
        Claim("CBO", beats="differential evolution", on="success", at=space),
        Claim("CBO", beats="dual annealing", on="success", at=space),
        Claim("spread 0.2", at_least=0.9, on="cosine", at=hopping),
        Claim("CBO", at_least=0.8, on="test_accuracy", at=digits),
        Claim("CBO", beats="gradient descent", on="test_accuracy", by=-0.01, at=digits),
    ],
)
