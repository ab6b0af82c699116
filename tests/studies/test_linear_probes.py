"""The mixture on which samples are counted, and the features of the few-shot comparison."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.studies.engine.study import Trial
from trimtab.studies.losses.naive_bayes_probe.probes import Features, bayes_error, growth, mixture, smallest


@pytest.mark.parametrize("classes", [2, 3])
def test_the_bayes_error_is_that_of_the_true_means_and_variances(classes):
    n = 10
    X, y = mixture(n, classes, 100_000, Trial().generator())
    means = np.array([-1.0, 1.0, 2.0])[:classes]
    variances = np.where(np.arange(n) < n // 2, n, 1)
    scores = np.stack([-(((X - mean) ** 2) / variances).sum(1) for mean in means], 1)
    assert (scores.argmax(1) != y).mean() == pytest.approx(bayes_error(n, classes), abs=0.003)


def test_the_smallest_number_is_found_and_capped():
    assert smallest(lambda m: m >= 19, 4, 1000) == 19
    assert 200 <= smallest(lambda m: m >= 200, 4, 1000) <= 210
    assert smallest(lambda m: False, 4, 100) == 100


def test_growth_is_the_exponent_of_the_samples_needed():
    class Counter:
        """Right once it has seen half as many samples as there are features."""

        def fit(self, X, y):
            self.right = len(X) >= X.shape[1] / 2

        def score(self, X, y):
            return 1.0 if self.right else 0.0

    found = growth(Trial(), lambda _: Counter(), 2)
    assert list(found.curves["samples needed"].y) == [40, 50]
    assert found.metrics["growth"] == pytest.approx(1)


def test_the_validation_part_decides_and_the_test_part_is_scored():
    class Fixed:
        def __init__(self, quality):
            self.quality = quality

        def fit(self, X, y):
            assert X.min() >= 0
            assert X.max() <= 1 + 1e-12
            assert len(np.unique(y)) == 5

        def score(self, X, y):
            return self.quality

    found = Features("mnist", "random").run(Trial(), Fixed, (0.2, 0.9, 0.5))
    assert found.metrics["few_shot"] == found.metrics["many_shot"] == 0.9
