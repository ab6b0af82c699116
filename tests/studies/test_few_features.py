"""The contests of supervised dictionaries: what is drawn, and how a setting is chosen."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cross_decomposition import PLSRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from trimtab.studies.engine.study import Trial
from trimtab.studies.solvers.supervised_dictionary.few_features import (
    RARITY,
    FeaturesThenRegression,
    HiddenDirection,
    Part,
    compete,
    pca,
    regression,
    thin_out,
)


def test_the_label_depends_on_a_direction_of_little_variance():
    part = HiddenDirection().contest(Trial(budget="laptop")).train
    values, axes = np.linalg.eigh(np.cov(part.x.T))
    assert values[-5] > 20 > 3 > values[-6]
    strong = part.x @ axes[:, -5:]
    weak = part.x @ axes[:, :-5]

    def auc(features: np.ndarray) -> float:
        half = len(part.y) // 2
        model = LogisticRegression().fit(features[:half], part.y[:half])
        return roc_auc_score(part.y[half:], model.decision_function(features[half:]))

    assert auc(strong) < 0.65
    assert auc(weak) > 0.9


def test_the_rare_class_is_one_in_eleven():
    part = Part(np.arange(500.0)[:, None], np.arange(500) % 2, np.empty((500, 0)))
    kept = thin_out(part, Trial().generator())
    assert (kept.y == 0).sum() == RARITY * (kept.y == 1).sum() == 250
    np.testing.assert_array_equal(kept.x[:, 0] % 2, kept.y)


def test_a_learner_that_asks_for_labels_sees_them():
    part = HiddenDirection().contest(Trial()).train
    model = FeaturesThenRegression(PLSRegression(2), LogisticRegression()).fit(part.x, part.y)
    assert model.transform(part.x).shape == (len(part.x), 2)
    assert roc_auc_score(part.y, model.decision_function(part.x)) > 0.8


def test_validation_decides_between_settings():
    contest = HiddenDirection(rank=1).contest(Trial(budget="laptop"))
    useless, useful = [compete(Trial(), contest, build, [{"C": 1.0}]).metrics["auc"] for build in (pca, regression)]
    assert useless < 0.6 < 0.9 < useful

    def either(contest, good):
        return (regression if good else pca)(contest, 1.0)

    chosen = compete(Trial(budget="laptop"), contest, either, [{"good": False}, {"good": True}])
    assert chosen.metrics["auc"] == pytest.approx(useful)
