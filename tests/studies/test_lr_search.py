"""The choice of a learning rate, and that image classification hands it to the optimizer."""

import pytest
import torch

from trimtab.studies.lr_search import best_learning_rate
from trimtab.studies.study import Trial
from trimtab.studies.tasks.image_classification import ImageClassification


def test_the_best_score_wins_and_failures_lose():
    scores = {0.1: float("nan"), 0.01: 0.7, 0.001: 0.2}
    assert best_learning_rate(list(scores), scores.get) == 0.01
    assert best_learning_rate([0.1, 0.001], scores.get) == 0.001


@pytest.mark.parametrize("grid", [[], [0.1, 0.0], [-1.0], [float("nan")]])
def test_a_grid_without_sense_is_refused(grid):
    with pytest.raises(ValueError, match="grid"):
        best_learning_rate(grid, lambda rate: rate)


def test_image_classification_trains_with_the_rate_it_chose():
    task = ImageClassification(net="mlp")

    def optimizer(params, plan, lr):
        return torch.optim.SGD(params, lr=lr, momentum=0.9)

    metrics = task.train(optimizer=optimizer, lr=(1e-9, 0.1))(Trial()).metrics
    assert metrics["learning_rate"] == 0.1
    alone = task.train(optimizer=lambda params, plan: optimizer(params, plan, 0.1))(Trial()).metrics
    assert metrics["test_accuracy"] == alone["test_accuracy"]
    assert metrics["sharpness"] == alone["sharpness"] > 0
