from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from torch import Tensor

from trimtab.ops.cluster_scores import cluster_accuracy
from trimtab.ops.partial_transport import partial_sinkhorn
from trimtab.semisup import (
    SP2OT,
    SP2OTClustering,
    knn_gaussian_affinity,
    partial_cross_entropy,
    progressive_mass,
    sp2ot,
)
from trimtab.semisup.sp2ot.rule import CosineHead

N, K = 20, 3


def problem(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(N, 4, generator=generator, dtype=torch.float64)
    cost = -torch.randn(N, K, generator=generator, dtype=torch.float64).log_softmax(1)
    return cost, features


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_without_similarities_it_is_partial_transport(rho: float) -> None:
    cost, features = problem()
    plain = torch.as_tensor(partial_sinkhorn(cost, rho, tol=1e-10).plan)
    for similarity, lam in ((None, 10.0), (knn_gaussian_affinity(features, 3), 0.0)):
        torch.testing.assert_close(sp2ot(cost, similarity, rho, lam=lam, tol=1e-10).plan, plain)


@pytest.mark.parametrize("kind", ["semidefinite", "neighbours", "asymmetric"])
def test_the_objective_never_rises(kind: str) -> None:
    cost, features = problem(1)
    distances = torch.cdist(features, features)
    similarity = {
        "semidefinite": (-distances.square()).exp(),
        "neighbours": knn_gaussian_affinity(features, 4).to_dense(),
        "asymmetric": torch.rand(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    }[kind]
    for lam in (1.0, 30.0):
        found = sp2ot(cost, similarity, 0.5, lam=lam, tol=1e-7)
        assert (np.diff(found.objectives) <= 0).all()
        assert float(found.plan.sum()) == pytest.approx(0.5, abs=1e-6)
        assert (found.plan.sum(1) <= 1 / N + 1e-9).all()


def test_the_objective_is_the_formula_and_no_feasible_change_lowers_it() -> None:
    cost, features = problem(2)
    similarity, rho, lam, gamma, epsilon = knn_gaussian_affinity(features, 4).to_dense(), 0.6, 2.0, 0.7, 0.2

    def objective(q: Tensor) -> Tensor:
        size, kept = q.sum(0), 1 / N - q.sum(1)
        value = (q * cost).sum() - lam * (similarity * (q @ q.T)).sum()
        value = value + gamma * (size * (size / (rho / K)).log()).sum()
        return value + epsilon * ((q * q.log()).sum() + (kept * kept.log()).sum())

    found = sp2ot(cost, similarity, rho, lam=lam, gamma=gamma, epsilon=epsilon, tol=1e-12, max_iter=500)
    best = objective(found.plan)
    assert found.objectives[-1] == pytest.approx(float(best), abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        change = torch.randn(N, K, generator=generator, dtype=torch.float64) * found.plan
        change -= found.plan * change.sum() / rho
        assert objective(found.plan + 1e-3 * change) >= best - 1e-10


def test_a_neighbourhood_pulls_its_undecided_members() -> None:
    cost = torch.tensor([[0.1, 3.0], [0.1, 3.0], [1.0, 0.9], [3.0, 0.1], [3.0, 0.1]], dtype=torch.float64)
    friends = torch.zeros(5, 5, dtype=torch.float64)
    friends[2, :2] = 1
    alone, together = (sp2ot(cost, friends, 1.0, lam=lam, epsilon=0.05).plan for lam in (0.0, 5.0))
    assert alone[2].argmax() == 1
    assert together[2].argmax() == 0


def test_sparse_is_dense_and_order_does_not_matter() -> None:
    cost, features = problem(3)
    sparse = knn_gaussian_affinity(features, 5)
    found = sp2ot(cost, sparse, 0.5, lam=2.0, tol=1e-8).plan
    torch.testing.assert_close(sp2ot(cost, sparse.to_dense(), 0.5, lam=2.0, tol=1e-8).plan, found)
    torch.testing.assert_close(sp2ot(cost, sparse.to_dense().T, 0.5, lam=2.0, tol=1e-8).plan, found)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    moved = sp2ot(cost[order], sparse.to_dense()[order][:, order], 0.5, lam=2.0, tol=1e-8).plan
    torch.testing.assert_close(moved, found[order], rtol=1e-4, atol=1e-7)


def test_affinity_of_neighbours() -> None:
    _, features = problem(4)
    found = knn_gaussian_affinity(features, 3, sigma=2.0).to_dense()
    assert (found.diagonal() == 0).all()
    assert ((found > 0).sum(1) == 3).all()
    distances = torch.cdist(features, features)
    expected = (-distances.square() / (2 * 4 * 4)).exp()
    torch.testing.assert_close(found[found > 0], expected[found > 0])
    others = distances + torch.diag(torch.full((N,), math.inf, dtype=torch.float64))
    assert (expected[found > 0].view(N, 3).min(1).values >= (-others.kthvalue(4).values.square() / 32).exp()).all()


def test_affinity_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.semisup import neighbors

    _, features = problem(4)
    whole = knn_gaussian_affinity(features, 3).to_dense()
    monkeypatch.setattr(neighbors, "_BLOCK", 4 * N)
    torch.testing.assert_close(knn_gaussian_affinity(features, 3).to_dense(), whole)


def test_mass_grows_to_one() -> None:
    masses = [progressive_mass(t, 20, 0.2) for t in range(25)]
    assert masses == sorted(masses)
    assert masses[20:] == [1.0] * 5
    assert masses[0] == pytest.approx(0.2 + 0.8 * math.exp(-5))
    assert progressive_mass(3, 20, 1.0) == 1.0


def test_partial_cross_entropy_weighs_rows_and_holds_targets_constant() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 2]].requires_grad_()
    whole = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(partial_cross_entropy(logits, targets), whole)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    partial_cross_entropy(logits, targets * weights[:, None]).backward()
    assert targets.grad is None
    expected = weights[:, None] * (logits.softmax(1) - targets).detach() / 4
    torch.testing.assert_close(logits.grad, expected)
    assert partial_cross_entropy(logits.bfloat16(), targets).dtype == torch.float32


def views(seed: int, batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, size, generator=generator) for size in (K, K, 4))  # type: ignore[return-value]


def test_the_rule_swaps_the_plans_of_the_views() -> None:
    rule = SP2OT(K, 4, 10, bank_size=8, neighbors=3, lam=10.0).eval()
    first, second, features = views(0)
    found = rule.loss(first.requires_grad_(), second.requires_grad_(), features)
    rho = progressive_mass(0, 10)
    similarity = knn_gaussian_affinity(torch.nn.functional.normalize(features, dim=1), 3)
    plans = [
        6 * sp2ot(-logits.detach().double().log_softmax(1), similarity, rho, lam=10 * (1 - rho)).plan
        for logits in (first, second)
    ]
    expected = (partial_cross_entropy(second, plans[0]) + partial_cross_entropy(first, plans[1])) / 2
    torch.testing.assert_close(found["total"], expected, rtol=1e-3, atol=1e-5)
    found["total"].backward()
    assert first.grad is not None
    assert float(first.grad.abs().sum()) > 0


def test_the_memory_takes_part_and_is_read_only_in_evaluation() -> None:
    rule = SP2OT(K, 4, 10, bank_size=8, neighbors=3)
    batch = views(0)
    before = rule.loss(*batch)["total"]
    assert len(rule.bank) == 6
    after = rule.eval().loss(*batch)["total"]
    assert len(rule.bank) == 6
    assert not torch.equal(before, after)
    rule.train()
    rule.update()
    assert float(rule.loss(*batch)["mass"]) == pytest.approx(progressive_mass(1, 10))
    assert len(rule.bank) == 8


def test_at_the_end_everyone_takes_part() -> None:
    rule = SP2OT(K, 4, 3, bank_size=8, gamma=math.inf)
    for _ in range(5):
        rule.update()
    found = rule.loss(*views(1))
    assert float(found["mass"]) == 1.0
    assert found["total"].isfinite()


@pytest.mark.parametrize("bad", ["first", "second", "features"])
def test_the_rule_refuses_before_it_remembers(bad: str) -> None:
    rule = SP2OT(K, 4, 10, bank_size=8)
    rule.loss(*views(0))
    kept = {name: value.clone() for name, value in rule.state_dict().items()}
    names = dict(zip(("first", "second", "features"), views(1), strict=True))
    for spoilt in (names[bad][:-1] if bad != "features" else names[bad][:, :2], names[bad] * math.nan):
        with pytest.raises(ValueError, match=bad if bad != "features" else "features|first"):
            rule.loss(**{**names, bad: spoilt})
    with pytest.raises(TypeError, match=bad):
        rule.loss(**{**names, bad: names[bad].long()})
    with pytest.raises(ValueError, match="shape"):
        rule.loss(*(value[:0] for value in views(1)))
    assert all(torch.equal(value, rule.state_dict()[name]) for name, value in kept.items())


def test_a_head_of_cosines_does_not_see_lengths() -> None:
    head = CosineHead(5, 3)
    x = torch.randn(4, 5)
    torch.testing.assert_close(head(x), head(100 * x))
    assert head(x).abs().max() <= 10 + 1e-4


def imbalanced(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return make_blobs([150, 40, 20], 5, centers=None, cluster_std=1.0, random_state=seed)


def test_unequal_blobs_are_found_and_equal_plans_split_the_large_one() -> None:
    X, y = imbalanced()
    found = SP2OTClustering(3, epochs=10, random_state=0).fit(X)
    assert cluster_accuracy(y, found.labels_) > 0.95
    forced = SP2OTClustering(3, epochs=10, initial_mass=1.0, gamma=math.inf, semantic=0.0, random_state=0).fit(X)
    np.testing.assert_allclose(forced.plan_.sum(0), len(X) / 3, rtol=0.05)
    assert cluster_accuracy(y, forced.labels_) < cluster_accuracy(y, found.labels_)


def test_units_and_origin_do_not_matter() -> None:
    X, _ = imbalanced(1)
    first = SP2OTClustering(3, epochs=5, random_state=0).fit_predict(X)
    for moved in (X * 1e4, X * 1e-4 + 7):
        assert (SP2OTClustering(3, epochs=5, random_state=0).fit_predict(moved) == first).mean() > 0.98


def test_an_augmentation_takes_the_place_of_noise() -> None:
    X, _ = imbalanced(2)
    seen = []

    def shout(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(x))
        return x

    SP2OTClustering(3, epochs=2, warmup=1, augment=shout, random_state=0).fit(X)
    assert sum(seen) == 3 * len(X)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda c, s: sp2ot(c, s[:2], 0.5), "similarity"),
        (lambda c, s: sp2ot(c, -s, 0.5), "similarity"),
        (lambda c, s: sp2ot(c, s * math.nan, 0.5), "similarity"),
        (lambda c, s: sp2ot(c * math.inf, s, 0.5), "cost"),
        (lambda c, s: sp2ot(c, s, 0.0), "rho"),
        (lambda c, s: sp2ot(c, s, 0.5, lam=-1.0), "lam"),
        (lambda c, s: sp2ot(c, s, 0.5, epsilon=0.0), "epsilon"),
        (lambda c, s: sp2ot(c, s, 0.5, max_iter=0), "max_iter"),
        (lambda c, s: knn_gaussian_affinity(c, N), "k"),
        (lambda c, s: knn_gaussian_affinity(c, 2, sigma=0.0), "sigma"),
        (lambda c, s: progressive_mass(-1, 2), "step"),
        (lambda c, s: progressive_mass(1, 0), "total"),
        (lambda c, s: progressive_mass(1, 2, 0.0), "initial"),
        (lambda c, s: partial_cross_entropy(c, c[:, :2]), "targets"),
        (lambda c, s: partial_cross_entropy(c[:0], c[:0]), "logits"),
        (lambda c, s: SP2OT(1, 4, 10), "num_clusters"),
        (lambda c, s: SP2OT(3, 4, 10, gamma=0.0), "gamma"),
        (lambda c, s: SP2OT(3, 4, 10, initial_mass=2.0), "initial_mass"),
        (lambda c, s: SP2OTClustering(3, gamma=-1.0).fit(c), "gamma"),
        (lambda c, s: SP2OTClustering(3, lr=0.0).fit(c), "lr"),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, name: str) -> None:
    cost, features = problem()
    with pytest.raises(ValueError, match=name):
        call(cost, knn_gaussian_affinity(features, 3).to_dense())
