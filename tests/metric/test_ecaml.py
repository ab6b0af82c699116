"""Energy confusion: the moment form against pairs, gradients and invariances; what the combined loss changes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.metric import (
    BinomialDevianceLoss,
    ECAMLLoss,
    EnergyConfusion,
    energy_confusion,
    pair_masks,
    random_class_pairs,
)


def batch(seed: int, samples: int = 14, classes: int = 4, dim: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator) * 7 - 3  # neither dense nor positive
    return torch.randn(samples, dim, generator=generator, dtype=torch.float64), labels


def by_pairs(
    x: Tensor, labels: Tensor, *, squared: bool = True, normalize: bool = False
) -> dict[tuple[int, int], float]:
    """The mean distance between the classes of every pair, from its definition."""
    if normalize:
        x = x / x.norm(dim=1, keepdim=True)
    classes = sorted(set(labels.tolist()))
    means = {}
    for (i, first), (j, second) in itertools.combinations(enumerate(classes), 2):
        norms = [(a - b).norm().item() for a in x[labels == first] for b in x[labels == second]]
        means[i, j] = sum(d**2 if squared else d for d in norms) / len(norms)
    return means


class TestConfusion:
    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        samples=st.integers(2, 16),
        classes=st.integers(2, 6),
        squared=st.booleans(),
        normalize=st.booleans(),
    )
    def test_equals_its_definition(self, seed, samples, classes, squared, normalize):
        x, labels = batch(seed, samples, classes)
        means = by_pairs(x, labels, squared=squared, normalize=normalize).values()
        expected = sum(means) / len(means) if means else 0.0
        value = energy_confusion(x, labels, squared=squared, normalize=normalize)
        assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("squared", [True, False])
    def test_given_pairs_are_averaged_as_often_as_they_come(self, squared):
        x, labels = batch(1, samples=30)
        means = by_pairs(x, labels, squared=squared)
        value = energy_confusion(x, labels, squared=squared, class_pairs=torch.tensor([[0, 2], [3, 1], [2, 0]]))
        assert value.item() == pytest.approx((2 * means[0, 2] + means[1, 3]) / 3)

    def test_class_sizes_do_not_weigh(self):
        # One pair of classes is far apart and large, the other two are near and small.
        x = torch.tensor([[0.0], [1.0], *[[10.0]] * 50], dtype=torch.float64)
        labels = torch.tensor([0, 1, *[2] * 50])
        assert energy_confusion(x, labels).item() == pytest.approx((1 + 100 + 81) / 3)

    def test_gradient_is_that_of_two_classes(self):
        x, labels = batch(2, classes=2)
        x.requires_grad_()
        energy_confusion(x, labels).backward()
        mean = {label: x.detach()[labels == label].mean(0) for label in labels.unique().tolist()}
        (first, second) = mean
        for point, label, gradient in zip(x.detach(), labels.tolist(), x.grad, strict=True):
            other = mean[second if label == first else first]
            torch.testing.assert_close(gradient, 2 * (point - other) / (labels == label).sum())

    @pytest.mark.parametrize("options", [{"squared": False}, {"normalize": True}, {"log": True}, {"num_pairs": 3}])
    def test_gradients_agree_with_finite_differences(self, options):
        x, labels = batch(3, samples=8)

        def value(z: Tensor) -> Tensor:
            return EnergyConfusion(**options, generator=torch.Generator().manual_seed(0))(z, labels)

        assert torch.autograd.gradcheck(value, x.requires_grad_())

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10))
    def test_motion_changes_nothing_and_scale_enters_squared(self, seed, scale):
        x, labels = batch(seed)
        rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
        moved = x @ rotation + torch.tensor([5.0, -2.0, 100.0])
        torch.testing.assert_close(energy_confusion(moved, labels), energy_confusion(x, labels))
        torch.testing.assert_close(energy_confusion(scale * x, labels), scale**2 * energy_confusion(x, labels))
        torch.testing.assert_close(
            energy_confusion(scale * x, labels, squared=False), scale * energy_confusion(x, labels, squared=False)
        )
        torch.testing.assert_close(
            energy_confusion(scale * x, labels, normalize=True), energy_confusion(x, labels, normalize=True)
        )

    def test_normalised_it_is_two_less_twice_the_means_product(self):
        x, labels = batch(4, classes=2)
        unit = x / x.norm(dim=1, keepdim=True)
        first, second = (unit[labels == label].mean(0) for label in labels.unique())
        assert energy_confusion(x, labels, normalize=True).item() == pytest.approx(2 - 2 * (first @ second).item())

    def test_far_from_the_origin_single_precision_suffices(self):
        x, labels = batch(5)
        value = energy_confusion((x + 1000).float(), labels)
        assert value.item() == pytest.approx(energy_confusion(x, labels).item(), rel=1e-3)

    def test_collapsed_classes_are_not_confused_further(self):
        x = torch.ones(6, 3, requires_grad=True)
        for squared in (True, False):
            value = energy_confusion(x, torch.arange(6) % 3, squared=squared)
            (gradient,) = torch.autograd.grad(value, x)
            assert value.item() == 0
            assert gradient.abs().max() == 0

    @pytest.mark.parametrize("options", [{}, {"squared": False}, {"log": True}, {"num_pairs": 2}])
    def test_one_class_gives_zero_with_a_gradient(self, options):
        x = torch.randn(5, 3, requires_grad=True)
        value = EnergyConfusion(**options)(x, torch.full((5,), 9))
        value.backward()
        assert value.item() == 0
        assert x.grad.abs().max() == 0

    def test_logarithm_has_a_gradient_that_follows_the_scale(self):
        x, labels = batch(6)
        assert energy_confusion(x, labels, log=True).exp().item() == pytest.approx(energy_confusion(x, labels).item())
        gradients = []
        for scale in (1.0, 8.0):
            leaf = (scale * x).requires_grad_()
            energy_confusion(leaf, labels, log=True).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], 8 * gradients[1])

    def test_twice_the_mean_distance_bounds_the_energy_distance(self):
        x, labels = batch(7, samples=40, classes=2)
        first, second = (x[labels == label] for label in labels.unique())
        energy = 2 * torch.cdist(first, second).mean() - torch.cdist(first, first).mean()
        energy = energy - torch.cdist(second, second).mean()
        assert 0 <= energy <= 2 * energy_confusion(x, labels, squared=False)


class TestRandomPairs:
    def test_pairs_differ_and_are_uniform(self):
        labels = torch.tensor([5, 5, 5, -1, 30])
        pairs = random_class_pairs(labels, 6000, generator=torch.Generator().manual_seed(0))
        counts = torch.zeros(3, 3).index_put((pairs[:, 0], pairs[:, 1]), torch.ones(6000), accumulate=True)
        assert counts.diagonal().sum() == 0
        assert (counts[~torch.eye(3, dtype=torch.bool)] / 1000 - 1).abs().max() < 0.12

    def test_their_mean_is_the_mean_over_all(self):
        x, labels = batch(8)
        pairs = random_class_pairs(labels, 20_000, generator=torch.Generator().manual_seed(1))
        sampled = energy_confusion(x, labels, class_pairs=pairs)
        assert sampled.item() == pytest.approx(energy_confusion(x, labels).item(), rel=0.02)

    def test_the_generator_decides(self):
        x, labels = batch(9)
        values = [
            EnergyConfusion(2, generator=torch.Generator().manual_seed(seed))(x, labels).item() for seed in (0, 0, 1)
        ]
        assert values[0] == values[1] != values[2]


class TestECAMLLoss:
    def test_sums_the_two_terms(self):
        x, labels = batch(10)
        base, confusion = BinomialDevianceLoss(), EnergyConfusion(normalize=True)
        value = ECAMLLoss(base, weight=0.3, confusion=confusion)(x, labels)
        torch.testing.assert_close(value, base(x, labels) + 0.3 * confusion(x, labels))

    def test_weight_zero_is_the_base_bit_for_bit(self):
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        x, labels = batch(11)
        for base in (losses.TripletMarginLoss(), losses.NPairsLoss(), BinomialDevianceLoss()):
            gradients = []
            for loss in (base, ECAMLLoss(base, weight=0.0)):
                leaf = x.clone().requires_grad_()
                loss(leaf, labels).backward()
                gradients.append(leaf.grad)
            assert torch.equal(*gradients)

    def test_confused_embeddings_change_the_layer_alone(self):
        features, labels = batch(12)
        features.requires_grad_()
        layer = nn.Linear(3, 2).double()
        loss, base, confusion = ECAMLLoss(BinomialDevianceLoss(), 0.7), BinomialDevianceLoss(), EnergyConfusion()
        loss(layer(features), labels, confused=layer(features.detach())).backward()
        found = features.grad.clone(), layer.weight.grad.clone()
        (of_base,) = torch.autograd.grad(base(layer(features), labels), features)
        (of_both,) = torch.autograd.grad(
            base(layer(features), labels) + 0.7 * confusion(layer(features), labels), layer.weight
        )
        torch.testing.assert_close(found, (of_base, of_both))

    def test_parameters_of_the_base_are_its_own(self):
        base = nn.Linear(2, 2)  # any module with parameters
        assert list(ECAMLLoss(base).parameters()) == list(base.parameters())

    def test_a_step_draws_classes_together(self):
        x, labels = batch(13)
        before = [p.item() for p in _class_distances(x, labels)]
        leaf = x.clone().requires_grad_()
        ECAMLLoss(_Nothing(), weight=1.0)(leaf, labels).backward()
        after = [p.item() for p in _class_distances(x - 0.1 * leaf.grad, labels)]
        assert sum(after) < sum(before)


class _Nothing(nn.Module):
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return 0 * embeddings.sum()


def _class_distances(x: Tensor, labels: Tensor) -> list[Tensor]:
    means = [x[labels == label].mean(0) for label in labels.unique()]
    return [(a - b).norm() for a, b in itertools.combinations(means, 2)]


class TestBinomialDeviance:
    def test_closed_form_at_two_angles(self):
        # Cosines: one positive pair at 60 degrees, negatives at 90 and 30.
        angle = torch.tensor([0.0, 60.0, 90.0], dtype=torch.float64).deg2rad()
        x = torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([[1.0], [5.0], [0.1]])
        value = BinomialDevianceLoss(alpha=3.0, beta=0.4, negative_cost=4.0)(x, torch.tensor([0, 0, 1]))
        positive = math.log1p(math.exp(-3 * (0.5 - 0.4)))
        negatives = [math.log1p(math.exp(12 * (s - 0.4))) for s in (0.0, math.cos(math.pi / 6))]
        assert value.item() == pytest.approx(positive + sum(negatives) / 2)

    def test_each_kind_of_pair_is_averaged_on_its_own(self):
        x, labels = batch(14, samples=30)
        unit = x / x.norm(dim=1, keepdim=True)
        offset = 2 * (unit @ unit.T - 0.5)
        positive, negative = pair_masks(labels)
        expected = offset[positive].neg().exp().log1p().mean() + (25 * offset[negative]).exp().log1p().mean()
        torch.testing.assert_close(BinomialDevianceLoss()(x, labels), expected)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("num_pairs", lambda e, y: EnergyConfusion(0)),
        ("num_pairs", lambda e, y: random_class_pairs(y, 0)),
        ("class_pairs", lambda e, y: energy_confusion(e, y, class_pairs=torch.zeros(2, 3, dtype=torch.int64))),
        ("weight", lambda e, y: ECAMLLoss(nn.Identity(), weight=-0.1)),
        ("weight", lambda e, y: ECAMLLoss(nn.Identity(), weight=math.inf)),
        ("confused", lambda e, y: ECAMLLoss(BinomialDevianceLoss())(e, y, confused=e[:, :1])),
        ("labels", lambda e, y: EnergyConfusion(3)(e, y[:-1])),
        ("embeddings", lambda e, y: energy_confusion(e[0], y)),
        ("alpha", lambda e, y: BinomialDevianceLoss(alpha=0.0)),
        ("beta", lambda e, y: BinomialDevianceLoss(beta=1.5)),
        ("negative_cost", lambda e, y: BinomialDevianceLoss(negative_cost=-1.0)),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name):
        call(*batch(0))


def test_huge_embeddings_are_refused_or_their_logarithm_is_right() -> None:
    points, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="embeddings must have squared distances"):
        energy_confusion(1e30 * points, labels)
    logarithm = energy_confusion(1e30 * points, labels, log=True)
    assert logarithm.item() == pytest.approx(math.log(2) + 60 * math.log(10), rel=1e-6)
    assert energy_confusion(1e30 * points, labels, squared=False).item() == pytest.approx(2**0.5 * 1e30)


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("pairs", [[[3, 4]], [[-1, 0]], [[0, 2]]])
def test_class_pairs_that_are_labels_and_no_positions_are_refused(pairs, squared) -> None:
    embeddings = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([3, 3, 3, 4, 4, 4])
    with pytest.raises(ValueError, match="class_pairs must be positions"):
        energy_confusion(embeddings, labels, squared=squared, class_pairs=torch.tensor(pairs))
    right = energy_confusion(embeddings, labels, squared=squared, class_pairs=torch.tensor([[0, 1]]))
    torch.testing.assert_close(right, energy_confusion(embeddings, labels, squared=squared))
