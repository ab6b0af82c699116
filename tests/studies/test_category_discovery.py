from __future__ import annotations

import pytest
import torch

from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.category_discovery import Discovery, balanced, classifier, digits, kmeans, simgcd
from trimtab.studies.tools.discovery import known_kmeans


def test_half_of_the_known_classes_is_labelled_and_no_other_label_is_seen() -> None:
    found, truth = digits.found(Trial())
    assert (truth[found.labelled] < 5).all()
    share = found.labelled[truth < 5].float().mean()
    assert 0.35 < share < 0.65
    assert torch.equal(found.targets[found.labelled], truth[found.labelled])
    assert (found.targets[~found.labelled] == -1).all()
    assert found.views.shape == (2, *found.x.shape)


def test_hidden_labels_change_nothing_that_contestants_start_from() -> None:
    one, _ = digits.found(Trial())
    other, _ = digits.found(Trial())
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.views, other.views)
    for first, second in zip(one.features.parameters(), other.features.parameters(), strict=True):
        assert torch.equal(first, second)


def test_half_of_the_draws_are_labelled() -> None:
    labelled = torch.arange(40) < 10
    chances = balanced(labelled)
    torch.testing.assert_close(chances[labelled].sum(), chances[~labelled].sum())
    for part in (chances[labelled], chances[~labelled]):
        assert part.min() == part.max()


def test_settings_are_chosen_by_labels_that_are_then_hidden() -> None:
    found, truth = digits.found(Trial())
    tried, _ = digits.found(Trial(searching=True))
    assert (found.labelled | ~tried.labelled).all()
    assert 0.7 < tried.labelled.sum() / found.labelled.sum() < 0.9
    assert (tried.targets[~tried.labelled] == -1).all()
    told = digits.may_be_labelled(truth, Trial(searching=True))
    assert torch.equal(told, found.labelled)
    result = digits.run(Trial(searching=True, setting={"lr": 1e-3}), Discovery(rule=simgcd))
    assert result.score is not None
    assert 0 <= result.score <= 1
    assert not result.metrics


def test_simgcd_is_lego_gcd_without_its_two_terms() -> None:
    found, _ = digits.found(Trial())
    rule = simgcd(found)
    assert (rule.ler, rule.dkl) == (0.0, 0.0)
    assert (classifier(found).ler, classifier(found).dkl) == (2.0, 1.0)


def test_known_kmeans_keeps_labels_and_finds_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(80) % 4
    features = 10 * torch.eye(4)[truth] + torch.randn(80, 4, generator=generator)
    labelled = (truth < 2) & (torch.arange(80) % 8 < 4)
    assigned = known_kmeans(features, torch.where(labelled, truth, -1), labelled, 4, seed=0)
    assert torch.equal(assigned[truth < 2], truth[truth < 2])
    for label in (2, 3):
        assert len(assigned[truth == label].unique()) == 1
    assert len(assigned.unique()) == 4


def test_a_contestant_brings_one_of_two() -> None:
    for given in ({}, {"rule": simgcd, "assign": kmeans}):
        with pytest.raises(ValueError, match="rule must be given"):
            Discovery(**given)  # type: ignore[arg-type]
