"""Mutual nearest neighbours against a loop, padding that never matches, the triplet loss, and re-ranking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.metric import (
    discriminative_patches,
    local_triplet_loss,
    mutual_nearest_neighbors,
    mutual_nn_score,
    mutual_nn_similarity,
    rerank,
)


def patches(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matches_by_loop(a: Tensor, b: Tensor) -> list[tuple[int, int, float]]:
    """All mutual nearest neighbours of rows that are not zero, with their cosines."""
    cosine = {
        (i, j): (a[i] @ b[j] / (a[i].norm() * b[j].norm())).item()
        for i in range(len(a))
        for j in range(len(b))
        if a[i].any() and b[j].any()
    }
    return [
        (i, j, value)
        for (i, j), value in cosine.items()
        if value == max(v for (k, _), v in cosine.items() if k == i)
        and value == max(v for (_, k), v in cosine.items() if k == j)
    ]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 9), m=st.integers(1, 9), padding=st.integers(0, 4))
def test_equals_a_loop(seed, n, m, padding):
    a, b = patches(seed, n, 3), patches(seed + 1, m, 3)
    b = torch.cat([b, torch.zeros(padding, 3, dtype=b.dtype)])
    expected = matches_by_loop(a, b)
    found = mutual_nearest_neighbors(a, b)
    assert [(i, int(found.index[i])) for i in found.mutual.nonzero().flatten().tolist()] == [p[:2] for p in expected]
    for i, _, cosine in expected:
        assert found.similarity[i].item() == pytest.approx(cosine)
    assert mutual_nn_score(a, b, 0.5).item() == sum(cosine > 0.5 for *_, cosine in expected)


def test_one_query_meets_all_candidates_at_once():
    query, candidates = patches(0, 5, 4), patches(1, 7, 6, 4)
    together = mutual_nn_score(query, candidates, 0.3)
    assert together.tolist() == [mutual_nn_score(query, candidate, 0.3).item() for candidate in candidates]
    assert together.tolist() == mutual_nn_score(candidates, query, 0.3).tolist()  # symmetric
    similarity = mutual_nn_similarity(query, candidates)
    torch.testing.assert_close(similarity, mutual_nn_similarity(candidates, query))


def test_an_image_matches_itself_as_often_as_it_has_distinct_patches():
    distinct = torch.nn.functional.one_hot(torch.tensor([3, 0, 3, 1, 0, 5])).double()
    assert mutual_nn_score(distinct, distinct).item() == 4
    assert mutual_nn_score(distinct, 7 * distinct).item() == 4


def test_padding_never_matches():
    a, b = patches(2, 6, 4), patches(3, 5, 4)
    score, similarity = mutual_nn_score(a, b, 0.0), mutual_nn_similarity(a, b)
    longer_a, longer_b = (torch.cat([torch.zeros(3, 4, dtype=x.dtype), x]) for x in (a, b))
    assert mutual_nn_score(longer_a, longer_b, -1.0) == mutual_nn_score(a, b, -1.0)
    assert mutual_nn_score(longer_a, longer_b, 0.0) == score
    torch.testing.assert_close(mutual_nn_similarity(longer_a, longer_b), similarity)
    # Not even where all cosines are negative, so that zero would be the largest.
    assert mutual_nearest_neighbors(longer_a, -longer_a.abs()).mutual[:3].sum() == 0
    nothing = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    value = mutual_nn_similarity(nothing, b)
    value.backward()
    assert value.item() == 0
    assert nothing.grad.isfinite().all()


def test_similarity_is_the_mean_above_the_threshold_or_of_all_mutual_ones():
    angle = torch.tensor([0.0, 90.0]).deg2rad()
    a = torch.stack([angle.cos(), angle.sin()], 1)
    turned = torch.tensor([10.0, 50.0]).deg2rad()
    b = torch.stack([turned.cos(), turned.sin()], 1)
    ten, forty = math.cos(math.radians(10)), math.cos(math.radians(40))
    assert mutual_nn_similarity(a, b, 0.9).item() == pytest.approx(ten)
    assert mutual_nn_similarity(a, b, 0.7).item() == pytest.approx((ten + forty) / 2)
    assert mutual_nn_similarity(a, b, 0.999).item() == pytest.approx((ten + forty) / 2)


def test_similarity_has_a_gradient_that_draws_matches_together():
    a, b = patches(4, 4, 3).requires_grad_(), patches(5, 5, 3)
    (gradient,) = torch.autograd.grad(mutual_nn_similarity(a, b), a)
    assert mutual_nn_similarity(a + 0.01 * gradient, b) > mutual_nn_similarity(a, b)
    assert torch.autograd.gradcheck(lambda x: mutual_nn_similarity(x, b), a)


class TestTriplets:
    def test_equals_a_loop_over_the_hardest_triplets(self):
        local, descriptors = patches(6, 8, 5, 3), patches(7, 8, 4)
        labels = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3])  # the last image is alone
        unit = descriptors / descriptors.norm(dim=1, keepdim=True)
        values = []
        for i in range(7):
            others = [j for j in range(8) if j != i]
            positive = min((j for j in others if labels[j] == labels[i]), key=lambda j: unit[i] @ unit[j])
            negative = max((j for j in others if labels[j] != labels[i]), key=lambda j: unit[i] @ unit[j])
            close, far = (mutual_nn_similarity(local[i], local[j]) for j in (positive, negative))
            values.append(max(0.0, 0.02 + far.item() - close.item()))
        found = local_triplet_loss(local, descriptors, labels, margin=0.02)
        assert found.item() == pytest.approx(sum(values) / 7)
        assert 0 < sum(value > 0 for value in values) < 7

    def test_descriptors_get_no_gradient_and_local_features_do(self):
        local, descriptors = patches(8, 6, 5, 3).requires_grad_(), patches(9, 6, 4).requires_grad_()
        local_triplet_loss(local, descriptors, torch.arange(6) // 2, margin=0.5).backward()
        assert descriptors.grad is None
        assert local.grad.abs().sum() > 0

    @pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
    def test_without_triplets_it_is_zero(self, labels):
        local = patches(10, 3, 4, 3).requires_grad_()
        value = local_triplet_loss(local, patches(11, 3, 2), torch.tensor(labels), margin=1.0)
        value.backward()
        assert value.item() == 0
        assert local.grad.isfinite().all()


class TestDiscriminativePatches:
    @pytest.mark.parametrize(("keep", "number"), [(0.4, 2), (0.01, 1), (1.0, 6), (3, 3)])
    def test_keeps_those_of_the_largest_weights(self, keep, number):
        local, weights = patches(12, 2, 6, 3), patches(13, 2, 6)
        kept = discriminative_patches(local, weights, keep)
        for image in range(2):
            order = weights[image].argsort(descending=True)[:number]
            torch.testing.assert_close(kept[image], local[image, order])

    def test_scores_fall_to_those_of_the_kept(self):
        image = torch.eye(8)[None]
        kept = discriminative_patches(image, torch.arange(8.0)[None], 0.5)
        assert mutual_nn_score(kept, kept).item() == 4

    def test_two_fifths_of_the_patches_have_less_than_half_of_the_products(self):
        kept = discriminative_patches(patches(14, 2, 529, 4), patches(15, 2, 529), 0.4)
        assert kept.shape[1] ** 2 / 529**2 == pytest.approx(0.16, abs=0.001)


class TestRerank:
    def database(self) -> Tensor:
        """Images that share 0, 3, 1, 3 and 2 patches with the query, which is the identity of size 4."""
        basis = torch.eye(12)
        return torch.stack(
            [torch.cat([basis[:n], basis[4 + n : 8]]) for n in (0, 3, 1, 3, 2)],
        )

    def test_orders_by_matches_and_keeps_equals_in_order(self):
        query = torch.eye(12)[:4]
        assert mutual_nn_score(query, self.database()).tolist() == [0, 3, 1, 3, 2]
        assert rerank(query, self.database(), torch.tensor([0, 1, 2, 3, 4])).tolist() == [1, 3, 4, 2, 0]
        assert rerank(query, self.database(), torch.tensor([4, 3, 2, 1, 0])).tolist() == [3, 1, 4, 2, 0]

    def test_what_follows_the_top_stays(self):
        query = torch.eye(12)[:4]
        assert rerank(query, self.database(), torch.tensor([0, 2, 4, 1, 3]), top=3).tolist() == [4, 2, 0, 1, 3]

    def test_no_match_changes_nothing(self):
        order = torch.tensor([3, 0, 4, 1, 2])
        assert rerank(torch.eye(12)[8:], self.database(), order).tolist() == order.tolist()


@pytest.mark.parametrize(
    ("name", "error", "call"),
    [
        ("a", TypeError, lambda: mutual_nn_score(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3))),
        ("b", ValueError, lambda: mutual_nn_score(torch.ones(2, 3), torch.ones(3))),
        ("b", ValueError, lambda: mutual_nn_score(torch.ones(2, 3), torch.ones(2, 4))),
        ("margin", ValueError, lambda: local_triplet_loss(torch.ones(2, 3, 4), torch.ones(2, 4), torch.arange(2), -1)),
        ("local", ValueError, lambda: local_triplet_loss(torch.ones(3, 3, 4), torch.ones(2, 4), torch.arange(2))),
        ("labels", ValueError, lambda: local_triplet_loss(torch.ones(2, 3, 4), torch.ones(2, 4), torch.arange(3))),
        ("weights", ValueError, lambda: discriminative_patches(torch.ones(2, 3, 4), torch.ones(2, 4))),
        ("keep", ValueError, lambda: discriminative_patches(torch.ones(2, 3, 4), torch.ones(2, 3), 1.5)),
        ("keep", ValueError, lambda: discriminative_patches(torch.ones(2, 3, 4), torch.ones(2, 3), 4)),
        ("top", ValueError, lambda: rerank(torch.ones(2, 3), torch.ones(4, 2, 3), torch.arange(4), top=0)),
        ("order", ValueError, lambda: rerank(torch.ones(2, 3), torch.ones(4, 2, 3), torch.ones(2, 2))),
    ],
)
def test_bad_arguments_are_named(name, error, call):
    with pytest.raises(error, match=name):
        call()


def test_an_order_that_is_a_mask_is_refused() -> None:
    with pytest.raises(TypeError, match="order must be integers, got torch.bool"):
        rerank(torch.eye(3), torch.stack([torch.eye(3)] * 3), torch.tensor([True, False, True]))


def test_a_match_must_exceed_the_threshold() -> None:
    assert mutual_nn_score(torch.eye(3), torch.eye(3), threshold=1.0) == 0
    assert mutual_nn_score(torch.eye(3), torch.eye(3), threshold=0.999) == 3
