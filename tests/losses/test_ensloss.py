"""EnsLoss: the drawn derivatives keep convexity, calibration and the tail; the gradient is exactly theirs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.losses import EnsLoss, calibrated_derivatives

SLACK = 1e-6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 100_000), lam=st.floats(-1, 1), batch=st.integers(1, 64), scale=st.floats(0.01, 20))
def test_derivatives_are_those_of_a_calibrated_loss(seed, lam, batch, scale):
    margins = scale * torch.randn(batch, generator=seeded(seed), dtype=torch.float64)
    derivatives = calibrated_derivatives(margins, lam, generator=seeded(seed + 1))
    assert ((derivatives >= -1 - 1.01 * SLACK) & (derivatives <= -0.99 * SLACK)).all()
    assert (derivatives[margins.argsort()].diff() >= 0).all()
    tail = margins > 1
    assert ((derivatives * margins)[tail] >= -1 - SLACK * margins[tail] - 1e-12).all()


def test_values_of_the_transform():
    # One sample with margin below 1: the derivative is -BCinv(z), clipped at -1, less the slack.
    for lam, z, expected in [
        (0.0, -1.0, math.exp(-1)),
        (0.0, 0.5, 1.0),
        (1.0, -0.25, 0.75),
        (1.0, -3.0, 0.0),
        (0.5, -1.0, 0.25),
        (-1.0, -1.0, 0.5),
        (-1.0, 2.0, 1.0),
        (1e-5, -1.0, math.exp(-1)),
    ]:
        value = calibrated_derivatives(
            torch.zeros(1, dtype=torch.float64), lam, noise=torch.tensor([z], dtype=torch.float64)
        )
        assert value.item() == pytest.approx(-expected - SLACK, abs=1e-5 if 0 < abs(lam) < 1e-3 else 1e-12), (lam, z)


def test_smallest_margins_get_the_most_negative_draws():
    margins = torch.tensor([0.3, -2.0, 0.9, -0.5])
    noise = torch.tensor([-1.0, -4.0, -2.0, -3.0])
    expected = -torch.tensor([-3.0, -1.0, -4.0, -2.0]).exp() - SLACK
    torch.testing.assert_close(calibrated_derivatives(margins, noise=noise), expected)


def test_tail_divides_by_the_margin():
    margins = torch.full((5,), 2.0)
    derivatives = calibrated_derivatives(margins, noise=torch.ones(5))
    torch.testing.assert_close(derivatives, torch.full((5,), -0.5 - SLACK))


def test_constant_draws_at_zero_give_the_hinge_inside_the_margin():
    logits = torch.tensor([0.5, -3.0, 0.9, -0.2], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 0, 0, 1])
    value = EnsLoss()(logits, targets, noise=torch.zeros(4, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value, logits)
    sign = 2 * targets - 1
    hinge = (1 - sign * logits).clamp(min=0).mean()
    (expected,) = torch.autograd.grad(hinge, logits)
    inside = sign * logits < 1
    torch.testing.assert_close(gradient[inside], expected[inside] * (1 + SLACK))


def test_gradient_is_the_drawn_derivative_over_the_batch():
    for shape in [(7,), (7, 1)]:
        logits = (3 * torch.randn(shape, generator=seeded(0), dtype=torch.float64)).requires_grad_()
        targets = torch.randint(2, (7,), generator=seeded(1))
        noise = torch.randn(7, generator=seeded(2), dtype=torch.float64)
        EnsLoss(lam=0.5)(logits, targets, noise=noise).backward()
        sign = 2 * targets - 1
        derivatives = calibrated_derivatives(sign * logits.detach().flatten(), 0.5, noise=noise)
        torch.testing.assert_close(logits.grad.flatten(), sign * derivatives / 7)


def test_margins_get_no_gradient_through_the_draw():
    margins = torch.randn(5, requires_grad=True)
    assert not calibrated_derivatives(margins).requires_grad


def test_generator_decides_and_the_global_one_stays():
    logits, targets = torch.randn(9), torch.randint(2, (9,))
    state = torch.get_rng_state()
    values = []
    for seed in (3, 3, 4):
        loss = EnsLoss(generator=seeded(seed))
        loss.resample_lambda()
        values.append(loss(logits, targets).item())
    assert values[0] == values[1] != values[2]
    assert torch.equal(state, torch.get_rng_state())


def test_every_call_draws_anew():
    loss, logits = EnsLoss(), torch.zeros(5)
    assert loss(logits + 0.5, torch.ones(5)) != loss(logits + 0.5, torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_targets_of_any_type(dtype):
    logits, noise = torch.randn(6), torch.randn(6)
    targets = torch.tensor([0, 1, 1, 0, 1, 0])
    expected = EnsLoss()(logits, targets, noise=noise)
    assert EnsLoss()(logits, targets.to(dtype), noise=noise) == expected
    assert EnsLoss()(logits[:, None], targets.to(dtype)[:, None], noise=noise) == expected


def test_lambda_is_redrawn_every_period():
    loss = EnsLoss(period=3, generator=seeded(0))
    seen = []
    for epoch in range(9):
        loss.set_epoch(epoch)
        seen.append(loss.lam.item())
    assert seen[:2] == [0, 0]
    assert len({*seen[2:5]}) == len({*seen[5:8]}) == 1
    assert len({*seen}) == 4
    assert all(-1 <= lam <= 1 for lam in seen)
    fixed = EnsLoss(lam=0.3, period=None)
    fixed.set_epoch(9)
    assert fixed.lam.item() == pytest.approx(0.3)


def test_draws_of_lambda_fill_the_interval():
    loss = EnsLoss(generator=seeded(1))
    seen = []
    for _ in range(200):
        loss.resample_lambda()
        seen.append(loss.lam.item())
    assert -1 <= min(seen) < -0.8
    assert 0.8 < max(seen) <= 1


def test_monitor_is_the_logistic_loss():
    logits, targets = torch.randn(6), torch.tensor([0.0, 1, 1, 0, 1, 0])
    torch.testing.assert_close(
        EnsLoss.monitor_loss(logits, targets), torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
    )


def test_learns_a_separable_problem():
    generator = seeded(0)
    x = torch.randn(200, 5, generator=generator)
    y = (x @ torch.tensor([1.0, -1, 2, 0, 0.5]) > 0).long()
    weight = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    loss = EnsLoss(generator=generator)
    for _ in range(300):
        optimizer.zero_grad()
        loss(x @ weight, y).backward()
        optimizer.step()
    assert ((x @ weight > 0) == (y == 1)).float().mean() > 0.97


@pytest.mark.parametrize(
    ("name", "error", "call"),
    [
        ("lam", ValueError, lambda: EnsLoss(lam=1.5)),
        ("period", ValueError, lambda: EnsLoss(period=0)),
        ("logits", TypeError, lambda: EnsLoss()(torch.zeros(3, dtype=torch.int64), torch.zeros(3))),
        ("logits", ValueError, lambda: EnsLoss()(torch.zeros(3, 2), torch.zeros(3))),
        ("logits", ValueError, lambda: EnsLoss()(torch.tensor(1.0), torch.tensor(1.0))),
        ("logits", ValueError, lambda: EnsLoss()(torch.zeros(0), torch.zeros(0))),
        ("targets", ValueError, lambda: EnsLoss()(torch.zeros(3), torch.zeros(4))),
        ("noise", ValueError, lambda: EnsLoss()(torch.zeros(3), torch.zeros(3), noise=torch.zeros(2))),
        ("margins", TypeError, lambda: calibrated_derivatives(torch.zeros(3, dtype=torch.int64))),
        ("margins", ValueError, lambda: calibrated_derivatives(torch.zeros(3, 1))),
        ("margins", ValueError, lambda: calibrated_derivatives(torch.zeros(0))),
    ],
)
def test_bad_arguments_are_named(name, error, call):
    with pytest.raises(error, match=name):
        call()
