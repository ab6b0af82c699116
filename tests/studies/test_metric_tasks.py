"""The tasks of metric learning: the choice of a weight, and pictures of places."""

from __future__ import annotations

import pytest
import torch

from trimtab.data import load
from trimtab.metric import ECAMLLoss, EnergyConfusion
from trimtab.studies.study import Trial
from trimtab.studies.tasks.open_set_retrieval import OpenSetRetrieval
from trimtab.studies.tasks.place_recognition import PlaceNet, PlaceRecognition, Seen, photograph

pytest.importorskip("pytorch_metric_learning")


class TestWeights:
    task = OpenSetRetrieval(base="binomial")

    def test_weight_zero_is_the_base(self):
        base = self.task.train()(Trial()).metrics
        wrapped = self.task.train_weighted(lambda loss, weight: ECAMLLoss(loss, weight), (0.0,))(Trial()).metrics
        assert {k: v for k, v in wrapped.items() if k not in ("seconds", "weight")} == {
            k: v for k, v in base.items() if k != "seconds"
        }

    def test_the_best_on_held_out_classes_is_trained_in_full(self):
        def weighted(loss: torch.nn.Module, weight: float) -> ECAMLLoss:
            return ECAMLLoss(loss, weight, EnergyConfusion(normalize=True))

        weights = (30.0, 0.01, 0.1)
        result = self.task.train_weighted(weighted, weights)(Trial(seed=1))
        tried = result.curves["held_out_recall_at_1"]
        assert list(tried.x) == sorted(weights)
        chosen = tried.x[max(range(3), key=lambda i: tried.y[i])]
        assert result.metrics["weight"] == chosen
        alone = self.task.train_weighted(weighted, (chosen,))(Trial(seed=1)).metrics
        assert result.metrics["recall_at_1"] == alone["recall_at_1"]

    def test_a_term_on_the_layer_alone_leaves_the_layers_below_to_the_base(self):
        class Watch(torch.nn.Module):
            """Nothing but a term on what it is handed as `confused`."""

            def forward(self, embeddings: torch.Tensor, labels: torch.Tensor, confused: torch.Tensor) -> torch.Tensor:
                assert torch.equal(embeddings, confused)
                reached.append(torch.autograd.grad(confused.sum(), embeddings, retain_graph=True, allow_unused=True)[0])
                return 0 * embeddings.sum() + confused.square().mean()

        reached: list[torch.Tensor | None] = []
        self.task.train_weighted(lambda loss, weight: Watch(), (1.0,), layer_only=True)(Trial())
        assert set(reached) == {None}  # made by a second pass of the layer


class TestPlaces:
    items = load("digits").x_train

    def test_views_of_a_place_show_things_on_its_ground(self):
        views = photograph(self.items, 5, 3, torch.Generator().manual_seed(0))
        assert views.images.shape == (15, 1, 48, 48)
        assert views.places.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
        assert 0.02 < views.things.mean() < 0.5
        assert set(views.things.unique().tolist()) == {0.0, 1.0}
        again = photograph(self.items, 5, 3, torch.Generator().manual_seed(0))
        assert torch.equal(views.images, again.images)

    def test_the_network_gives_what_region_losses_need(self):
        seen: Seen = PlaceNet()(torch.randn(2, 1, 48, 48))
        assert seen.local.shape[2:] == seen.features.shape[2:] == (12, 12)
        torch.testing.assert_close(seen.importance.sum(1), torch.full((2,), 4.0))  # four heads
        torch.testing.assert_close(seen.aggregation.assignment.sum((1, 2)), torch.full((2,), 16.0), rtol=0.2, atol=0)

    def test_a_region_loss_changes_what_is_trained_and_is_given_places(self):
        handed: list[int] = []

        def loss(seen: Seen, places: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            handed.append(len(places.unique()))
            return seen.importance.square().sum()

        task = PlaceRecognition()
        plain, other = (task.train(region_loss=loss_or_none)(Trial()).metrics for loss_or_none in (None, loss))
        assert set(handed) == {12}
        assert plain["attention_mass"] != other["attention_mass"]
