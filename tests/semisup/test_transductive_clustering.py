from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from trimtab.semisup import (
    TransductiveClusterer,
    center_normalize,
    laplacian_bound_update,
    laplacian_shot,
    nearest_others,
    neighbor_graph,
    rectify_prototypes,
    shift_queries,
    slk,
)

N, K = 24, 3


def points(seed: int = 0, n: int = N) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graph(x: Tensor, k: int = 3) -> Tensor:
    distances, which = nearest_others(x, k)
    return neighbor_graph(torch.ones_like(distances), which)


def unary(seed: int = 0) -> Tensor:
    return torch.rand(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_without_neighbours_it_is_a_softmax() -> None:
    a = unary()
    found = laplacian_bound_update(a, graph(points()), 0.0)
    torch.testing.assert_close(found.assignments, (-a).softmax(1))
    assert found.converged


def test_one_iteration_is_the_formula_from_the_old_assignments() -> None:
    a, w = unary(), graph(points()).to_dense()
    start = (-a).softmax(1)
    found = laplacian_bound_update(a, w, 0.7, max_iter=1)
    torch.testing.assert_close(found.assignments, (-a + 0.7 * w @ start).softmax(1))
    energy = (start * a).sum() - 0.35 * (start * (w @ start)).sum() + (start * start.log()).sum()
    assert found.energies[0] == pytest.approx(float(energy))
    assert not found.converged


@pytest.mark.parametrize("seed", range(10))
def test_the_energy_never_rises_for_a_semidefinite_graph(seed: int) -> None:
    w = graph(points(seed)).to_dense()
    w = (w + w.T) / 2
    w = w - torch.linalg.eigvalsh(w)[0] * torch.eye(N, dtype=w.dtype)
    found = laplacian_bound_update(unary(seed), w, 1.5, tol=0.0, max_iter=50)
    assert (np.diff(found.energies) <= 1e-12).all()


@pytest.mark.parametrize("seed", range(10))
def test_the_two_step_functional_never_rises_for_any_symmetric_graph(seed: int) -> None:
    w, a, lam = graph(points(seed)).to_dense(), unary(seed), 2.0
    w = (w + w.T) / 2
    ys = [laplacian_bound_update(a, w, lam, max_iter=t).assignments for t in range(1, 15)]

    def half(y: Tensor) -> Tensor:
        return ((y * a).sum() + (y * y.log()).sum()) / 2

    values = [float(half(new) + half(old) - lam / 2 * (new * (w @ old)).sum()) for old, new in itertools.pairwise(ys)]
    assert (np.diff(values) <= 1e-12).all()


def test_known_samples_are_held_or_let_go() -> None:
    a, w = unary(1), graph(points(1))
    known = torch.full((N,), -1)
    known[:3] = torch.tensor([0, 1, 2])
    always = laplacian_bound_update(a, w, 1.0, known=known).assignments
    assert torch.equal(always[:3], torch.eye(3, dtype=torch.float64))
    start = (-a).softmax(1)
    start[:3] = torch.eye(3, dtype=torch.float64)
    first = laplacian_bound_update(a, w, 1.0, known=known, clamp="init", max_iter=1).assignments
    torch.testing.assert_close(first, (w @ start - a).softmax(1))


def test_sparse_is_dense_and_order_does_not_matter() -> None:
    x, centers = points(2), points(2)[:K]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    a, w = unary(2), graph(x)
    found = laplacian_bound_update(a, w, 1.0).assignments
    torch.testing.assert_close(laplacian_bound_update(a, w.to_dense(), 1.0).assignments, found)
    moved = laplacian_bound_update(a[order], w.to_dense()[order][:, order], 1.0).assignments
    torch.testing.assert_close(moved, found[order])
    for kind in ("means", "modes", "medoids"):
        labels = slk(x, centers, kind=kind).labels
        assert torch.equal(slk(x[order], centers, kind=kind).labels, labels[order])


def test_without_neighbours_it_is_k_means() -> None:
    x, start = points(3, 60), points(3, 60)[:K]
    found = slk(x, start, lam=0.0)
    theirs = KMeans(K, init=start.numpy(), n_init=1, tol=0, algorithm="lloyd").fit(x.numpy())
    again = slk(x, torch.from_numpy(theirs.cluster_centers_), lam=0.0)
    np.testing.assert_allclose(again.centers, theirs.cluster_centers_, atol=1e-6)
    assert float((found.centers - torch.from_numpy(theirs.cluster_centers_)).norm()) < 0.5
    one = slk(x, start, lam=0.0, max_iter=1)
    nearest = torch.cdist(x, start).argmin(1)
    expected = torch.stack([x[nearest == k].mean(0) for k in range(K)])
    torch.testing.assert_close(one.centers, expected)


def test_modes_are_fixed_points_within_their_members() -> None:
    x, sigma = points(4, 60), 0.8
    found = slk(x, x[:K], lam=0.0, kind="modes", sigma=sigma, max_iter=1)
    start = torch.cdist(x, x[:K]).argmin(1)
    for k, center in enumerate(found.centers):
        members = x[start == k]
        weights = (-(members - center).square().sum(1) / (2 * sigma**2)).exp()
        torch.testing.assert_close((weights[:, None] * members).sum(0) / weights.sum(), center, rtol=1e-4, atol=1e-4)
        assert (center >= members.min(0).values - 1e-9).all()
        assert (center <= members.max(0).values + 1e-9).all()


def test_medoids_are_samples_of_their_class() -> None:
    x = points(5)
    found = slk(x, x[:K], kind="medoids", lam=0.3)
    assert all((x == center).all(1).any() for center in found.centers)


def test_the_width_of_the_kernel_is_the_authors() -> None:
    x = points(6)
    distances, _ = nearest_others(x, 2)
    sigma = float((distances.square().sum() / (5 * N)).sqrt())
    torch.testing.assert_close(slk(x, x[:K], kind="modes").centers, slk(x, x[:K], kind="modes", sigma=sigma).centers)


def test_a_class_that_would_lose_all_takes_the_round_back() -> None:
    x = torch.tensor([[0.0], [0.1], [0.2], [1.0]])
    found = slk(x, torch.tensor([[0.1], [1.0]]), lam=50.0, n_neighbors=4)
    assert found.converged
    assert found.labels.tolist() == [0, 0, 0, 1]


def episode(shots: int = 1, queries: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(K, 4, generator=generator, dtype=torch.float64)
    y, target = (torch.arange(K).repeat_interleave(count) for count in (shots, queries))
    draw = lambda of: centers[of] + torch.randn(len(of), 4, generator=generator, dtype=torch.float64)
    return draw(y), y, draw(target), target


def test_switched_off_it_is_the_nearest_prototype() -> None:
    support, y, query, _ = episode(3)
    prototypes = torch.stack([support[y == k].mean(0) for k in range(K)])
    nearest = torch.cdist(query, prototypes).argmin(1)
    assert torch.equal(laplacian_shot(support, y, query, K, lam=0.0, rectify=False), nearest)


def test_laplacian_shot_is_one_update_on_the_queries() -> None:
    support, y, query, _ = episode(2)
    prototypes = torch.stack([support[y == k].mean(0) for k in range(K)])
    a = torch.cdist(query, prototypes).square()
    expected = laplacian_bound_update(a, graph(query, 2), 0.8, max_iter=20, tol=1e-6).assignments.argmax(1)
    assert torch.equal(laplacian_shot(support, y, query, K, lam=0.8, rectify=False), expected)


def test_rectified_prototypes_are_weighted_means() -> None:
    support, y, query, _ = episode(2)
    means = torch.stack([support[y == k].mean(0) for k in range(K)])
    weights = (10 * torch.nn.functional.cosine_similarity(query[:, None], means[None], dim=2)).softmax(1)
    expected = torch.stack(
        [
            (support[y == k].sum(0) + (weights[:, [k]] * query).sum(0)) / ((y == k).sum() + weights[:, k].sum())
            for k in range(K)
        ]
    )
    torch.testing.assert_close(rectify_prototypes(support, y, query, K), expected)
    assert torch.allclose(shift_queries(support, query).mean(0), support.mean(0))


def test_clustering_helps_on_average_and_support_keeps_its_labels() -> None:
    right = {"prototype": 0.0, "k-means": 0.0, "slk": 0.0}
    for seed in range(30):
        support, y, query, target = episode(1, 15, seed)
        found = {
            "prototype": laplacian_shot(support, y, query, K, lam=0.0, rectify=False),
            "k-means": TransductiveClusterer(K, lam=0.0, rectify=False).fit_predict(support, y, query),
            "slk": TransductiveClusterer(K, lam=1.0, rectify=False).fit_predict(support, y, query),
        }
        for name, labels in found.items():
            right[name] += float((labels == target).double().mean()) / 30
    assert right["k-means"] > right["prototype"] + 0.02
    assert right["slk"] > right["prototype"] + 0.02


def test_the_origin_does_not_matter_and_both_precisions_agree() -> None:
    support, y, query, _ = episode(2)
    for kind in ("means", "modes"):
        rule = TransductiveClusterer(K, kind=kind)
        found = rule.fit_predict(support, y, query)
        assert torch.equal(rule.fit_predict(support + 100, y, query + 100), found)
        assert torch.equal(rule.fit_predict(support.float(), y, query.float()), found)


def test_modes_are_found_as_exactly_wherever_the_origin_is() -> None:
    x = points(N)
    near, far = (slk(x + shift, x[:K] + shift, kind="modes") for shift in (0.0, 1e4))
    assert torch.equal(near.labels, far.labels)
    # To as many digits as mean shift goes to, 1e-5 of the distance from the middle of the samples.
    torch.testing.assert_close(far.centers - 1e4, near.centers, rtol=0, atol=1e-4)


def test_center_normalize() -> None:
    x = points(7)
    found = center_normalize(x, x.mean(0))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(found * (x - x.mean(0)).norm(dim=1, keepdim=True), x - x.mean(0))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, a, w: laplacian_bound_update(a, w.to_dense()[:2], 1.0), "graph"),
        (lambda x, a, w: laplacian_bound_update(a, w * math.nan, 1.0), "graph"),
        (lambda x, a, w: laplacian_bound_update(a, -w.to_dense(), 1.0), "graph"),
        (lambda x, a, w: laplacian_bound_update(a[:0], w, 1.0), "unary"),
        (lambda x, a, w: laplacian_bound_update(a * math.nan, w, 1.0), "unary"),
        (lambda x, a, w: laplacian_bound_update(a, w, -1.0), "lam"),
        (lambda x, a, w: laplacian_bound_update(a, w, 1.0, known=torch.zeros(3).long()), "known"),
        (lambda x, a, w: laplacian_bound_update(a, w, 1.0, known=torch.full((N,), K)), "known"),
        (lambda x, a, w: laplacian_bound_update(a, w, 1.0, clamp="never"), "clamp"),
        (lambda x, a, w: slk(x, x[:K, :2]), "centers"),
        (lambda x, a, w: slk(x, x[:0]), "centers"),
        (lambda x, a, w: slk(x, x[:K], kind="means!"), "kind"),
        (lambda x, a, w: slk(x, x[:K], n_neighbors=1), "n_neighbors"),
        (lambda x, a, w: slk(x, x[:K], n_neighbors=N + 1), "k must be"),
        (lambda x, a, w: slk(x, x[:K], sigma=0.0), "sigma"),
        (lambda x, a, w: slk(x, x[:K], max_iter=0), "max_iter"),
        (lambda x, a, w: TransductiveClusterer(1), "n_classes"),
        (lambda x, a, w: TransductiveClusterer(2, lam=-1.0), "lam"),
        (lambda x, a, w: TransductiveClusterer(3).fit_predict(x[:2], torch.tensor([0, 1]), x), "every class"),
        (lambda x, a, w: TransductiveClusterer(2).fit_predict(x[:2], torch.tensor([0, 2]), x), "y must be"),
        (lambda x, a, w: TransductiveClusterer(2).fit_predict(x[:2], torch.tensor([0, 1]), x[:, :2]), "query"),
        (lambda x, a, w: TransductiveClusterer(2).fit_predict(x[:2], torch.tensor([0, 1]), x[:0]), "query"),
        (lambda x, a, w: laplacian_shot(x[:2] * math.inf, torch.tensor([0, 1]), x, 2), "support"),
    ],
)
def test_bad_input_is_refused_by_name(call: Any, name: str) -> None:
    x = points()
    with pytest.raises(ValueError, match=name):
        call(x, unary(), graph(x))
