"""The laws and the noise of the halfspaces are what it says they are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.tester_learner.halfspaces import (
    MARGINALS,
    Answer,
    Halfspaces,
    _directions,
    _samples,
    logistic,
    moments_only,
)

TRIAL = Trial(budget="laptop")


@pytest.mark.parametrize("law", MARGINALS)
def test_moments_of_the_laws(law):
    w, _ = _directions(5, TRIAL.generator())
    X = _samples(law, 200_000, w, TRIAL.generator(1))
    np.testing.assert_allclose(X.mean(0), 0, atol=0.02)
    covariance = X.T @ X / len(X)
    if law == "clusters":
        np.testing.assert_allclose(np.linalg.eigvalsh(covariance), [1, 1, 1, 1, 2], atol=0.03)
    elif law == "correlated":
        np.testing.assert_allclose(covariance[0], [1, 0.5, 0.25, 0.125, 0.0625], atol=0.02)
    else:
        np.testing.assert_allclose(covariance, np.eye(5), atol=0.03)
        fourth = {"gaussian": 3, "slab": 3, "laplace": 6, "uniform": 1.8}[law]
        np.testing.assert_allclose((X**4).mean(0), fourth, rtol=0.06)
    if law == "slab":
        along = X @ w
        assert [(along**k).mean() for k in (2, 4)] == pytest.approx([1, 3], rel=0.02)
        assert (np.abs(along) < 0.3).mean() == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("noise, rate", [("massart", 0.3), ("adversarial", 0.05)])
def test_the_true_halfspace_has_no_excess_and_its_negation_all(noise, rate):
    task = Halfspaces(noise=noise, rate=rate)
    sample, excess = task.draw(TRIAL, "gaussian")
    w, other = _directions(5, TRIAL.generator(MARGINALS.index("gaussian")))
    wrong = np.sign(sample.X @ w) != sample.y
    share = rate / 2 if noise == "massart" else rate
    assert wrong.mean() == pytest.approx(share, abs=0.01)
    assert excess(w) == 0
    assert excess(-w) == pytest.approx(1 - 2 * share, abs=0.01)
    if noise == "adversarial":
        pull = np.sign(sample.X @ w) * (sample.X @ other)
        assert pull[wrong].min() >= pull[~wrong].max()
    tilted = math.cos(0.3) * w - math.sin(0.3) * other
    if noise == "massart":
        assert 0 < excess(tilted) < 0.3 / math.pi
        assert excess(tilted) > (1 - 2 * rate) * 0.9 * 0.3 / math.pi


def test_what_was_not_accepted_does_not_count():
    careful = Halfspaces().run(Trial(), lambda sample: Answer(-logistic(sample).w, accepted=False))
    assert careful.metrics["excess_accepted"] == 0
    assert careful.metrics["rejects_others"] == 1
    assert careful.metrics["excess_slab"] > 0.5
    bold = Halfspaces().run(Trial(), logistic)
    assert bold.metrics["excess_accepted"] == max(bold.metrics[f"excess_{law}"] for law in MARGINALS)


def test_the_test_of_moments_sees_all_laws_but_the_slab():
    metrics = Halfspaces().run(TRIAL, moments_only).metrics
    assert [metrics[f"accepts_{law}"] for law in MARGINALS] == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("options", [{"noise": "tsybakov"}, {"rate": 0.5}, {"dimensions": 1}])
def test_variants_out_of_range_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Halfspaces(**options)
