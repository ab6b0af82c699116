"""Predictor-corrector sampling at equal evaluations, and the likelihood of a learned model of digits.

The paper trains large networks on CIFAR-10 and takes 1000 steps of predictor and corrector or 2000 of the predictor;
here a small network has learned digits, and it is 80 against 160. The schedule is variance-exploding from 20 down to
0.02, with the authors' signal-to-noise ratio of 0.16. In the shared task the schedule is variance-preserving, for which
the authors take 0.01; that is a control there, since at so low a ratio the corrector hardly moves. The likelihood is
that of digits with noise of 0.05, by a stochastic estimate of the divergence with one probe, against a Gaussian fitted
to the same digits; there are few of them, and no dequantised pixels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trimtab.diffusion import deis_rk, grids, log_likelihood, predictor_corrector
from trimtab.studies.engine.picture import Picture
from trimtab.studies.engine.study import Claim, Curve, Experiment, Metric, Result, Study, Trial
from trimtab.studies.tasks.mixture_sampling import MixtureSampler, imperfect_100
from trimtab.studies.tools.learned_digits import SCHEDULE, digits, learned_digits
from trimtab.studies.tools.sample_quality import frechet_distance, sliced_wasserstein
from trimtab.studies.tools.samplers import Sampler

# Of the 64 dimensions of digits some never vary; this much noise gives the others' Gaussian a density there too.
_DEQUANTISED = 0.05


def sample(trial: Trial, sampler: Sampler, evaluations: int, *, random: bool = True) -> Result:
    """Digits from the learned score at 40 to 160 evaluations, on noise levels in geometric progression.

    Args:
        trial: the run.
        sampler: the contestant.
        evaluations: what it makes per step.
        random: whether it draws noise.
    """
    model = learned_digits(trial)
    real = torch.cat([digits(), digits(test=True)]).double()
    mean, cov = real.mean(0), torch.cov(real.T)
    size = trial.pick(smoke=64, laptop=700, paper=5000)
    noise = SCHEDULE.prior(size, real.shape[1], generator=trial.generator())
    made: dict[int, Tensor] = {}
    for budget in trial.pick(smoke=(40, 160), laptop=(40, 80, 160), paper=(40, 80, 160, 320, 2000)):
        drawn = {"generator": trial.generator(budget)} if random else {}
        made[budget] = sampler(model, noise, grids.log_snr(SCHEDULE, budget // evaluations), **drawn).double()
        trial.report(min(1.0, budget / 160))
    frechet = {budget: frechet_distance(x, mean, cov) for budget, x in made.items()}
    return Result(
        {
            "frechet": frechet[160],
            "sliced_wasserstein": sliced_wasserstein(made[160], real, generator=trial.generator(1)),
            "frechet_40": frechet[40],
        },
        {"frechet": Curve(list(map(float, frechet)), list(frechet.values()), x_label="evaluations")},
        pictures={"160 evaluations": Picture.grid((made[160][:20].reshape(-1, 8, 8) + 1) / 2)},
    )


def held_out(trial: Trial) -> Tensor:
    """Digits that were not learned from, with a little noise, so that they have a density."""
    images = digits(test=True)
    chosen = torch.randperm(len(images), generator=trial.generator())[: trial.pick(smoke=4, laptop=60, paper=599)]
    return images[chosen] + _DEQUANTISED * torch.randn(len(chosen), images.shape[1], generator=trial.generator(1))


def by_score(trial: Trial) -> Result:
    """The learned model's likelihood of held-out digits, by the ODE."""
    model = learned_digits(trial)
    model.schedule = type(SCHEDULE)(t_min=_DEQUANTISED, t_max=SCHEDULE.t_max)
    tolerance = trial.pick(smoke=1e-2, laptop=1e-4, paper=1e-5)
    found = log_likelihood(model, held_out(trial), generator=trial.generator(2), tolerance=tolerance)
    return Result({"likelihood": float(found.mean())})


def by_gaussian(trial: Trial) -> Result:
    """The likelihood under a Gaussian with the mean and the covariance of the digits learned from."""
    learned, x = digits().double(), held_out(trial).double()
    cov = torch.cov(learned.T) + _DEQUANTISED**2 * torch.eye(x.shape[1], dtype=torch.float64)
    found = torch.distributions.MultivariateNormal(learned.mean(0), cov).log_prob(x)
    return Result({"likelihood": float(found.mean())})


reverse = partial(predictor_corrector, corrections=0)
learned = Experiment(
    "learned score of digits",
    arms={
        "predictor": partial(sample, sampler=reverse, evaluations=1),
        "predictor and corrector": partial(sample, sampler=predictor_corrector, evaluations=2),
        "corrector": partial(sample, sampler=partial(predictor_corrector, predictor=None), evaluations=1),
        "ancestral predictor": partial(sample, sampler=partial(reverse, predictor="ancestral"), evaluations=1),
        "ancestral predictor and corrector": partial(
            sample, sampler=partial(predictor_corrector, predictor="ancestral"), evaluations=2
        ),
        "Euler-Maruyama": partial(sample, sampler=partial(reverse, predictor="euler_maruyama"), evaluations=1),
        "probability flow": partial(sample, sampler=partial(deis_rk, method="heun"), evaluations=2, random=False),
    },
    metrics={
        "frechet": Metric("Frechet distance to the digits, 160 evaluations", best="min"),
        "sliced_wasserstein": Metric("sliced Wasserstein distance to the digits, 160 evaluations", best="min"),
        "frechet_40": Metric("Frechet distance to the digits, 40 evaluations", best="min"),
    },
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    reads=("digits",),
    log="xy",
    cost=2.3,
)
density = Experiment(
    "likelihood of held-out digits",
    arms={"score model": by_score, "Gaussian": by_gaussian},
    metrics={"likelihood": Metric("log-likelihood (nats)")},
    reads=("digits",),
    cost=1.0,
)

study = Study(
    paper="score_sde",
    entrants={
        "predictor and corrector": MixtureSampler(sampler=predictor_corrector, random=True),
        "reverse diffusion": MixtureSampler(sampler=reverse, random=True),
    },
    controls={
        "corrector at 0.01": MixtureSampler(sampler=partial(predictor_corrector, snr=0.01), random=True),
    },
    on=[imperfect_100],
    experiments=[learned, density],
    headline=Claim("predictor and corrector", below="predictor", on="frechet", at=learned),
    claims=[
        Claim("predictor and corrector", below="predictor", on="sliced_wasserstein", at=learned),
        Claim("predictor and corrector", below="corrector", on="frechet", at=learned),
        Claim("ancestral predictor and corrector", below="ancestral predictor", on="frechet", at=learned),
        Claim("predictor and corrector", below="probability flow", on="frechet", at=learned),
        Claim("predictor and corrector", below="predictor", on="frechet_40", at=learned),
        Claim("score model", beats="Gaussian", on="likelihood", at=density),
        Claim("predictor and corrector", below="reverse diffusion", on="frechet", at=imperfect_100),
    ],
)
