"""Class moments whose merging is exact, draws from them, and the features that reach a head."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.federated import ClassMoments, gaussian_factors, sample_virtual
from trimtab.federated.heads import features_of, features_seen, head_of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(n: int = 60, dim: int = 4, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(n, dim, generator=seeded(), dtype=torch.float64)
    z = z @ torch.randn(dim, dim, generator=seeded(1), dtype=torch.float64) + 5
    return z, torch.randint(classes, (n,), generator=seeded(2))


def assert_alike(a: ClassMoments, b: ClassMoments) -> None:
    assert torch.equal(a.counts, b.counts)
    torch.testing.assert_close(a.means, b.means, rtol=0, atol=1e-10)
    torch.testing.assert_close(a.scatters, b.scatters, rtol=0, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), min_size=0, max_size=4))
def test_any_split_merges_to_numpys_covariance(cuts: list[int]) -> None:
    z, y = table()
    edges = [0, *sorted(cuts), 60]
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
    merged = ClassMoments.merge([ClassMoments.from_features(z[p], y[p], 3) for p in pieces])
    for label in range(3):
        rows = z[y == label].numpy()
        np.testing.assert_allclose(merged.means[label], rows.mean(0), atol=1e-10)
        np.testing.assert_allclose(merged.covariances()[label], np.cov(rows, rowvar=False), atol=1e-10)
        np.testing.assert_allclose(
            merged.covariances(unbiased=False)[label], np.cov(rows, rowvar=False, bias=True), atol=1e-10
        )


def test_merging_does_not_depend_on_order_or_grouping_and_one_client_is_the_identity() -> None:
    z, y = table()
    a, b, c = (ClassMoments.from_features(z[i::3], y[i::3], 3) for i in range(3))
    assert_alike(ClassMoments.merge([a, b, c]), ClassMoments.merge([c, a, b]))
    assert_alike(ClassMoments.merge([ClassMoments.merge([a, b]), c]), ClassMoments.merge([a, b, c]))
    assert_alike(ClassMoments.merge([a]), a)


def test_the_papers_formula_with_unbiased_client_covariances() -> None:
    z, y = table()
    parts = [ClassMoments.from_features(z[i::2], y[i::2], 3) for i in range(2)]
    n, mu, cov = (torch.stack([getattr(p, name) for p in parts]) for name in ("counts", "means", "scatters"))
    total = n.sum(0)[:, None, None].double()
    mean = (n[..., None] * mu).sum(0) / n.sum(0)[:, None]
    outer = (n[..., None, None] * mu[..., :, None] * mu[..., None, :]).sum(0)
    wanted = (cov.sum(0) + outer) / (total - 1) - total / (total - 1) * mean[:, :, None] * mean[:, None, :]
    torch.testing.assert_close(ClassMoments.merge(parts).covariances(), wanted, rtol=0, atol=1e-9)


def test_float32_far_from_the_origin() -> None:
    z, y = table()
    far = ClassMoments.from_features((z + 1000).float(), y, 3).covariances()
    torch.testing.assert_close(far.double(), ClassMoments.from_features(z, y, 3).covariances(), rtol=1e-2, atol=1e-2)


def test_single_samples_and_absent_classes_have_no_covariance() -> None:
    moments = ClassMoments.from_features(torch.tensor([[1.0, 2.0]]), torch.tensor([1]), 3)
    assert moments.counts.tolist() == [0, 1, 0]
    assert not moments.covariances().any()
    assert moments.means[1].tolist() == [1.0, 2.0]
    assert not ClassMoments.from_features(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 3).means.any()


def test_half_precision_is_raised() -> None:
    z, y = table()
    assert ClassMoments.from_features(z.bfloat16(), y, 3).means.dtype == torch.float32


def test_bad_input_is_named() -> None:
    z, y = table()
    with pytest.raises(ValueError, match="targets must be in"):
        ClassMoments.from_features(z, y, 2)
    with pytest.raises(ValueError, match="targets must be 60 labels"):
        ClassMoments.from_features(z, y[:-1], 3)
    with pytest.raises(ValueError, match="features must be finite"):
        ClassMoments.from_features(z / 0, y, 3)
    with pytest.raises(ValueError, match="parts must be at least one"):
        ClassMoments.merge([])
    with pytest.raises(ValueError, match="parts must have the same"):
        ClassMoments.merge([ClassMoments.from_features(z, y, 3), ClassMoments.from_features(z, y, 4)])
    with pytest.raises(ValueError, match="sent must hold counts"):
        ClassMoments.from_tensors({})


def test_tensors_round_trip() -> None:
    moments = ClassMoments.from_features(*table(), 3)
    assert_alike(ClassMoments.from_tensors(moments.tensors("x."), "x."), moments)


class TestDraws:
    def test_factors(self) -> None:
        a = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
        singular = a @ a.T
        factor = gaussian_factors(singular - 1e-12 * torch.eye(5))
        torch.testing.assert_close(factor @ factor.T, singular, rtol=0, atol=1e-10)
        assert (torch.linalg.matrix_rank(factor, atol=1e-4)) == 2

    def test_noise_of_ones_column_by_hand(self) -> None:
        moments = ClassMoments(
            torch.tensor([3, 0]), torch.zeros(2, 2), torch.diag_embed(torch.tensor([[8.0, 2], [0, 0]]))
        )
        drawn, y = sample_virtual(moments, 1, noise=torch.ones(1, 1, 2))
        assert y.tolist() == [0]
        torch.testing.assert_close(drawn.abs(), torch.tensor([[2.0, 1.0]]))  # unbiased: S / 2

    def test_converge_to_mean_and_covariance(self) -> None:
        moments = ClassMoments.from_features(*table(), 3)
        drawn, y = sample_virtual(moments, 30_000, generator=seeded(3))
        assert torch.equal(torch.bincount(y), torch.full((3,), 30_000))
        again = ClassMoments.from_features(drawn, y, 3)
        scale = moments.covariances().diagonal(dim1=1, dim2=2).sqrt()
        assert ((again.means - moments.means).abs() / scale).max() < 0.03
        gap = (again.covariances() - moments.covariances()).abs() / (scale[:, :, None] * scale[:, None, :])
        assert gap.max() < 0.04

    def test_absent_classes_are_skipped_and_bad_input_is_named(self) -> None:
        moments = ClassMoments.from_features(torch.randn(4, 2, generator=seeded()), torch.tensor([0, 0, 2, 2]), 4)
        assert sample_virtual(moments, 3, generator=seeded())[1].tolist() == [0, 0, 0, 2, 2, 2]
        with pytest.raises(ValueError, match="per_class"):
            sample_virtual(moments, 0)
        with pytest.raises(ValueError, match="noise must have shape"):
            sample_virtual(moments, 3, noise=torch.zeros(4, 3, 2))


class TestHeads:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 2))

    def test_features_are_what_the_head_sees(self) -> None:
        x = torch.randn(7, 3, generator=seeded())
        self.model.train()
        found = features_of(self.model, x, "3", batch_size=3)
        torch.testing.assert_close(found, self.model[:2](x).detach())
        assert self.model.training
        assert not self.model[3]._forward_pre_hooks

    def test_a_detached_head_trains_nothing_before_it(self) -> None:
        self.model.zero_grad()
        with features_seen(head_of(self.model, "3"), detach=True) as seen:
            self.model(torch.randn(4, 3, generator=seeded())).sum().backward()
        assert self.model[0].weight.grad is None
        assert self.model[3].weight.grad is not None
        assert seen[0].requires_grad

    def test_bad_names(self) -> None:
        with pytest.raises(ValueError, match="head must be the name"):
            head_of(self.model, "head")
        with pytest.raises(TypeError, match="head must name a linear layer, got ReLU"):
            head_of(self.model, "1")
