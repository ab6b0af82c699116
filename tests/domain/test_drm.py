from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.domain import DomainHeads, DRMSteering, head_entropy, head_weights, prototype_gap


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(count: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def model(domains: int = 2, **options: object) -> DomainHeads:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    return DomainHeads(features, 5, 3, domains, **options).double()  # type: ignore[arg-type]


def batches(domains: int = 2, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [(drawn(8 + d, 6, seed=seed + d), labels(8 + d, seed=seed + d)) for d in range(domains)]


def state(held: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in held.state_dict().items()}


def unchanged(held: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in held.state_dict().items())


# --- gaps and weights ---


def test_entropy_of_no_idea_is_the_logarithm_of_the_classes() -> None:
    torch.testing.assert_close(head_entropy(torch.zeros(2, 3, 7)), torch.full((2, 3), math.log(7)))
    sure = head_entropy(torch.tensor([1e4, 0.0, 0.0]))
    assert sure == 0
    logits = drawn(4, 5)
    torch.testing.assert_close(head_entropy(logits), torch.distributions.Categorical(logits=logits).entropy())


def test_gamma_goes_from_uniform_to_the_best() -> None:
    gaps = drawn(6, 4).abs()
    torch.testing.assert_close(head_weights(gaps, 0.0), torch.full_like(gaps, 0.25))
    torch.testing.assert_close(head_weights(gaps, 1.0), (1 / gaps) / (1 / gaps).sum(1, keepdim=True))
    torch.testing.assert_close(head_weights(gaps, 500.0), head_weights(gaps), atol=1e-3, rtol=0)
    assert torch.equal(head_weights(gaps).argmax(1), gaps.argmin(1))


@pytest.mark.parametrize("gamma", [None, 0.0, 0.5, 5.0])
def test_weights_sum_to_one_also_without_any_gap(gamma: float | None) -> None:
    gaps = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, math.inf]])
    weights = head_weights(gaps, gamma)
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert weights[1, 2] == 0


def test_weights_do_not_depend_on_the_unit_of_the_gaps() -> None:
    gaps = drawn(6, 4).abs() + 0.1
    for unit in (1e-4, 1e4):
        torch.testing.assert_close(head_weights(unit * gaps, 2.0), head_weights(gaps, 2.0))


def test_distances_from_prototypes() -> None:
    z, means = drawn(4, 5), drawn(2, 5, seed=1)
    torch.testing.assert_close(prototype_gap(z, means), 1 - F.cosine_similarity(z[:, None], means[None], dim=2))
    torch.testing.assert_close(prototype_gap(z, means, p=1), (z[:, None] - means[None]).abs().sum(2))


# --- training ---


def test_the_loss_is_its_formula() -> None:
    held, given = model(3).eval(), batches(3)
    expected = 0.0
    for d, (x, y) in enumerate(given):
        logits = held.heads(held.features(x)).view(-1, 4, 3)
        expected = expected + 0.5 * (F.cross_entropy(logits[:, d], y) + F.cross_entropy(logits[:, 3], y)) / 3
    torch.testing.assert_close(held.loss(given)["total"], expected)


def test_a_head_learns_from_its_own_domain_alone() -> None:
    held = model(2)
    held.loss(batches(2))["total"].backward()
    whole = held.heads.weight.grad.view(3, 3, 5).clone()
    held.zero_grad()
    (first, y), second = batches(2)
    held.loss([(first, (y + 1) % 3), second])["total"].backward()
    other = held.heads.weight.grad.view(3, 3, 5)
    assert not torch.equal(whole[0], other[0])
    torch.testing.assert_close(whole[1], other[1])
    assert not torch.equal(whole[2], other[2])


def test_the_domain_classifier_does_not_reach_the_encoder() -> None:
    with_it, without = model(2, gap="discriminator"), model(2)
    without.load_state_dict(with_it.state_dict(), strict=False)
    for held in (with_it, without):
        held.loss(batches(2))["total"].backward()
    torch.testing.assert_close(with_it.features[0].weight.grad, without.features[0].weight.grad)
    assert with_it.discriminator.weight.grad.abs().sum() > 0


def test_one_domain_with_equal_heads_is_the_plain_classifier() -> None:
    held = model(1).eval()
    with torch.no_grad():
        held.heads.weight[:3].copy_(held.heads.weight[3:])
        held.heads.bias[:3].copy_(held.heads.bias[3:])
    x, y = batches(1)[0]
    plain = held.heads(held.features(x))[:, 3:]
    torch.testing.assert_close(held(x), plain.log_softmax(1))
    torch.testing.assert_close(held.loss([(x, y)])["total"], F.cross_entropy(plain, y))


def test_training_mode_gives_the_head_for_all() -> None:
    held, x = model(2).train(), drawn(8, 6)
    torch.testing.assert_close(held(x), held.heads(held.features(x))[:, 6:])


# --- inference ---


def test_mixture_of_heads() -> None:
    x = drawn(7, 6)
    z = model().eval().features(x)
    each = model().heads(z).view(7, 3, 3).softmax(2)
    torch.testing.assert_close(model(gamma=0.0).eval()(x).exp(), each.mean(1))
    best = head_entropy(model().logits(z)).argmin(1)
    torch.testing.assert_close(model().eval()(x).exp(), each[torch.arange(7), best])
    together = model(gamma=2.0, by_batch=True).eval()
    gaps = head_entropy(model().logits(z)).mean(0)
    expected = (head_weights(gaps, 2.0)[None, :, None] * each).sum(1)
    torch.testing.assert_close(together(x).exp(), expected)


def test_a_sample_is_answered_alone() -> None:
    held, x = model(gamma=1.0).eval(), drawn(7, 6)
    torch.testing.assert_close(held(x)[:2], held(x[:2]))
    batched = model(gamma=1.0, by_batch=True).eval()
    assert (batched(x)[:2] - batched(x[:2])).abs().max() > 1e-6


def test_other_gaps_leave_the_head_for_all_out() -> None:
    x = drawn(7, 6)
    held = model(gap="discriminator", gamma=1.0).eval()
    z = held.features(x)
    weights = held.weights(z)
    torch.testing.assert_close(weights[:, :2], held.discriminator(z).softmax(1))
    assert (weights[:, 2] == 0).all()
    by_mean = model(gap="prototype").eval()
    by_mean.fit_prototypes(batches())
    torch.testing.assert_close(by_mean.prototypes[1], by_mean.features(batches()[1][0]).mean(0).detach())
    near = by_mean.prototypes + 1e-3
    assert by_mean.weights(near).argmax(1).tolist() == [0, 1]


def test_extreme_logits_stay_finite() -> None:
    held = model(gamma=5.0).eval()
    with torch.no_grad():
        held.heads.weight.mul_(1e4)
    assert held(drawn(7, 6)).isfinite().all()


# --- steering ---


def test_the_answer_is_of_the_weights_before() -> None:
    held, x = model().eval(), drawn(7, 6)
    expected = held(x).exp()
    torch.testing.assert_close(DRMSteering(held, threshold=0.0, steps=3, lr=0.1).predict(x), expected)
    assert (held(x).exp() - expected).abs().max() > 1e-3


def test_a_step_is_adam_on_pseudo_labels() -> None:
    held, twin, x = model(), model(), drawn(7, 6)
    DRMSteering(held, scheme="last", threshold=0.4, lr=0.05).predict(x)
    optimizer = torch.optim.Adam(twin.heads.parameters(), lr=0.05)
    logits = twin.logits(twin.eval().features(x).detach())
    sure, label = logits[:, -1].softmax(1).max(1)
    kept = sure >= 0.4
    assert 0 < kept.sum() < 7
    sum(F.cross_entropy(logits[kept, h], label[kept]) for h in range(3)).backward()
    optimizer.step()
    torch.testing.assert_close(held.heads.weight, twin.heads.weight)


@pytest.mark.parametrize("scheme", ["drm", "last", "uniform", "own"])
def test_schemes_differ_in_whose_labels_count(scheme: str) -> None:
    held = model(gamma=1.0).eval()
    steering = DRMSteering(held, scheme=scheme, threshold=0.45)
    z = held.features(drawn(7, 6))
    logits = held.logits(z)
    probs = logits.softmax(2)
    labelled = {
        "drm": held.probabilities(z)[:, None].expand_as(probs),
        "last": probs[:, -1:].expand_as(probs),
        "uniform": probs.mean(1, keepdim=True).expand_as(probs),
        "own": probs,
    }[scheme]
    expected = 0.0
    for h in range(3):
        sure, label = labelled[:, h].max(1)
        kept = sure >= 0.45
        if kept.any():
            expected = expected + F.cross_entropy(logits[kept, h], label[kept])
    torch.testing.assert_close(steering.loss(z), expected)


def test_nothing_is_learned_above_one_or_where_nobody_is_sure() -> None:
    for threshold in (1.1, 0.999999):
        held = model()
        before = state(held)
        DRMSteering(held, threshold=threshold, lr=0.1).predict(drawn(7, 6))
        assert unchanged(held, before)


def test_only_heads_move_unless_all_are_asked_for() -> None:
    for params in ("heads", "all"):
        held = model()
        before = state(held)
        DRMSteering(held, threshold=0.0, lr=0.1, params=params).predict(drawn(7, 6))
        moved = {name for name, value in held.state_dict().items() if not torch.equal(value, before[name])}
        expected = {"heads.weight", "heads.bias"}
        if params == "all":
            expected |= {f"features.{name}" for name in ("0.weight", "1.weight", "1.bias")}
        assert moved - {"features.0.bias"} == expected
        assert held.training


def test_reset_is_exact() -> None:
    held, x = model(), drawn(7, 6)
    before = state(held)
    steering = DRMSteering(held, threshold=0.0, lr=0.1, params="all")
    first = [steering.predict(x) for _ in range(3)]
    steering.reset()
    assert unchanged(held, before)
    again = [steering.predict(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# --- refusals ---


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: model(0), "num_domains"),
        (lambda: model(gamma=-1.0), "gamma"),
        (lambda: model(gap="mmd"), "gap"),
        (lambda: model(2).loss(batches(3)), "batches"),
        (lambda: model(2).loss([]), "batches"),
        (lambda: model(2).loss([(drawn(3, 6), torch.tensor([0, 1, 3]))] * 2), "y"),
        (lambda: model(2, gap="prototype").fit_prototypes(batches(1)), "domains"),
        (lambda: head_weights(torch.ones(3), -1.0), "gamma"),
        (lambda: prototype_gap(drawn(2, 3), drawn(2, 4)), "z and prototypes"),
        (lambda: prototype_gap(drawn(2, 3), drawn(2, 3), p=0.5), "p"),
        (lambda: DRMSteering(nn.Linear(2, 2)), "model"),
        (lambda: DRMSteering(model(), threshold=-0.1), "threshold"),
        (lambda: DRMSteering(model(), steps=0), "steps"),
        (lambda: DRMSteering(model(), lr=0.0), "lr"),
        (lambda: DRMSteering(model(), scheme="best"), "scheme"),
        (lambda: DRMSteering(model(), params="bn"), "params"),
        (lambda: DRMSteering(model()).load_state_dict(DRMSteering(model(3)).state_dict()), "state"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, name: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{name} must"):
        call()
