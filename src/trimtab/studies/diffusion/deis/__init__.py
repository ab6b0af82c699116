"""DEIS against DDIM, Euler, Heun, DPM-Solver++ and the form of DEIS that diffusers has, on an exact denoiser."""

from __future__ import annotations

from functools import partial

from trimtab.diffusion import ddim, deis, deis_rk, dpm_solver, euler, ipndm
from trimtab.studies.diffusion.deis.ode import METRICS, solve
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.tasks.guided_sampling import GuidedSampler, few_evaluations, many_evaluations

ode = Experiment(
    "sampling ODE",
    arms={
        "DDIM": partial(solve, sampler=ddim),
        "Euler": partial(solve, sampler=euler),
        "Heun": partial(solve, sampler=partial(deis_rk, method="heun"), evaluations=2),
        "DPM-Solver++": partial(solve, sampler=dpm_solver),
        "DEIS in log rho (as diffusers)": partial(solve, sampler=partial(deis, order=2, variable="log_rho")),
        "iPNDM": partial(solve, sampler=ipndm),
        "tAB2-DEIS": partial(solve, sampler=partial(deis, order=2)),
        "tAB3-DEIS": partial(solve, sampler=partial(deis, order=3)),
        "rhoAB3-DEIS": partial(solve, sampler=partial(deis, variable="rho")),
        "rhoRK3-DEIS": partial(solve, sampler=deis_rk, evaluations=3),
    },
    metrics=METRICS,
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    log="xy",
    cost=1.8,
)

study = Study(
    paper="deis",
    entrants={"DEIS": GuidedSampler(sampler=deis)},
    on=[few_evaluations, many_evaluations],
    experiments=[ode],
    headline=Claim("tAB3-DEIS", below="DDIM", on="rmse_10", times=2, at=ode),
    claims=[
        Claim("tAB3-DEIS", below="Euler", on="rmse_10", times=2, at=ode),
        Claim("tAB3-DEIS", below="DPM-Solver++", on="rmse_10", at=ode),
        Claim("tAB3-DEIS", below="DPM-Solver++", on="median_10", at=ode),
        Claim("tAB3-DEIS", below="rhoAB3-DEIS", on="rmse_10", at=ode),
        Claim("tAB3-DEIS", below="DDIM", on="sliced_wasserstein_10", at=ode),
        Claim("DEIS", below="CFG", on="frechet", at=few_evaluations),
        Claim("DEIS", below="CFG, DPM-Solver++", on="frechet", at=few_evaluations),
    ],
    notes="The paper measures FID with learned image models; here the denoiser is exact and the error is the distance "
    "to the ODE's solution, so only the solver is judged. Every sampler chooses among the same four time grids, at "
    "each number of evaluations on other noise. Methods with several evaluations a step take as many steps as fit. "
    "DPM-Solver++ is the second-order multistep one of diffusers. A few samples near the border of two modes end in "
    "the other one and make most of the RMSE; the median leaves them out. Under guidance DEIS is the sampler of "
    "classifier-free guidance, which is otherwise DDIM's, at equal evaluations and equal class accuracy. There were "
    "three seeds once, then five since the factor of two over DDIM was undecided; there are ten now.",
)
