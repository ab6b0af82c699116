"""Does naive Bayes need fewer samples than logistic regression, and more features barely more of them?

On the mixture of the paper's simulation, samples are added until the mean error of five fresh training sets is within
0.01 of the Bayes error, with 50 to 400 features for two classes and 50 to 150 for three; four samples (six) are the
fewest tried, as in the paper. Its classes lie farther apart the more features there are, so that naive Bayes needs
about five samples whatever their number: a logarithm, which the theorem has as an upper bound, cannot be told from a
constant, and no fit of one is judged. What is judged is the exponent: at most 0.3, about what a logarithm has in this
range, against at least 0.7 of logistic regression. There naive Bayes has the authors' smoothing of 1e-9 and logistic
regression their C = 1.

Image features are brought to [0, 1] by the training samples, as the authors do; the network of the trained ones has
seen 10,000 images of the other five classes, 3 epochs long. Each probe chooses among five values on 750 validation
images, naive Bayes with smoothing relative to the largest variance; the nearest class mean has nothing to choose.
Vision models trained on ImageNet, the paper's own, are not part of the study.
"""

from __future__ import annotations

from functools import partial

from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from trimtab import losses
from trimtab.studies.engine.study import Claim, Experiment, Study
from trimtab.studies.losses.naive_bayes_probe.probes import ACCURACY, GROWTH, Features, Probe, growth
from trimtab.studies.tasks.tabular_classification import Learner, clothes, few_clothes, incomes, tumours, wrong_labels


def naive_bayes(smoothing: float) -> losses.NaiveBayesProbe:
    """With a smoothing relative to the largest variance."""
    return losses.NaiveBayesProbe(smoothing, relative_smoothing=True)


def logistic(C: float) -> LogisticRegression:
    """Logistic regression of this strength."""
    return LogisticRegression(C=C, max_iter=1000)


def class_means(_: float) -> NearestCentroid:
    """The nearest class mean: what is left of naive Bayes where all variances are taken for one."""
    return NearestCentroid()


SMOOTHINGS = (1e-9, 1e-3, 1e-2, 1e-1, 1.0)
PROBES: dict[str, tuple[Probe, tuple[float, ...]]] = {
    "naive Bayes": (naive_bayes, SMOOTHINGS),
    "logistic regression": (logistic, (0.01, 0.1, 1.0, 10.0, 100.0)),
    "nearest class mean": (class_means, (0.0,)),
}


def on_mixture(classes: int) -> Experiment:
    """The samples needed on a mixture, with the authors' settings."""
    authors: dict[str, Probe] = {
        "naive Bayes": lambda _: losses.NaiveBayesProbe(),
        "logistic regression": lambda _: logistic(1.0),
        "nearest class mean": class_means,
    }
    return Experiment(
        f"mixture of {classes}",
        arms={name: partial(growth, probe=probe, classes=classes) for name, probe in authors.items()},
        metrics=GROWTH,
        seeds={"smoke": 1, "laptop": 10, "paper": 10},
        log="xy",
        cost=2.0,
    )


def on_features(name: str, features: Features) -> Experiment:
    """All probes on the features of images."""
    return Experiment(
        name,
        arms={
            probe: partial(features.run, probe=make, settings=settings) for probe, (make, settings) in PROBES.items()
        },
        metrics=ACCURACY,
        reads=(features.data,),
        log="x",
        cost=4.0,
    )


two, three = on_mixture(2), on_mixture(3)
fashion = on_features("trained features of Fashion-MNIST", Features("fashion_mnist", "trained"))
mnist = on_features("trained features of MNIST", Features("mnist", "trained"))
untrained = on_features("random features of Fashion-MNIST", Features("fashion_mnist", "random"))

study = Study(
    paper="naive_bayes_probe",
    entrants={
        "naive Bayes": Learner(
            estimator=lambda sample: naive_bayes(sample.setting["smoothing"]), search={"smoothing": SMOOTHINGS}
        )
    },
    on=[clothes, few_clothes, wrong_labels, tumours, incomes],
    experiments=[two, three, fashion, mnist, untrained],
    headline=Claim("naive Bayes", beats="logistic regression", on="few_shot", at=fashion),
    claims=[
        *(Claim("naive Bayes", beats="logistic regression", on="few_shot", at=at) for at in (mnist, untrained)),
        *(Claim("naive Bayes", below="logistic regression", on="settled_at", at=at) for at in (fashion, mnist)),
        Claim("naive Bayes", beats="nearest class mean", on="few_shot", at=fashion),
        Claim("logistic regression", beats="naive Bayes", on="many_shot", at=fashion),
        *(
            claim
            for at in (two, three)
            for claim in (
                Claim("naive Bayes", below="logistic regression", on="needed", times=4, at=at),
                Claim("naive Bayes", at_most=0.3, on="growth", at=at),
                Claim("logistic regression", at_least=0.7, on="growth", at=at),
            )
        ),
        *(
            Claim("naive Bayes", beats=other, on="test_accuracy", at=few_clothes)
            for other in ("logistic regression", "LDA")
        ),
    ],
)
