from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import ConRLoss, conr_loss

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch(size: int = 10, seed: int = 0, labels: tuple[int, ...] = ()) -> Batch:
    """Features, targets, predictions and weights, in double precision, with positives and negatives among them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(6, (size, *labels), generator=generator).double()
    preds = targets / 3 + torch.rand((size, *labels), generator=generator, dtype=torch.float64)
    return features, targets, preds, 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)


def by_hand(
    features: torch.Tensor,
    targets: torch.Tensor,
    preds: torch.Tensor,
    weights: torch.Tensor,
    *,
    push: str = "exp",
    denominator: str = "paper",
    window: float = 1.0,
    temperature: float = 0.5,
    eps: float = 0.2,
) -> list[float]:
    """The formula, sample by sample, in Python's numbers."""
    values = []
    for i in range(len(features)):
        positives, total, missing = [], 0.0, 0
        has_negative = False
        for j in range(len(features)):
            gap, seen = (math.dist(v[i].reshape(-1).tolist(), v[j].reshape(-1).tolist()) for v in (targets, preds))
            similarity = F.cosine_similarity(features[i], features[j], dim=0).item() / temperature
            if i != j and gap <= window:
                positives.append(similarity)
                total += math.exp(similarity)
                continue
            missing += 1
            if gap > window and seen <= window:
                has_negative = True
                strength = math.exp(eps * gap) if push == "exp" else eps * gap
                total += weights[i].item() * strength * math.exp(similarity)
        total += missing if denominator == "source" else 0
        value = sum(math.log(total) - s for s in positives) / len(positives) if positives and has_negative else 0.0
        values.append(weights[i].item() * value)
    return values


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.sampled_from([(), (1,), (3,)]),
    st.sampled_from(["exp", "linear"]),
    st.sampled_from(["paper", "source"]),
)
def test_equals_the_formula(seed: int, size: int, labels: tuple[int, ...], push: str, denominator: str) -> None:
    sample = batch(size, seed, labels)
    options = {"push": push, "denominator": denominator, "temperature": 0.5, "eps": 0.2}
    each = conr_loss(*sample, reduction="none", **options)  # type: ignore[arg-type]
    torch.testing.assert_close(each, torch.tensor(by_hand(*sample, **options), dtype=torch.float64))  # type: ignore[arg-type]
    torch.testing.assert_close(conr_loss(*sample, **options), each.mean())  # type: ignore[arg-type]
    torch.testing.assert_close(conr_loss(*sample, reduction="sum", **options), each.sum())  # type: ignore[arg-type]


@pytest.mark.parametrize(("push", "strength"), [("exp", 2 * math.exp(0.1 * 7)), ("linear", 2 * 0.1 * 7)])
def test_one_positive_and_one_orthogonal_negative(push: str, strength: float) -> None:
    # Two views at a right angle to each other and to a sample 7 away that is predicted alike: all s = 0.
    targets, preds = torch.tensor([1.0, 1.0, 8.0]), torch.zeros(3)
    each = conr_loss(torch.eye(3), targets, preds, torch.full((3,), 2.0), eps=0.1, push=push, reduction="none")  # type: ignore[arg-type]
    expected = 2 * math.log(1 + strength)
    torch.testing.assert_close(each, torch.tensor([expected, expected, 0.0]))


def test_the_source_adds_one_for_each_non_positive() -> None:
    targets, preds = torch.tensor([1.0, 1.0, 8.0]), torch.zeros(3)
    each = conr_loss(torch.eye(3), targets, preds, eps=0.0, denominator="source", reduction="none")
    torch.testing.assert_close(each[0], torch.tensor(math.log(2 + 2)))  # the anchor and its negative beside both terms


def test_without_push_and_with_all_negatives_it_is_supervised_contrastive_learning() -> None:
    features, classes = batch()[0], torch.arange(10) // 2
    ours = conr_loss(features, 5.0 * classes, torch.zeros(10), eps=0.0, temperature=0.3)
    similarity = (F.normalize(features) @ F.normalize(features).T / 0.3).fill_diagonal_(-torch.inf)
    partner = torch.arange(10) ^ 1
    torch.testing.assert_close(ours, F.cross_entropy(similarity, partner))


def test_supervised_contrastive_peer() -> None:
    peers = pytest.importorskip("pytorch_metric_learning.losses")
    features, classes = batch(12)[0], torch.arange(12) // 3
    ours = conr_loss(features, 5.0 * classes, torch.zeros(12), eps=0.0, temperature=0.3)
    torch.testing.assert_close(ours, peers.SupConLoss(temperature=0.3)(features, classes))


def test_the_edge_of_the_window_counts_as_close() -> None:
    # Whole ages one year apart must be positives whatever the rounding; 2,000 years is where a matrix product errs.
    features = torch.eye(3)
    targets = torch.tensor([2000.0, 2001.0, 2003.0])
    each = conr_loss(features, targets, torch.tensor([0.0, 1.0, 2.0]), eps=0.0, reduction="none")
    torch.testing.assert_close(each, torch.tensor([0.0, math.log(2), 0.0]))  # 0 and 2 are predicted too far apart


def test_labels_within_the_window_give_exactly_zero() -> None:
    features, _, preds, weights = batch()
    features.requires_grad_()
    value = conr_loss(features, torch.rand(10), preds, weights)
    value.backward()
    assert value.item() == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_anchors_without_positives_give_zero_and_no_nan() -> None:
    features = batch()[0].requires_grad_()
    value = conr_loss(features, 5.0 * torch.arange(10), torch.zeros(10))
    value.backward()
    assert value.item() == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_predictions_that_differ_push_nothing() -> None:
    features, targets, _, _ = batch()
    assert conr_loss(features, targets, 100.0 * torch.arange(10)).item() == 0


def test_the_push_grows_with_the_label_distance() -> None:
    def pull_of_negative(distance: float) -> float:
        features = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
        targets = torch.tensor([0.0, 0.0, distance])
        conr_loss(features, targets, torch.zeros(3), temperature=1.0, eps=0.1).backward()
        return features.grad[2].norm().item()

    assert pull_of_negative(2.0) < pull_of_negative(10.0) < pull_of_negative(30.0)


def test_the_length_of_features_does_not_matter() -> None:
    features, *rest = batch()
    lengths = torch.rand(10, 1, dtype=torch.float64) * 100 + 0.1
    torch.testing.assert_close(conr_loss(lengths * features, *rest), conr_loss(features, *rest))


def test_window_and_labels_share_a_unit() -> None:
    # Labels, predictions and window divided by eight, with a push eight times as steep.
    features, targets, preds, weights = batch()
    scaled = conr_loss(features, targets / 8, preds / 8, weights, window=1 / 8, eps=0.08)
    torch.testing.assert_close(scaled, conr_loss(features, targets, preds, weights, window=1.0, eps=0.01))


def test_only_features_get_a_gradient() -> None:
    sample = tuple(part.requires_grad_() for part in batch())
    ConRLoss()(*sample).backward()
    assert sample[0].grad is not None
    assert sample[0].grad.abs().sum() > 0
    assert all(part.grad is None for part in sample[1:])


def test_gradient_agrees_with_finite_differences() -> None:
    features, *rest = batch()
    for denominator in ("paper", "source"):
        assert torch.autograd.gradcheck(
            lambda z, d=denominator: conr_loss(z, *rest, temperature=0.5, denominator=d), features.requires_grad_()
        )


def test_strong_pushes_and_cold_temperatures_stay_finite() -> None:
    features, targets, _, _ = batch()
    features = features.float().requires_grad_()
    value = conr_loss(features, 1000 * targets, torch.zeros(10), temperature=1e-3, eps=1.0)  # exp(5000) by hand
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all()


def test_a_weight_of_zero_takes_the_anchor_out() -> None:
    features, targets, preds, weights = batch()
    weights[3] = 0
    features.requires_grad_()
    each = conr_loss(features, targets, preds, weights, reduction="none")
    each.sum().backward()
    assert each[3].item() == 0
    assert features.grad.isfinite().all()


def test_whole_number_labels_are_taken() -> None:
    features, targets, preds, _ = batch()
    torch.testing.assert_close(conr_loss(features, targets.long(), preds), conr_loss(features, targets, preds))


def test_memory_is_quadratic_in_the_batch_whatever_the_labels() -> None:
    # The distances of 64 labels must not take batch x batch x 64 values.
    size = 64
    features, targets, preds, _ = batch(size, labels=(64,))
    largest = 0
    features.requires_grad_()

    def look(saved: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(look, lambda saved: saved):
        conr_loss(features, targets, preds, window=20.0)
    assert largest <= size * size


def test_module_and_function_agree() -> None:
    sample = batch()
    options = {"window": 2.0, "temperature": 0.4, "eps": 0.3, "push": "linear", "denominator": "source"}
    torch.testing.assert_close(ConRLoss(**options)(*sample), conr_loss(*sample, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"window": 0.0}, "window"),
        ({"temperature": 0.0}, "temperature"),
        ({"eps": -0.1}, "eps"),
        ({"eps": 0.0, "push": "linear"}, "eps"),
        ({"push": "square"}, "push"),
        ({"denominator": "code"}, "denominator"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ConRLoss(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_weights_that_are_negative_or_not_finite_are_refused(bad: float) -> None:
    features, targets, preds, weights = batch()
    with pytest.raises(ValueError, match="weights must be"):
        conr_loss(features, targets, preds, weights.index_fill(0, torch.tensor(1), bad))


def test_weights_of_another_shape_are_refused() -> None:
    features, targets, preds, weights = batch()
    with pytest.raises(ValueError, match="weights"):
        conr_loss(features, targets, preds, weights[:, None])
    with pytest.raises(ValueError, match="preds"):
        conr_loss(features, targets, preds[:, None])
