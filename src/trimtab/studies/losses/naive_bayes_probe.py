"""Does naive Bayes need fewer samples than logistic regression, and more features barely more of them?"""

from __future__ import annotations

from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB

from trimtab import losses
from trimtab.studies.study import Claim, Study
from trimtab.studies.tasks.linear_probe import LinearProbe, Probe

naive_bayes: Probe = lambda smoothing: losses.NaiveBayesProbe(smoothing)
logistic: Probe = lambda C: LogisticRegression(C=C, max_iter=1000)
unshared: Probe = lambda smoothing: GaussianNB(var_smoothing=smoothing)
relative: Probe = lambda smoothing: losses.NaiveBayesProbe(smoothing, relative_smoothing=True)

PLACES = {
    "mixture of 2": LinearProbe(),
    "mixture of 3": LinearProbe(classes=3),
    "trained features of Fashion-MNIST": LinearProbe("fashion_mnist"),
    "trained features of MNIST": LinearProbe("mnist"),
    "random features of Fashion-MNIST": LinearProbe("fashion_mnist", features="random"),
}
TRAINED = [place for place in PLACES if place.startswith("trained")]
SEARCHED = "trained features of Fashion-MNIST"

study = Study(
    paper="naive_bayes_probe",
    arms={
        **{f"naive Bayes, {place}": task.probe(naive_bayes, [1e-9]) for place, task in PLACES.items()},
        **{f"logistic regression, {place}": task.probe(logistic, [1.0]) for place, task in PLACES.items()},
        **{
            f"variances of each class, {place}": PLACES[place].probe(unshared, [1e-9])
            for place in ("mixture of 2", SEARCHED)
        },
        "naive Bayes, searched": PLACES[SEARCHED].probe(relative, [1e-9, 1e-3, 1e-2, 1e-1, 1.0]),
        "logistic regression, searched": PLACES[SEARCHED].probe(logistic, [0.01, 0.1, 1.0, 10.0, 100.0]),
    },
    claims=[
        # Samples needed: log n against n.
        *(
            claim
            for place in ("mixture of 2", "mixture of 3")
            for claim in (
                Claim(f"naive Bayes, {place}", at_least=0.9, on="log_fit"),
                Claim(f"logistic regression, {place}", at_least=0.9, on="linear_fit"),
                Claim(f"naive Bayes, {place}", below=f"logistic regression, {place}", on="needed", times=4),
            )
        ),
        # Few shots, in all places; then the two regimes of trained features.
        *(
            Claim(f"naive Bayes, {place}", beats=f"logistic regression, {place}", on="few_shot")
            for place in PLACES
            if "features" in place
        ),
        Claim("naive Bayes, searched", beats="logistic regression, searched", on="few_shot"),
        *(
            claim
            for place in TRAINED
            for claim in (
                Claim(f"naive Bayes, {place}", below=f"logistic regression, {place}", on="settled_at"),
                Claim(f"logistic regression, {place}", beats=f"naive Bayes, {place}", on="many_shot"),
            )
        ),
    ],
    seeds={"laptop": 4},
    plot=["needed", "test_accuracy"],
    log="xy",
    leaderboard=[
        "naive Bayes, mixture of 2",
        "logistic regression, mixture of 2",
        "variances of each class, mixture of 2",
    ],
    notes=(
        "On the mixture of the paper's simulation, samples are added until the mean error of five fresh training sets "
        "is within 0.01 of the Bayes error, with 50 to 400 features for two classes and 100 to 250 for three; four "
        "samples (six) are the fewest tried, as in the paper. Image features are brought to [0, 1] by the training "
        "samples, as the authors do; the network of the trained ones has seen 10,000 images of the other five classes, "
        "3 epochs long. Naive Bayes has the authors' smoothing of 1e-9 and logistic regression their C = 1; where it "
        "says searched, each chooses among five values on 1,000 validation images, naive Bayes with smoothing relative "
        "to the largest variance. Vision models trained on ImageNet, the paper's own, are not part of the study."
    ),
)
