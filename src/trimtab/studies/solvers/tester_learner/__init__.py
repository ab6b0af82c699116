"""The tester-learner on Gaussian and other samples, against linear models that never reject and a test of moments.

20,000 samples in 5 dimensions of each of six laws; a seed is a draw of all, with its own halfspace. The paper leaves
constants open: thresholds, band width and number of iterations are the estimator's defaults, whatever the noise, and
epsilon is 0.1 and delta 0.05. They were set before this comparison, so that Gaussian samples pass, and say nothing of
the paper's rates, which one sample size cannot show. Massart noise is asymmetric, at its rate on one side of a random
hyperplane and none on the other; the tester-learner is told the rate. The largest excess among accepted samples is 0
where none was accepted. Linear models have no intercept, as all halfspaces go through the origin, and their default C,
which does not matter with 4,000 samples a dimension.

The moments-only tester stands for what came before: it compares all moments up to degree 4, with the tester-learner's
tolerance and thresholds, and learns by logistic regression. Four of the five other laws already differ in these
moments; the slab is the one that only tests around the boundary can tell. Of tumours, which are no Gaussian sample and
are rejected, only the accuracy is taken, and they are centred first.
"""

from __future__ import annotations

from functools import partial

from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trimtab.solvers import HalfspaceTesterLearner
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.solvers.tester_learner.halfspaces import (
    METRICS,
    Answer,
    Halfspaces,
    Learn,
    Sample,
    logistic,
    moments_only,
    svm,
)
from trimtab.studies.tasks.tabular_classification import Learner, tumours


def tester_learner(sample: Sample) -> Answer:
    """The estimator with its defaults, told the kind of noise and, of Massart noise, the rate."""
    if sample.noise == "massart":
        model = HalfspaceTesterLearner(noise_rate=sample.rate, random_state=sample.seed)
    else:
        model = HalfspaceTesterLearner(noise="agnostic", random_state=sample.seed)
    model.fit(sample.X, sample.y)
    return Answer(model.coef_[0], model.accepted_)


LEARNERS: dict[str, Learn] = {
    "tester-learner": tester_learner,
    "logistic regression": logistic,
    "linear SVM": svm,
    "moments only": moments_only,
}


def experiment(name: str, halfspaces: Halfspaces) -> Experiment:
    """All learners under one noise."""
    return Experiment(
        name,
        arms={learner: partial(halfspaces.run, learn=learn) for learner, learn in LEARNERS.items()},
        metrics=METRICS,
        seeds={"smoke": 1, "laptop": 10, "paper": 10},
        cost=0.4,
    )


low = experiment("Massart noise of rate 0.1", Halfspaces(noise="massart", rate=0.1))
high = experiment("Massart noise of rate 0.3", Halfspaces(noise="massart", rate=0.3))
adversarial = experiment("adversarial noise of 5 %", Halfspaces(noise="adversarial", rate=0.05))

study = Study(
    paper="tester_learner",
    entrants={
        "tester-learner": Learner(
            estimator=lambda sample: make_pipeline(
                # Halfspaces go through the origin.
                StandardScaler(with_std=False),
                HalfspaceTesterLearner(
                    sample.setting["epsilon"],
                    noise="agnostic",
                    degree=2,
                    on_reject="ignore",
                    random_state=sample.seed,
                ),
            ),
            search={"epsilon": (0.1, 0.3, 1.0)},
        )
    },
    on=[tumours],
    experiments=[low, high, adversarial],
    headline=Claim("tester-learner", below="moments only", on="excess_accepted", by=0.01, at=low),
    claims=[
        *(Claim("tester-learner", at_least=1, on="accepts_gaussian", at=at) for at in (low, high, adversarial)),
        *(Claim("tester-learner", at_least=1, on="rejects_others", at=at) for at in (low, high, adversarial)),
        Claim("tester-learner", below="logistic regression", on="excess_accepted", by=0.01, at=low),
        Claim("tester-learner", below="logistic regression", on="excess_gaussian", at=low),
        Claim("tester-learner", at_most=0.1, on="excess_accepted", at=high),
        Claim("tester-learner", at_most=0.05, on="excess_accepted", at=adversarial),
        Claim("tester-learner", below="logistic regression", on="excess_gaussian", at=adversarial),
        Claim("tester-learner", beats="logistic regression", on="test_accuracy", by=-0.02, at=tumours),
    ],
)
