from __future__ import annotations

import torch

from trimtab.semisup import DistributionAlignment
from trimtab.studies.engine.study import Trial
from trimtab.studies.tasks.few_labels import Batches, FewLabels, evenly, fashion_40, photographs_250
from trimtab.studies.tools.few_label_rules import FixMatch, LabelledOnly, MixMatch, PseudoLabel


def test_the_parts_of_the_data_are_disjoint_and_labels_are_even() -> None:
    split = fashion_40.split(Trial(seed=1))
    assert torch.equal(torch.bincount(split.y), torch.full((10,), 2))
    assert len(split.x_held) == 100
    assert len(split.unlabelled) == len(split.hidden) == 400
    parts = [split.x, split.x_held, split.unlabelled]
    rows = [{tuple(image.flatten().tolist()) for image in part} for part in parts]
    assert not (rows[0] & rows[1])
    assert not (rows[0] & rows[2])
    assert not (rows[1] & rows[2])
    assert not torch.equal(split.x, fashion_40.split(Trial(seed=2)).x)


def test_even_choice_gives_the_first_of_each_class() -> None:
    y = torch.tensor([2, 2, 0, 1, 1, 2, 0, 1])
    assert y[evenly(y, 6)].bincount().tolist() == [2, 2, 2]
    assert y[evenly(y, 4)].bincount().sum() == 4


def test_all_contestants_get_the_same_batches() -> None:
    one, other = (Batches(fashion_40.split(Trial()), Trial()) for _ in range(2))
    first = one.draw()
    first.weak_again()  # a further view moves no other draw
    other.draw()
    a, b = one.draw(), other.draw()
    for name in ("x", "targets", "index", "weak", "strong"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_views_of_photographs_are_mirrored_and_no_others() -> None:
    trial, split = Trial(), fashion_40.split(Trial())
    plain, mirrored = Batches(split, trial).draw(), Batches(split, trial, flip=True).draw()
    assert torch.equal(plain.index, mirrored.index)
    assert not torch.equal(plain.weak, mirrored.weak)
    assert photographs_250.photographs
    assert not any(task.photographs for label, task in FewLabels.variants().items() if "photographs" not in label)


def test_photographs_are_read_at_length_alone() -> None:
    assert photographs_250.datasets("laptop") == ("cifar10",)
    assert photographs_250.datasets("smoke") == ("digits",)
    task = FewLabels("cifar10", labels=10, photographs=True)
    entrant = task.references()["FixMatch"]
    found = task.run(Trial(setting={"threshold": 0.8}), entrant)
    assert 0 <= found.metrics["accuracy"] <= 1


def drawn(count: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_references_reduce_to_each_other() -> None:
    network = torch.nn.Linear(6, 4)
    x, targets, weak, strong = drawn(5, 0), torch.arange(5) % 4, drawn(9, 1), drawn(9, 2)
    plain = LabelledOnly(network).loss(x, targets, weak, strong)["total"]
    for rule in (FixMatch(network, 1.1), PseudoLabel(network, 1.1)):
        found = rule.loss(x, targets, weak, strong)
        torch.testing.assert_close(found["total"], plain)
        assert found["used"] == 0
    fix, pseudo = FixMatch(network, 0.6), PseudoLabel(network, 0.6)
    torch.testing.assert_close(
        fix.loss(x, targets, weak, weak)["total"], pseudo.loss(x, targets, weak, strong)["total"]
    )
    aligned = FixMatch(network, 0.6, DistributionAlignment(4))  # even at first
    torch.testing.assert_close(
        aligned.loss(x, targets, weak, strong)["total"], fix.loss(x, targets, weak, strong)["total"]
    )


def test_mixmatch_starts_without_the_unlabelled() -> None:
    network = torch.nn.Linear(6, 4)
    rule = MixMatch(network, torch.Generator().manual_seed(0), weight=10.0, rampup=2)
    losses = [rule.loss(drawn(5, 0), torch.arange(5) % 4, drawn(9, 1), drawn(9, 2))["total"] for _ in range(3)]
    assert all(loss.isfinite() for loss in losses)
    assert rule.step == 3


def test_the_search_sees_no_test_image() -> None:
    task = FewLabels(labels=10)
    entrant = task.references()["FixMatch"]
    found = task.run(Trial(setting={"threshold": 0.8}, searching=True), entrant)
    assert found.score is not None
    assert not found.metrics
