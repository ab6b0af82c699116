"""The tables of the shared task, its network and its baselines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from trimtab.data import DataNotFoundError
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks import tabular_classification as task
from trimtab.studies.tasks.tabular_classification import (
    CrossEntropy,
    Learner,
    PartialLeastSquares,
    TabularClassification,
    tumours,
)

LAPTOP = Trial(budget="laptop")


def as_set(rows: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in rows}


def test_a_quarter_is_held_out_and_the_test_part_is_drawn_apart():
    table = tumours.table(LAPTOP)
    assert (len(table.y), len(table.y_held), len(table.y_test)) == (285, 94, 190)
    parts = [as_set(part) for part in (table.x, table.x_held, table.x_test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 569
    assert as_set(tumours.table(Trial(seed=1, budget="laptop")).x_test) != parts[2]


def test_labels_are_drawn_anew_in_training_and_held_out_parts_alone():
    clean, noisy = (TabularClassification("breast_cancer", noise=rate).table(LAPTOP) for rate in (0.0, 0.4))
    np.testing.assert_array_equal(clean.x, noisy.x)
    wrong = np.concatenate([clean.y != noisy.y, clean.y_held != noisy.y_held])
    assert wrong.mean() == pytest.approx(0.2, abs=0.05)
    np.testing.assert_array_equal(clean.y_test, noisy.y_test)


def test_while_settings_are_tried_the_test_part_is_not_looked_at():
    class Watch(LogisticRegression):
        def predict(self, X):
            seen.append(len(X))
            return super().predict(X)

    seen: list[int] = []
    found = tumours.run(Trial(searching=True, budget="laptop"), Learner(estimator=lambda sample: Watch()))
    assert seen == [94]
    assert not found.metrics
    assert 0.8 < found.score <= 1


def test_one_logit_is_the_difference_of_two():
    logits, targets = torch.randn(9, 1, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2
    both = torch.cat([torch.zeros_like(logits), logits], 1)
    torch.testing.assert_close(CrossEntropy()(logits, targets), F.cross_entropy(both, targets))
    torch.testing.assert_close(CrossEntropy()(both, targets), F.cross_entropy(both, targets))


def test_the_area_is_that_of_each_class_against_the_others():
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(60, 3)), np.arange(60) % 3

    class Fixed:
        def __init__(self, values):
            self.values = values

        def decision_function(self, x):
            return self.values

    by_hand = np.mean([roc_auc_score(y == k, scores[:, k]) for k in range(3)])
    assert task._auc(Fixed(scores), y, y) == pytest.approx(by_hand)
    two = (y > 0).astype(int)
    columns = np.stack([-scores[:, 0], scores[:, 0]], 1)
    assert task._auc(Fixed(columns), y, two) == pytest.approx(task._auc(Fixed(scores[:, 0]), y, two))


def test_partial_least_squares_finds_what_varies_with_the_labels():
    rng = np.random.default_rng(0)
    y = np.arange(200) % 2
    x = rng.normal(size=(200, 6)) * [20, 1, 1, 1, 1, 1]
    x[:, 3] += 4 * y
    model = PartialLeastSquares(2).fit(x, y)
    assert (model.predict(x) == y).mean() > 0.95
    assert ((model.decision_function(x) > 0) == (model.predict(x) == 1)).all()
    assert PartialLeastSquares(100).fit(x, y).pls_.n_components == 6


def test_arrays_of_ones_own_may_have_three_classes(tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = (rng.normal(size=(300, 4)) + 5 * np.eye(4)[y]).astype(np.float32)
    np.savez(tmp_path / "mine.npz", x_train=x[:200], y_train=y[:200], x_test=x[200:], y_test=y[200:])
    mine = TabularClassification(str(tmp_path / "mine.npz"))
    references = TabularClassification.references()
    for name, setting in (("MLP", {"lr": 0.1}), ("LDA", {"shrinkage": 0.01}), ("PLS", {"components": 3})):
        metrics = mine.run(Trial(setting=setting), references[name]).metrics
        assert metrics["test_accuracy"] > 0.9
        assert metrics["auc"] > 0.95


def test_incomes_have_one_indicator_of_each_column_of_categories():
    try:
        x, y, x_test, _, classes = task._incomes()
    except DataNotFoundError:
        pytest.skip("the data set adult is not on this machine")
    assert (x.shape, x_test.shape, classes) == ((32_561, 108), (16_281, 108), 2)
    assert y.float().mean() == pytest.approx(0.241, abs=0.001)
    indicators = ((x == 0) | (x == 1)).all(0)
    assert int(indicators.sum()) == 102
    assert (x_test[:, indicators].sum(1) == 8).all()
    torch.testing.assert_close(x[:, ~indicators].mean(0), torch.zeros(6), atol=1e-4, rtol=0)


def test_entrants_and_variants_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"^estimator must"):
        Learner(estimator=lambda sample: LogisticRegression(), loss=lambda plan: CrossEntropy())
    with pytest.raises(ValueError, match=r"^noise must"):
        TabularClassification(noise=1.0)
    with pytest.raises(ValueError, match=r"^size must"):
        TabularClassification(size=4)
