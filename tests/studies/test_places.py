"""Pictures of places, and what region losses are given."""

from __future__ import annotations

import pytest
import torch

from trimtab.data import load
from trimtab.studies.engine.study import Trial
from trimtab.studies.metric.fol.places import PlaceNet, Seen, photograph, recognise

pytest.importorskip("pytorch_metric_learning")

ITEMS = load("digits").x_train


def test_views_of_a_place_show_things_on_its_ground():
    views = photograph(ITEMS, 5, 3, torch.Generator().manual_seed(0))
    assert views.images.shape == (15, 1, 48, 48)
    assert views.places.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert 0.02 < views.things.mean() < 0.5
    assert set(views.things.unique().tolist()) == {0.0, 1.0}
    again = photograph(ITEMS, 5, 3, torch.Generator().manual_seed(0))
    assert torch.equal(views.images, again.images)


def test_the_network_gives_what_region_losses_need():
    seen: Seen = PlaceNet()(torch.randn(2, 1, 48, 48))
    assert seen.local.shape[2:] == seen.features.shape[2:] == (12, 12)
    torch.testing.assert_close(seen.importance.sum(1), torch.full((2,), 4.0))  # four heads
    torch.testing.assert_close(seen.aggregation.assignment.sum((1, 2)), torch.full((2,), 16.0), rtol=0.2, atol=0)


def test_a_region_loss_changes_what_is_trained_and_is_given_places():
    handed: list[int] = []

    def loss(seen: Seen, places: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        handed.append(len(places.unique()))
        return seen.importance.square().sum()

    plain, other = (recognise(Trial(), region_loss=loss_or_none).metrics for loss_or_none in (None, loss))
    assert set(handed) == {12}
    assert plain["attention_mass"] != other["attention_mass"]
