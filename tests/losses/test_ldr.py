from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import ALDRKL, LDRKL, aldr_temperature, ldr_kl

INDEX = torch.arange(5)


def batch(seed: int = 0, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    return scores, torch.randint(classes, (5,), generator=generator)


def excess(scores: torch.Tensor, targets: torch.Tensor, margin: float) -> torch.Tensor:
    """d_k, from its definition."""
    return scores - scores.gather(1, targets[:, None]) + margin * (1 - F.one_hot(targets, scores.shape[1]))


def test_temperature_one_without_margin_is_cross_entropy() -> None:
    scores, targets = batch()
    value = ldr_kl(scores, targets, lam=1.0, margin=0.0)
    torch.testing.assert_close(value, F.cross_entropy(scores, targets) - math.log(4))
    assert ldr_kl(torch.zeros(2, 4), torch.tensor([0, 1]), margin=0.0).item() == 0


def test_limits_are_crammer_singer_and_the_mean() -> None:
    scores, targets = batch()
    d = excess(scores, targets, 0.1)
    cold = ldr_kl(scores, targets, lam=1e-4, reduction="none")
    torch.testing.assert_close(cold, d.max(1).values, atol=1e-3, rtol=0)
    hot = ldr_kl(scores, targets, lam=1e4, reduction="none")
    torch.testing.assert_close(hot, d.mean(1), atol=1e-2, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 20), st.floats(0, 2))
def test_value_is_the_worst_weighting(seed: int, lam: float, margin: float) -> None:
    scores, targets = batch(seed)
    scores.requires_grad_()
    d = excess(scores.detach(), targets, margin)
    value = ldr_kl(scores, targets, lam=lam, margin=margin, reduction="none")

    def penalised(p: torch.Tensor) -> torch.Tensor:
        return (p * d).sum(1) - lam * (math.log(4) + (p * p.clamp_min(1e-300).log()).sum(1))

    best = (d / lam).softmax(1)
    torch.testing.assert_close(value.detach(), penalised(best))
    for other in (torch.full_like(best, 0.25), F.one_hot(targets, 4).double(), 0.9 * best + 0.1 * best.flip(1)):
        assert (penalised(other) <= value.detach() + 1e-9).all()
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    torch.testing.assert_close(gradient, best - F.one_hot(targets, 4))  # the envelope theorem


def test_one_temperature_per_sample() -> None:
    scores, targets = batch()
    lam = torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0], dtype=torch.float64)
    each = torch.stack([ldr_kl(scores[[i]], targets[[i]], lam=float(lam[i])) for i in range(5)])
    torch.testing.assert_close(ldr_kl(scores, targets, lam=lam, reduction="none"), each)


def test_temperature_of_sure_and_unsure_scores() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0], [1e5, 0.0, 0.0]])
    torch.testing.assert_close(aldr_temperature(scores, torch.ones(2), lam_0=6.0, alpha=3.0), torch.tensor([6.0, 4.0]))


def test_temperatures_fixed_point_maximises_the_loss() -> None:
    # With no margin, the iteration's limit is the stationary point of the objective in the temperature.
    scores, targets = batch(3)
    lam_0, alpha = 2.0, 2.0
    lam = torch.full((5,), lam_0, dtype=torch.float64)
    for _ in range(200):
        lam = aldr_temperature(scores, lam, lam_0=lam_0, alpha=alpha)
    lam.requires_grad_()
    strength = alpha * math.log(4) / (2 * lam_0)
    objective = ldr_kl(scores, targets, lam=lam, margin=0.0, reduction="none") - strength * (lam - lam_0) ** 2
    (slope,) = torch.autograd.grad(objective.sum(), lam)
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-6, rtol=0)


def test_adaptive_loss_from_its_definition() -> None:
    scores, targets = batch(1)
    loss = ALDRKL(5, 4, lam=2.0, alpha=3.0, margin=0.3, normalize=None).double()
    lam = torch.full((5,), 2.0, dtype=torch.float64)
    for _ in range(3):
        p = (scores / lam[:, None]).softmax(1)
        kl = (p * (4 * p).log()).sum(1)
        lam = 2.0 - 2.0 * kl / (3.0 * math.log(4))
        d = excess(scores, targets, 0.3)
        expected = lam * (d / lam[:, None]).exp().mean(1).log() - 3.0 * math.log(4) / 4.0 * (lam - 2.0) ** 2
        torch.testing.assert_close(loss(scores, targets, INDEX), expected.mean())
        torch.testing.assert_close(loss.memory.rows, lam)
    assert not torch.equal(lam, torch.full_like(lam, 2.0))


def test_no_gradient_flows_through_the_temperature() -> None:
    scores, targets = batch(1)
    loss = ALDRKL(5, 4, lam=2.0, margin=0.0, normalize=None).double()
    scores.requires_grad_()
    loss(scores, targets, INDEX).backward()
    p = (scores.detach() / loss.memory.rows[:, None]).softmax(1)
    torch.testing.assert_close(scores.grad, (p - F.one_hot(targets, 4)) / 5)


def test_uniform_scores_keep_the_largest_temperature() -> None:
    loss = ALDRKL(5, 4)
    loss(torch.full((5, 4), 3.0), torch.zeros(5, dtype=torch.int64), INDEX)
    torch.testing.assert_close(loss.memory.rows, torch.full((5,), 10.0))


def test_normalised_losses_ignore_the_scale_of_scores() -> None:
    scores, targets = batch()
    for make in (lambda: ALDRKL(5, 4), lambda: ALDRKL(5, 4, lam=0.1)):
        one, ten = make().double(), make().double()
        for _ in range(2):
            torch.testing.assert_close(one(scores, targets, INDEX), ten(10 * scores, targets, INDEX))


def test_softplus_normalisation() -> None:
    scores, targets = batch()
    positive = F.softplus(scores)
    expected = ldr_kl(positive / positive.mean(1, keepdim=True), targets, lam=0.7, margin=0.2)
    torch.testing.assert_close(LDRKL(lam=0.7, margin=0.2)(scores, targets), expected)


@pytest.mark.parametrize("make", [LDRKL, lambda **options: ALDRKL(5, 4, **options)])
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lam": 0.0}, "lam"),
        ({"lam": math.nan}, "lam"),
        ({"margin": -0.1}, "margin"),
        ({"normalize": "l2"}, "normalize"),
        ({"reduction": "max"}, "reduction"),
    ],
)
def test_bad_options_are_refused_by_name(make, options: dict[str, object], name: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=name):
        make(**options)


def test_bad_adaptive_options_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="alpha"):
        ALDRKL(5, 4, alpha=1.0)
    with pytest.raises(ValueError, match="num_classes"):
        ALDRKL(5, 1)
    with pytest.raises(ValueError, match="lam"):
        ldr_kl(torch.zeros(1, 2), torch.tensor([0]), lam=0.0)


def test_reductions_agree() -> None:
    scores, targets = batch()
    for make in (lambda r: LDRKL(reduction=r), lambda r: lambda s, t: ALDRKL(5, 4, reduction=r)(s, t, INDEX)):
        each = make("none")(scores, targets)
        assert each.shape == (5,)
        torch.testing.assert_close(make("mean")(scores, targets), each.mean())
        torch.testing.assert_close(make("sum")(scores, targets), each.sum())


def test_a_temperature_of_zero_gives_a_finite_one() -> None:
    found = aldr_temperature(torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 2.0]]), torch.zeros(2))
    torch.testing.assert_close(found, torch.tensor([5.0, 10.0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    for options, name in (({"lam": bad}, "lam"), ({"margin": bad}, "margin")):
        with pytest.raises(ValueError, match=name):
            LDRKL(**options)
    with pytest.raises(ValueError, match="alpha"):
        ALDRKL(5, 3, alpha=bad)
