"""Adaptive guidance, LinearAG and a searched policy against full guidance and plain ways to save evaluations.

The paper measures the similarity to the images of full guidance, and has people compare, with models of text to image
at 20 steps; here the data are a Gaussian mixture fitted to digits, at 25 steps of DDIM. Frechet distance, accuracy and
recall are those at the scale at which 99 % of a rule's samples are of the class asked for (or its most accurate one),
deviations those at a scale of 4.5 for all, from the same noise. AG's threshold is the highest that three quarters of
the evaluations pay for on other noise, counted sample by sample; in guided sampling it is its authors' 0.999. LinearAG
has its authors' policy, which costs 32 evaluations at 25 steps, and faces classifier-free guidance in 16 steps, which
costs as many. The policy is searched once, at 37 evaluations. No text of the paper was available: the cosine is the one
of its authors' figure, LinearAG and the search follow an account of the paper and a part of the code.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from trimtab.diffusion import AdaptiveGuidance
from trimtab.diffusion.denoiser import DenoiserLike
from trimtab.studies.diffusion.adaptive_guidance.savings import (
    BUDGETS,
    METRICS,
    adaptive,
    fewer_steps,
    first_steps,
    full,
    linear,
    save,
    searched,
)
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.tasks.guided_sampling import GuidedSampler, fewest_evaluations, many_evaluations


def guide(denoiser: DenoiserLike, labels: Tensor, scale: float) -> DenoiserLike:
    """AG with its authors' threshold."""
    return AdaptiveGuidance(denoiser, labels, scale=scale)


savings = Experiment(
    "three quarters of the evaluations",
    arms={
        "AG": partial(save, rule=adaptive, evaluations=37.5, budgets=BUDGETS),
        "CFG": partial(save, rule=full, evaluations=50.0),
        "CFG, fewer steps": partial(save, rule=fewer_steps, evaluations=37.5, budgets=BUDGETS),
        "CFG, first steps alone": partial(save, rule=first_steps, evaluations=37.5, budgets=BUDGETS),
        "searched policy": partial(save, rule=searched, evaluations=37.5),
        "LinearAG": partial(save, rule=linear, evaluations=32.0),
        "CFG, 16 steps": partial(save, rule=fewer_steps, evaluations=32.0),
    },
    metrics=METRICS,
    seeds={"smoke": 1, "laptop": 10, "paper": 10},
    cost=2.5,
)

study = Study(
    paper="adaptive_guidance",
    entrants={"AG": GuidedSampler(guidance=guide, adaptive=True)},
    on=[many_evaluations, fewest_evaluations],
    experiments=[savings],
    headline=Claim(
        "AG",
        below="CFG",
        on="frechet",
        by=-0.05,
        at=savings,
        text="With a quarter of the evaluations saved and at equal class accuracy, AG has a Frechet distance at most "
        "0.05 above that of CFG",
    ),
    claims=[
        Claim("AG", beats="CFG", on="accuracy", by=-0.01, at=savings),
        Claim("AG", below="CFG, fewer steps", on="deviation", at=savings),
        Claim("AG", below="CFG, fewer steps", on="frechet", at=savings),
        Claim("AG", below="CFG, first steps alone", on="deviation", at=savings),
        Claim("searched policy", below="AG", on="deviation", at=savings),
        Claim("LinearAG", below="CFG, 16 steps", on="deviation", at=savings),
        Claim("AG", below="CFG", on="frechet", at=many_evaluations),
        Claim("AG", below="CFG", on="frechet", at=fewest_evaluations),
    ],
)
