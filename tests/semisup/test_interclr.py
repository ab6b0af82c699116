from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.info_nce import info_nce
from trimtab.semisup import ClusterMemory, InterCLR, draw_negatives, draw_positives, inter_image_loss


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(per: int = 10, clusters: int = 3) -> tuple[Tensor, Tensor]:
    """Points around orthogonal directions, and which they are around."""
    labels = torch.arange(clusters).repeat_interleave(per)
    return torch.eye(4)[labels] + 0.1 * draws(len(labels), 4), labels


def memory(**options: float) -> ClusterMemory:
    held = ClusterMemory(30, 4, 3, **options)  # type: ignore[arg-type]
    # Starts from one point of each blob, so that no start can leave two in one.
    z, labels = blobs()
    held.bank.write(torch.arange(30), z, labels)
    held.renew()
    return held


def test_k_means_finds_clear_clusters() -> None:
    z, labels = blobs()
    found = []
    for seed in range(5):
        held = ClusterMemory(30, 4, 3)
        held.start(5 * z, generator=torch.Generator().manual_seed(seed))
        same, true = held.labels[:, None] == held.labels, labels[:, None] == labels
        found.append(bool((same == true).all()))
        torch.testing.assert_close(held.features, F.normalize(z, dim=1))
        means = torch.stack([held.features[held.labels == c].mean(0) for c in range(3)])
        torch.testing.assert_close(held.centroids, means)
    assert any(found)


@pytest.mark.parametrize("momentum", [1.0, 0.3])
def test_writing_moves_features_and_labels(momentum: float) -> None:
    held = memory(momentum=momentum)
    before, index = held.features.clone(), torch.tensor([4, 25])
    z = 7 * torch.eye(4)[[2, 0]]
    held.write(index, z)
    expected = F.normalize((1 - momentum) * before[index] + momentum * F.normalize(z, dim=1), dim=1)
    torch.testing.assert_close(held.features[index], expected)
    torch.testing.assert_close(held.features.norm(dim=1), torch.ones(30))
    assert torch.equal(held.labels[index], (expected @ held.centroids.T).argmax(1))
    others = torch.ones(30, dtype=torch.bool)
    others[index] = False
    assert torch.equal(held.features[others], before[others])


def test_centroids_follow_when_they_are_renewed() -> None:
    held = memory()
    before = held.centroids.clone()
    held.write(torch.tensor([0]), torch.eye(4)[[1]])
    assert torch.equal(held.centroids, before)
    held.renew()
    expected = torch.stack([held.features[held.labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(held.centroids, expected)
    assert held.labels.bincount().tolist() == [9, 11, 10]


def test_small_clusters_make_room_for_halves_of_the_largest() -> None:
    z, labels = blobs(clusters=2)
    spread = torch.cat([z, z[:10] + 0.5 * torch.eye(4)[3]])  # the first blob has two parts, 20 members
    held = ClusterMemory(30, 4, 4, min_cluster=3)
    given = torch.cat([labels, torch.zeros(10, dtype=torch.int64)])
    given[19] = 2  # a cluster of one, and cluster 3 has none
    held.bank.write(torch.arange(30), spread, given)
    held.renew()
    counts = held.labels.bincount(minlength=4)
    assert (counts >= 3).all()
    assert held.labels[19] == held.labels[18]  # dissolved into the nearest
    for c in range(4):
        torch.testing.assert_close(held.centroids[c], held.features[held.labels == c].mean(0))


def test_equal_features_are_split_too() -> None:
    held = ClusterMemory(8, 2, 2)
    held.start(torch.ones(8, 2), generator=torch.Generator().manual_seed(0))
    assert (held.labels.bincount(minlength=2) > 0).all()


def test_positives_are_drawn_evenly_from_the_label() -> None:
    labels = torch.tensor([5, 2, 5, 7, 5, 2])
    index = torch.tensor([0, 3, 1]).repeat(3000)
    drawn = draw_positives(labels, index, generator=torch.Generator().manual_seed(0))
    assert torch.equal(labels[drawn], labels[index])
    of_first = drawn[::3].bincount(minlength=6)
    assert of_first.count_nonzero() == 3
    torch.testing.assert_close(of_first[[0, 2, 4]] / 3000, torch.full((3,), 1 / 3), rtol=0, atol=0.04)


def test_negatives_share_no_label_and_come_once() -> None:
    cosines, labels = draws(6, 40).tanh(), torch.arange(40) % 4
    same = (torch.arange(6) % 4)[:, None] == labels
    for sampling in ("semihard", "hard", "random", "semieasy"):
        found = draw_negatives(cosines, same, 8, 20, sampling=sampling, generator=torch.Generator().manual_seed(0))
        assert found.shape == (6, 8)
        assert not same.gather(1, found).any()
        assert all(len(set(row.tolist())) == 8 for row in found)


def test_negatives_come_from_their_pool() -> None:
    cosines, none = draws(3, 40).tanh(), torch.zeros(3, 40, dtype=torch.bool)
    order = cosines.argsort(1, descending=True)
    seen: dict[str, set[int]] = {"semihard": set(), "semieasy": set(), "random": set()}
    for seed in range(120):
        for sampling, found in seen.items():
            generator = torch.Generator().manual_seed(seed)
            found |= set(draw_negatives(cosines, none, 4, 10, sampling=sampling, generator=generator)[0].tolist())
    assert seen["semihard"] == set(order[0, :10].tolist())
    assert seen["semieasy"] == set(order[0, -10:].tolist())
    assert seen["random"] == set(range(40))
    hard = draw_negatives(cosines, none, 4, 10, sampling="hard")
    assert torch.equal(hard, order[:, :4])
    all_of_pool = draw_negatives(cosines, none, 10, 10)
    assert torch.equal(all_of_pool.sort(1).values, order[:, :10].sort(1).values)


def test_without_margin_it_is_info_nce() -> None:
    held, query, index = memory(), draws(5, 4, seed=3).requires_grad_(), torch.tensor([0, 3, 12, 19, 29])

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(4)

    value = inter_image_loss(query, index, held, 6, 12, margin=0.0, temperature=0.3, generator=generator())
    cosines = F.normalize(query, dim=1) @ held.features.T
    drawn = generator()
    same = held.labels[index][:, None] == held.labels
    negatives = held.features[draw_negatives(cosines, same, 6, 12, generator=drawn)]
    positives = held.features[draw_positives(held.labels, index, generator=drawn)]
    expected = info_nce(query, positives, negatives, 0.3)
    torch.testing.assert_close(value, expected)
    for one, other in zip(torch.autograd.grad(value, query), torch.autograd.grad(expected, query), strict=True):
        torch.testing.assert_close(one, other)
    easier = inter_image_loss(query, index, held, 6, 12, margin=-0.5, temperature=0.3, generator=generator())
    assert easier < value


def test_a_query_without_other_labels_costs_nothing() -> None:
    held = ClusterMemory(6, 2, 2)
    held.bank.write(torch.arange(6), torch.ones(6, 2), torch.zeros(6, dtype=torch.int64))
    query = draws(2, 2).requires_grad_()
    value = inter_image_loss(query, torch.tensor([0, 1]), held, 3, 4)
    assert value.item() == 0
    (gradient,) = torch.autograd.grad(value, query)
    assert (gradient == 0).all()


def test_the_rule_weighs_and_renews() -> None:
    rule = InterCLR(memory(), 6, 12, inter_weight=0.25, renew_every=2)
    query, index = draws(5, 4, seed=3), torch.arange(5)
    found = rule.loss(query, index, torch.tensor(2.0), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found["total"], 0.75 * torch.tensor(2.0) + 0.25 * found["inter"])
    before = rule.memory.centroids.clone()
    rule.update(index, query)
    assert torch.equal(rule.memory.centroids, before)
    rule.update(index, query)
    assert not torch.equal(rule.memory.centroids, before)
    other = InterCLR(memory(), 6, 12, renew_every=2)
    other.load_state_dict(rule.state_dict())
    assert other.updates == 2
    assert torch.equal(other.memory.labels, rule.memory.labels)


def test_other_types_and_autocast() -> None:
    held, query, index = memory(), draws(5, 4, seed=3), torch.arange(5)

    def value(q: Tensor) -> Tensor:
        return inter_image_loss(q, index, held, 6, 12, generator=torch.Generator().manual_seed(0))

    assert value(query.double()).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = value(query.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, value(query), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, z, i: ClusterMemory(3, 4, 5), "num_clusters"),
        (lambda m, z, i: ClusterMemory(30, 4, 3, momentum=0.0), "momentum"),
        (lambda m, z, i: m.start(z), "z"),
        (lambda m, z, i: m.start(float("nan") * torch.ones(30, 4)), "z"),
        (lambda m, z, i: m.start(draws(30, 4), iterations=0), "iterations"),
        (lambda m, z, i: m.write(i, z[:, :3]), "z"),
        (lambda m, z, i: m.write(i[:3], z), "index"),
        (lambda m, z, i: m.write(i + 26, z), "index"),
        (lambda m, z, i: m.write(i // 2, z), "index"),
        (lambda m, z, i: inter_image_loss(z, i + 26, m, 6, 12), "index"),
        (lambda m, z, i: inter_image_loss(z[:0], i[:0], m, 6, 12), "z"),
        (lambda m, z, i: inter_image_loss(z, i, m, 6, 31), "pool"),
        (lambda m, z, i: inter_image_loss(z, i, m, 13, 12), "pool"),
        (lambda m, z, i: inter_image_loss(z, i, m, 6, 12, temperature=0.0), "temperature"),
        (lambda m, z, i: inter_image_loss(z, i, m, 6, 12, sampling="easy"), "sampling"),
        (lambda m, z, i: InterCLR(m, 6, 12, inter_weight=1.1), "inter_weight"),
        (lambda m, z, i: InterCLR(m, 6, 12, margin=3.0), "margin"),
        (lambda m, z, i: InterCLR(m, 6, 60), "pool"),
    ],
)
def test_bad_input_is_refused_by_name_and_changes_nothing(
    call: Callable[[ClusterMemory, Tensor, Tensor], object], name: str
) -> None:
    held = memory()
    before = {key: value.clone() for key, value in held.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name} must"):
        call(held, draws(5, 4), torch.arange(5))
    assert all(torch.equal(value, before[key]) for key, value in held.state_dict().items())


def test_types_are_refused() -> None:
    held = memory()
    with pytest.raises(TypeError, match="index must"):
        held.write(torch.arange(5).float(), draws(5, 4))
    with pytest.raises(TypeError, match="z must"):
        held.write(torch.arange(5), draws(5, 4).long())
