"""DEIS against DDIM, Euler, Heun, DPM-Solver++ and the form of DEIS that diffusers has.

The paper measures FID with learned image models; here the denoiser is exact and the error is the distance to the ODE's
solution, so only the solver is judged. Every sampler has the best of the same four time grids, chosen on other noise.
Methods with several evaluations a step take as many steps as fit. A few samples near the border of two modes end in the
other one and make most of the RMSE; the median leaves them out. Under guidance DEIS is the sampler of classifier-free
guidance, which is otherwise DDIM's, at equal evaluations and equal class accuracy. There were three seeds once, then
five since the factor of two over DDIM was undecided; there are ten now. The work was an experiment of this study before
other samplers met on it; there the grid was chosen anew at each number of evaluations and seed, on fewer samples.
"""

from __future__ import annotations

from functools import partial

from trimtab.diffusion import deis, deis_rk, ipndm
from trimtab.studies.engine.study import Claim, Study
from trimtab.studies.tasks.guided_sampling import GuidedSampler, few_evaluations, many_evaluations
from trimtab.studies.tasks.mixture_sampling import (
    MixtureSampler,
    exact_5,
    exact_10,
    imperfect_5,
    imperfect_10,
    imperfect_100,
)

study = Study(
    paper="deis",
    entrants={
        "DEIS": GuidedSampler(sampler=deis),
        "tAB3-DEIS": MixtureSampler(sampler=deis),
        "tAB2-DEIS": {exact_10: MixtureSampler(sampler=partial(deis, order=2))},
        "rhoAB3-DEIS": {exact_10: MixtureSampler(sampler=partial(deis, variable="rho"))},
        "rhoRK3-DEIS": {exact_10: MixtureSampler(sampler=deis_rk)},
        "iPNDM": {exact_10: MixtureSampler(sampler=ipndm)},
    },
    controls={
        "DEIS in log rho (as diffusers)": {
            exact_10: MixtureSampler(sampler=partial(deis, order=2, variable="log_rho")),
        },
    },
    on=[exact_10, exact_5, imperfect_10, imperfect_5, imperfect_100, few_evaluations, many_evaluations],
    headline=Claim("tAB3-DEIS", below="DDIM", on="rmse", times=2, at=exact_10),
    claims=[
        Claim("tAB3-DEIS", below="Euler", on="rmse", times=2, at=exact_10),
        Claim("tAB3-DEIS", below="DPM-Solver++", on="rmse", at=exact_10),
        Claim("tAB3-DEIS", below="DPM-Solver++", on="median", at=exact_10),
        Claim("tAB3-DEIS", below="rhoAB3-DEIS", on="rmse", at=exact_10),
        Claim("tAB3-DEIS", below="DDIM", on="sliced_wasserstein", at=exact_10),
        Claim("tAB3-DEIS", below="DDIM", on="frechet", at=imperfect_10),
        Claim("DEIS", below="CFG", on="frechet", at=few_evaluations),
        Claim("DEIS", below="CFG, DPM-Solver++", on="frechet", at=few_evaluations),
    ],
)
