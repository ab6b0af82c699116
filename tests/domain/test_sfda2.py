from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.domain import (
    SFDA2,
    ClassCovariance,
    feature_disentanglement,
    implicit_feature_augmentation,
    neighbourhood_clustering,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariances(classes: int = 3, dim: int = 4, seed: int = 0) -> Tensor:
    root = drawn(classes, dim, dim, seed=seed)
    return root @ root.mT


def probabilities(rows: int = 5, classes: int = 3, seed: int = 0) -> Tensor:
    return drawn(rows, classes, seed=seed).softmax(1)


# --- spectral neighbourhood clustering ---


def test_clustering_is_its_formula() -> None:
    probs, near = probabilities(), probabilities(5 * 2, seed=1).view(5, 2, 3)
    attraction, overlap = neighbourhood_clustering(probs, near)
    expected = -sum(float(near[i, j] @ probs[i]) for i in range(5) for j in range(2)) / 5
    assert attraction.item() == pytest.approx(expected)
    pairs = sum(float(probs[i] @ probs[j]) ** 2 for i in range(5) for j in range(5) if i != j) / 5
    assert overlap.item() == pytest.approx(pairs)


def test_gradient_counts_each_pair_twice_and_neighbours_not_at_all() -> None:
    probs = probabilities().requires_grad_()
    near = probabilities(10, seed=1).view(5, 2, 3).requires_grad_()
    attraction, overlap = neighbourhood_clustering(probs, near)
    (attraction + 0.7 * overlap).backward()
    fixed = probs.detach()
    products = fixed @ fixed.T
    products.fill_diagonal_(0)
    expected = -near.detach().sum(1) / 5 + 0.7 * 4 / 5 * products @ fixed
    torch.testing.assert_close(probs.grad, expected)
    assert near.grad is None


def test_same_gradient_as_the_released_divergence() -> None:
    """The release writes kl_div(p, S) without the logarithm of p: S log S - S p."""
    near = probabilities(10, seed=1).view(5, 2, 3)
    grads = []
    for loss in (
        lambda p: neighbourhood_clustering(p, near)[0],
        lambda p: F.kl_div(p[:, None].expand(5, 2, 3), near, reduction="none").sum((1, 2)).mean(),
    ):
        probs = probabilities().requires_grad_()
        loss(probs).backward()
        grads.append(probs.grad)
    torch.testing.assert_close(*grads)


def test_one_sample_overlaps_with_nobody() -> None:
    assert neighbourhood_clustering(probabilities(1), probabilities(1)[:, None])[1] == 0


# --- implicit feature augmentation ---


@pytest.mark.parametrize("off", ["strength", "covariance"])
def test_without_spread_it_is_cross_entropy_to_all_classes(off: str) -> None:
    logits, covariance = drawn(5, 3), covariances() * (off != "covariance")
    loss = implicit_feature_augmentation(logits, drawn(3, 4, seed=1), covariance, 0.0 if off == "strength" else 2.0)
    all_classes = sum(F.cross_entropy(logits, torch.full((5,), k)) for k in range(3))
    torch.testing.assert_close(loss, 2 * all_classes)


def test_augmentation_is_its_formula() -> None:
    logits, w, covariance, strength = drawn(5, 3), drawn(3, 4, seed=1), covariances(seed=2), 0.3
    expected = 0.0
    for row in logits:
        spread = covariance[row.argmax()]
        for k in range(3):
            below = sum(math.exp(row[c] + strength / 2 * (w[c] - w[k]) @ spread @ (w[c] - w[k])) for c in range(3))
            expected -= 2 * math.log(math.exp(row[k]) / below) / 5
    found = implicit_feature_augmentation(logits, w, covariance, strength)
    assert found.item() == pytest.approx(expected)


def test_augmentation_grows_with_its_strength_and_bounds_the_sampled_loss() -> None:
    logits, w, covariance = drawn(1, 3), drawn(3, 4, seed=1), 0.1 * covariances(seed=2)
    values = [implicit_feature_augmentation(logits, w, covariance, s).item() for s in (0.0, 0.5, 1.0, 4.0)]
    assert values == sorted(values)
    root = torch.linalg.cholesky(covariance[logits.argmax()])
    sampled = logits + (drawn(20_000, 4, seed=3) @ root.T) @ w.T
    mean = -2 * sampled.log_softmax(1).sum(1).mean()
    assert implicit_feature_augmentation(logits, w, covariance, 1.0) > mean  # by Jensen's inequality


def test_augmentation_does_not_depend_on_a_common_shift_of_the_head() -> None:
    logits, w, covariance = drawn(4, 3), drawn(3, 4, seed=1), covariances()
    one, other = (implicit_feature_augmentation(logits, v, covariance, 0.5) for v in (w, w + drawn(4, seed=5)))
    torch.testing.assert_close(one, other)


# --- feature disentanglement ---


def test_proportional_covariances_are_not_disentangled() -> None:
    one = covariances(1)
    scaled = torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)[:, None, None] * one
    assert feature_disentanglement(scaled, probabilities(3)).item() == pytest.approx(0, abs=1e-12)


def test_orthogonal_covariances_earn_half_of_the_confusion() -> None:
    covariance, mean = torch.diag_embed(torch.eye(3, dtype=torch.float64)), probabilities(3)
    confused = mean @ mean.T
    expected = -0.5 * (confused.sum() - confused.trace())
    torch.testing.assert_close(feature_disentanglement(covariance, mean), expected)


def test_a_class_without_samples_takes_no_part() -> None:
    covariance, mean = covariances(), probabilities(3)
    covariance[1] = 0
    covariance.requires_grad_()
    loss = feature_disentanglement(covariance, mean)
    loss.backward()
    two = covariance.detach()[[0, 2]].flatten(1)
    cosine = F.cosine_similarity(two[0], two[1], dim=0)
    torch.testing.assert_close(loss.detach(), -(mean[0] @ mean[2]) * (1 - cosine))
    assert covariance.grad.isfinite().all()
    assert (covariance.grad[1] == 0).all()


def test_confusion_is_a_constant() -> None:
    mean = probabilities(3).requires_grad_()
    assert not feature_disentanglement(covariances(), mean).requires_grad


# --- running covariances ---


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1] * 12, [3, 0, 9]])
def test_covariance_does_not_depend_on_how_data_come(sizes: list[int]) -> None:
    z, labels = drawn(12, 4) + 100, torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0])
    statistics = ClassCovariance(3, 4).double()
    for part, of in zip(z.split(sizes), labels.split(sizes), strict=True):
        statistics(part, of)
    for c in (0, 1):
        np.testing.assert_allclose(statistics.covariance[c], np.cov(z[labels == c].T, bias=True), atol=1e-8)
        torch.testing.assert_close(statistics.mean[c], z[labels == c].mean(0))
    assert statistics.count.tolist() == [6, 6, 0]
    assert (statistics.covariance[2] == 0).all()


def test_the_newest_batch_carries_the_gradient() -> None:
    statistics = ClassCovariance(2, 2).double()
    past, now = drawn(3, 2).requires_grad_(), drawn(3, 2, seed=1).requires_grad_()
    labels = torch.zeros(3, dtype=torch.int64)
    statistics(past, labels)
    weight = drawn(2, 2, seed=2)
    (statistics(now, labels)[0] * weight).sum().backward()
    assert past.grad is None
    assert not statistics.covariance.requires_grad

    def whole(z: Tensor) -> Tensor:
        both = torch.cat([past.detach(), z])
        apart = both - both.mean(0)
        return (apart.T @ apart / 6 * weight).sum()

    torch.testing.assert_close(now.grad, torch.autograd.functional.jacobian(whole, now.detach()))


def test_rows_that_are_not_finite_are_left_out() -> None:
    z = drawn(5, 2)
    clean, spoilt = ClassCovariance(1, 2).double(), ClassCovariance(1, 2).double()
    clean(z[:4], torch.zeros(4, dtype=torch.int64))
    z[4, 0] = math.nan
    spoilt(z, torch.zeros(5, dtype=torch.int64))
    for name, value in clean.state_dict().items():
        torch.testing.assert_close(spoilt.state_dict()[name], value)


# --- the rule ---


def rule(**options: object) -> SFDA2:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    found = SFDA2(features, nn.Linear(5, 3), 40, **{"total_steps": 10, **options}).double()  # type: ignore[arg-type]
    found.fill(drawn(40, 6).split(16))
    return found


def test_a_step_is_the_sum_of_its_parts() -> None:
    held, x, index = rule(k=3), drawn(8, 6, seed=3), torch.arange(8) * 2
    for _ in range(4):
        held.update()
    parts = held.loss(x, index)
    alpha = (1 + 10 * 0.4) ** -5
    expected = (
        parts["attraction"] + alpha * parts["overlap"] + 1e-4 * parts["augmentation"] + 10 * parts["disentanglement"]
    )
    torch.testing.assert_close(parts["total"].detach(), expected)
    z = held.features(x)
    torch.testing.assert_close(held.bank.features[index], F.normalize(z).detach())
    torch.testing.assert_close(held.bank.payload[index], held.head(z).softmax(1).detach())


def test_neighbours_are_others_as_they_are_stored_now() -> None:
    held, x, index = rule(k=4, ifa_weight=0, fd_weight=0), drawn(8, 6, seed=3), torch.arange(8)
    x[1] = x[0]  # twice the same, which is its own nearest neighbour
    parts = held.loss(x, index)
    cosines = held.bank.features[index] @ held.bank.features.T
    cosines[index, index] = -2
    near = held.bank.payload[cosines.topk(4).indices]
    expected = neighbourhood_clustering(held.bank.payload[index], near)[0]
    torch.testing.assert_close(parts["attraction"], expected)
    assert set(parts) == {"total", "attraction", "overlap"}


def test_mean_predictions_are_those_of_the_bank() -> None:
    held = rule()
    probs = held.bank.payload
    mean = held._mean_probs(probs)
    for c in range(3):
        mine = probs[probs.argmax(1) == c]
        torch.testing.assert_close(mean[c], mine.mean(0) if len(mine) else torch.zeros(3, dtype=torch.float64))


def test_disentanglement_has_a_gradient_into_the_features() -> None:
    held = rule(alpha=0, ifa_weight=0)
    x, index = drawn(16, 6, seed=3), torch.arange(16)
    held.loss(x, index)["total"].backward()
    with_it = held.features[0].weight.grad.clone()
    other = rule(alpha=0, ifa_weight=0, fd_weight=0)
    other.loss(x, index)["total"].backward()
    assert (with_it - other.features[0].weight.grad).abs().max() > 1e-4


def test_it_separates_clusters_that_the_head_splits_wrongly() -> None:
    """Two clusters of the target, one of them cut by the source's boundary, end up whole."""
    torch.manual_seed(0)
    at = torch.tensor([[-2.0, 0.2], [2.0, 0.2]])
    x = at.repeat_interleave(100, 0) + 0.4 * torch.randn(200, 2)
    head = nn.Linear(2, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[-0.6, 1.0], [0.6, -1.0]]))
        head.bias.copy_(torch.tensor([0.9, -0.9]))
    held = SFDA2(nn.Identity(), head, 200, 200)
    held.fill([x])
    truth = torch.arange(2).repeat_interleave(100)
    before = (held(x).argmax(1) == truth).float().mean()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        index = torch.randperm(200, generator=generator)[:64]
        optimizer.zero_grad()
        held.loss(x[index], index)["total"].backward()
        optimizer.step()
        held.update()
    assert before < 0.9
    assert (held(x).argmax(1) == truth).float().mean() > 0.97


def test_weight_normalisation_is_followed() -> None:
    held = rule()
    nn.utils.parametrizations.weight_norm(held.head)
    held.loss(drawn(8, 6, seed=3), torch.arange(8))["total"].backward()
    assert held.head.parametrizations.weight.original0.grad is not None


def test_bf16_autocast_stays_near() -> None:
    held = rule().float()
    x, index = drawn(8, 6, seed=3).float(), torch.arange(8)
    expected = held.loss(x, index)["total"]
    again = rule().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = again.loss(x, index)["total"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"k": 40}, "k"),
        ({"total_steps": 0}, "total_steps"),
        ({"alpha": -1}, "alpha"),
        ({"beta": math.nan}, "beta"),
        ({"ifa_weight": -1}, "ifa_weight"),
        ({"ifa_strength": -1}, "ifa_strength"),
        ({"fd_weight": -1}, "fd_weight"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        rule(**options)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: neighbourhood_clustering(drawn(0, 3), drawn(0, 2, 3)), "probs"),
        (lambda: neighbourhood_clustering(drawn(2, 3), drawn(2, 2, 4)), "neighbours"),
        (lambda: implicit_feature_augmentation(drawn(2, 3), drawn(2, 4), covariances(), 1.0), "weight"),
        (lambda: implicit_feature_augmentation(drawn(2, 3), drawn(3, 5), covariances(), 1.0), "covariance"),
        (lambda: implicit_feature_augmentation(drawn(0, 3), drawn(3, 4), covariances(), 1.0), "logits"),
        (lambda: feature_disentanglement(covariances(), drawn(2, 2)), "mean_probs"),
        (lambda: feature_disentanglement(drawn(3, 4, 5), drawn(3, 3)), "covariance"),
        (lambda: ClassCovariance(2, 3)(drawn(2, 4), torch.tensor([0, 1])), "z and labels"),
        (lambda: SFDA2(nn.Identity(), nn.Identity(), 5, 5), "head"),
        (lambda: SFDA2(nn.Identity(), nn.Linear(2, 2), 5, 5, k=2).fill([torch.ones(4, 2)]), "batches"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
        call()
