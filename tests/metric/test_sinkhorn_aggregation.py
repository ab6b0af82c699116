"""Sinkhorn aggregation: mass, agreement with the transport solver, and a descriptor of any map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.metric import SinkhornAggregator, class_attention, log_sinkhorn
from trimtab.ops.sinkhorn import sinkhorn


def scores(seed: int, batch: int = 2, clusters: int = 3, patches: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.randn(batch, clusters + 1, patches, generator=generator, dtype=torch.float64)
    return drawn[:, :-1], drawn[:, -1]


class TestPlan:
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 10_000), clusters=st.integers(1, 5), more=st.integers(1, 20), iters=st.integers(1, 4))
    def test_every_patch_has_mass_one(self, seed, clusters, more, iters):
        plan = log_sinkhorn(*scores(seed, 2, clusters, clusters + more), iters).exp()
        torch.testing.assert_close(plan.sum(1), torch.ones_like(plan[:, 0]))
        assert plan.sum().item() == pytest.approx(2 * (clusters + more))

    def test_many_sweeps_reach_the_transport_plan(self):
        score, dustbin = scores(0)
        plan = log_sinkhorn(score, dustbin, 500).exp()
        torch.testing.assert_close(plan.sum(2), torch.tensor([[1.0, 1, 1, 8]] * 2, dtype=torch.float64))
        for image in range(2):
            cost = -torch.cat([score[image], dustbin[image, None]])
            solved = sinkhorn(cost, torch.tensor([1.0, 1, 1, 8]), torch.ones(11), reg=1.0, tol=1e-12)
            torch.testing.assert_close(plan[image], solved.plan)

    def test_three_sweeps_are_sinkhorns(self):
        score, dustbin = scores(1)
        kernel = torch.cat([score, dustbin[:, None]], 1).exp()
        rows = torch.tensor([1.0, 1, 1, 8], dtype=torch.float64)
        v = torch.ones(2, 11, dtype=torch.float64)
        for _ in range(3):
            u = rows / (kernel * v[:, None]).sum(2)
            v = 1 / (kernel * u[:, :, None]).sum(1)
        torch.testing.assert_close(log_sinkhorn(score, dustbin, 3).exp(), u[:, :, None] * kernel * v[:, None])

    def test_large_scores_stay_finite(self):
        score, dustbin = scores(2)
        score = (1000 * score).requires_grad_()
        plan = log_sinkhorn(score, dustbin).exp()
        (gradient,) = torch.autograd.grad(plan.square().sum(), score)
        assert plan.isfinite().all()
        assert gradient.isfinite().all()

    def test_gradients_agree_with_finite_differences(self):
        score, dustbin = (x.requires_grad_() for x in scores(3, 1, 2, 5))
        assert torch.autograd.gradcheck(lambda s, d: log_sinkhorn(s, d).exp(), (score, dustbin))

    def test_a_better_dustbin_takes_mass(self):
        score, dustbin = scores(4)
        better = dustbin.clone()
        better[:, 0] += 3
        before, after = (log_sinkhorn(score, d).exp()[:, -1, 0] for d in (dustbin, better))
        assert (after > before).all()


class TestAggregator:
    def aggregator(self, **options: float) -> SinkhornAggregator:
        torch.manual_seed(0)
        sizes = {"clusters": 4, "cluster_dim": 6, "token_dim": 5, "hidden": 16, "dropout": 0.0}
        return SinkhornAggregator(8, **(sizes | options))

    @pytest.mark.parametrize("size", [(3, 4), (1, 9), (23, 23)])
    def test_any_map_has_a_descriptor_of_length_one(self, size):
        aggregate = self.aggregator()
        found = aggregate(torch.randn(2, 8, *size))
        assert found.descriptor.shape == (2, aggregate.width) == (2, 4 * 6 + 5)
        torch.testing.assert_close(found.descriptor.norm(dim=1), torch.ones(2))
        assert found.assignment.shape == (2, 4, size[0] * size[1])
        torch.testing.assert_close(found.confidence, found.assignment.sum(1) / 4)
        assert found.confidence.max() <= 0.25 + 1e-6

    def test_descriptor_is_the_token_and_each_cluster_at_equal_length(self):
        aggregate, features = self.aggregator(), torch.randn(1, 8, 4, 5)
        found = aggregate(features, token=torch.randn(1, 8))
        parts = [found.descriptor[:, :5], *found.descriptor[:, 5:].view(6, 4).T]  # the token, then clusters
        torch.testing.assert_close(torch.stack([part.norm() for part in parts]), torch.full((5,), 5**-0.5))
        sums = aggregate.features(features).flatten(2)[0] @ found.assignment[0].T  # (dim, clusters)
        for cluster in range(4):
            direction = sums[:, cluster] / sums[:, cluster].norm()
            torch.testing.assert_close(parts[1 + cluster], direction * 5**-0.5)

    def test_order_of_the_patches_does_not_matter(self):
        aggregate, features = self.aggregator(), torch.randn(2, 8, 3, 5)
        importance = torch.rand(2, 15)
        order = torch.randperm(15)
        shuffled = features.flatten(2)[:, :, order].view_as(features)
        torch.testing.assert_close(
            aggregate(features, importance=importance).descriptor,
            aggregate(shuffled, importance=importance[:, order]).descriptor,
        )

    def test_importance_keeps_a_patch_from_the_dustbin(self):
        aggregate, features = self.aggregator(), torch.randn(1, 8, 4, 4)
        importance = torch.zeros(1, 16)
        importance[0, 5] = 3.0
        before, after = (aggregate(features, importance=w).confidence[0] for w in (None, importance))
        assert after[5] > before[5]
        assert (after - before).argmax() == 5

    def test_importance_below_the_threshold_is_none(self):
        aggregate, features = self.aggregator(importance_threshold=0.1), torch.randn(1, 8, 4, 4)
        importance = torch.full((1, 16), 0.09, requires_grad=True)
        found = aggregate(features, importance=importance)
        torch.testing.assert_close(found.descriptor, aggregate(features).descriptor)
        assert torch.autograd.grad(found.confidence.square().sum(), importance)[0].abs().max() == 0
        above = torch.linspace(0.11, 0.5, 16)[None].requires_grad_()
        loss = aggregate(features, importance=above).confidence.square().sum()
        assert torch.autograd.grad(loss, above)[0].abs().min() > 0

    def test_token_defaults_to_the_mean_patch(self):
        aggregate, features = self.aggregator(), torch.randn(2, 8, 4, 4)
        torch.testing.assert_close(
            aggregate(features).descriptor, aggregate(features, token=features.mean((2, 3))).descriptor
        )


def test_class_attention_sums_heads_and_leaves_registers_out():
    attention = torch.randn(2, 3, 7, 7).softmax(-1)
    torch.testing.assert_close(class_attention(attention), attention[:, :, 0, 1:].sum(1))
    torch.testing.assert_close(class_attention(attention, prefix=3), attention[:, :, 0, 3:].sum(1))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("patches", lambda: log_sinkhorn(torch.zeros(1, 4, 4), torch.zeros(1, 4))),
        ("dustbin", lambda: log_sinkhorn(torch.zeros(1, 2, 4), torch.zeros(1, 3))),
        ("num_iters", lambda: log_sinkhorn(torch.zeros(1, 2, 4), torch.zeros(1, 4), 0)),
        ("clusters", lambda: SinkhornAggregator(8, clusters=0)),
        ("dropout", lambda: SinkhornAggregator(8, dropout=1.0)),
        ("features", lambda: TestAggregator().aggregator()(torch.zeros(2, 7, 4, 4))),
        ("token", lambda: TestAggregator().aggregator()(torch.zeros(2, 8, 4, 4), torch.zeros(2, 7))),
        ("importance", lambda: TestAggregator().aggregator()(torch.zeros(2, 8, 4, 4), None, torch.zeros(2, 4, 4))),
        ("attention", lambda: class_attention(torch.zeros(2, 7, 7))),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()
